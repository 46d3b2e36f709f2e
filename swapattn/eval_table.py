"""The report of an evaluation as plain text."""

from __future__ import annotations

from . import baselines, cost, probes
from .cells import aligned, number, p_value, share, signed, with_error
from .scores import EvalReport, EvalRow, mean_kept

_TESTS = {
    "mcnemar": "McNemar's exact test on the documents that only one of the two has right",
    "bootstrap": "paired bootstrap over the documents",
}


def eval_table(report: EvalReport) -> str:
    """The table of the tasks, the tables of what was measured beside them, and notes; about 130 columns wide."""
    heads = ("task", "metric", "docs", "shots", "chance", "teacher", report.kind, "difference", "95 % interval")
    lines = [(*heads, "p", "kept"), *map(_cells, report.rows)]
    if len(report.rows) > 1:
        lines.append(_mean_cells(report))
    used = [i for i in range(len(lines[0])) if any(line[i] not in ("", "-") for line in lines[1:])]
    table = aligned([[line[i] for i in used] for line in lines], left=2)
    return "\n".join([report.checkpoint, table, "", *_beside(report), *_notes(report)])


def _cells(row: EvalRow) -> tuple[str, ...]:
    student, teacher, significance = row.student, row.teacher, row.significance
    return (
        student.task,
        student.metric,
        f"{student.documents:,}",
        str(student.num_fewshot),
        number(student.chance, 2),
        "-" if teacher is None else with_error(teacher.value, teacher.stderr),
        with_error(student.value, student.stderr),
        signed(row.difference),
        "-" if significance is None else f"{significance.low:+.3f} … {significance.high:+.3f}",
        "-" if significance is None else p_value(significance.p_value),
        share(row.kept, row.kept_stderr),
    )


def _mean_cells(report: EvalReport) -> tuple[str, ...]:
    """The last line: the mean figure where all are accuracies, and the mean kept share."""
    rows, student, teacher = report.rows, None, None
    if all(row.student.metric.startswith("acc") for row in rows):
        student = sum(row.student.value for row in rows) / len(rows)
        teachers = [row.teacher.value for row in rows if row.teacher is not None]
        teacher = sum(teachers) / len(rows) if len(teachers) == len(rows) else None
    difference = None if student is None or teacher is None else student - teacher
    figures = number(teacher), number(student), signed(difference)
    return ("mean", "", "", "", "", *figures, "", "", share(*mean_kept(rows)))


def _beside(report: EvalReport) -> list[str]:
    """The tables of what was measured beside the tasks, each followed by an empty line."""
    lines = [f"held-out perplexity, {k}: {p.value:.2f} on {p.tokens:,} tokens" for k, p in report.perplexity.items()]
    if report.text_perplexity is not None:
        lines += [probes.perplexity_table(dict(report.text_perplexity)), ""]
    if report.probes is not None:
        lines += [probes.to_table(dict(report.probes)), ""]
    if report.baselines is not None:
        lines += [baselines.to_table(report.baselines), ""]
    if report.cost is not None:
        lines += [cost.to_table(report.cost["student"], report.cost["teacher"]), ""]
    return lines


def _notes(report: EvalReport) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in report.rows:
        if row.student.why:
            reasons.setdefault(row.student.why, []).append(row.student.task)
    tests = {row.significance.test for row in report.rows if row.significance is not None}
    cached = [row.teacher.task for row in report.rows if row.teacher is not None and row.teacher.cached]
    note = f" ({report.note})" if report.note else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        *(f"warning: {text}" for text in report.warnings),
        *(f"metrics: {why}: {', '.join(names)}" for why, names in reasons.items()),
        *(f"p: {text}" for test, text in _TESTS.items() if test in tests),
        f"teacher: {report.teacher}{note}" + (f"; from the cache: {', '.join(cached)}" if cached else ""),
        f"data: {report.data}" + (f"; the first {report.limit} documents of each" if report.limit else ""),
        f"{report.hardware}; {versions}; {report.seconds:.0f} s",
    ]
