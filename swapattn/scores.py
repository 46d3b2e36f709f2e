"""Records of an evaluation and their plain-text table; nothing is computed here but differences and shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """One task's figure for one model.

    `metric` is the preferred one and `metrics` holds all of lm-eval's; `chance` is what guessing scores (the mean of
    1/choices, 0 where nothing is chosen); `documents` is how many were scored; `version` is lm-eval's task version.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float
    documents: int
    num_fewshot: int
    version: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood `nats` over `tokens` predicted tokens."""

    value: float
    tokens: int
    nats: float


def kept_share(student: TaskResult, teacher: TaskResult) -> float | None:
    """(student - chance) / (teacher - chance); None if the teacher is within two standard errors of chance.

    There the denominator is noise, and a share of it says nothing.
    """
    margin = teacher.value - teacher.chance
    if margin <= 0 or margin < 2 * (teacher.stderr or 0.0):
        return None
    return (student.value - student.chance) / margin


@dataclass(frozen=True)
class EvalRow:
    """Teacher and student on one task; the teacher's side is None if it was left out."""

    student: TaskResult
    teacher: TaskResult | None = None

    @property
    def difference(self) -> float | None:
        """Student minus teacher."""
        return None if self.teacher is None else self.student.value - self.teacher.value

    @property
    def kept(self) -> float | None:
        """See `kept_share`; None without a teacher."""
        return None if self.teacher is None else kept_share(self.student, self.teacher)


@dataclass(frozen=True)
class EvalReport:
    """Everything an evaluation found, and with what; `path` is where it was written."""

    checkpoint: str
    kind: str
    teacher: str
    note: str
    rows: tuple[EvalRow, ...]
    data: str
    limit: int | None
    hardware: str
    versions: Mapping[str, str]
    seconds: float
    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    path: str = ""

    @property
    def kept(self) -> float | None:
        """Mean kept share over the tasks that have one."""
        shares = [row.kept for row in self.rows if row.kept is not None]
        return sum(shares) / len(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, every metric of lm-eval included."""
        rows = [{**asdict(row), "difference": row.difference, "kept": row.kept} for row in self.rows]
        return {**asdict(self), "rows": rows, "kept": self.kept}

    def to_table(self) -> str:
        """The report as plain text, about 100 columns wide."""
        lines: list[tuple[str, ...]] = [
            ("task", "metric", "docs", "shots", "chance", "teacher", self.kind, "difference", "kept")
        ]
        lines += [_cells(row) for row in self.rows]
        if len(self.rows) > 1:
            lines.append(self._mean_cells())
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        body = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        return "\n".join([self.checkpoint, *body, "", *self._footer()])

    def _mean_cells(self) -> tuple[str, ...]:
        count = len(self.rows)
        student = sum(row.student.value for row in self.rows) / count
        teachers = [row.teacher.value for row in self.rows if row.teacher is not None]
        teacher = sum(teachers) / count if len(teachers) == count else None
        difference = None if teacher is None else student - teacher
        return ("mean", "", "", "", "", _number(teacher), f"{student:.3f}", _signed(difference), _percent(self.kept))

    def _footer(self) -> list[str]:
        note = f" ({self.note})" if self.note else ""
        lines = [
            f"held-out perplexity, {name}: {p.value:.2f} on {p.tokens:,} tokens" for name, p in self.perplexity.items()
        ]
        lines += [f"teacher: {self.teacher}{note}", f"data: {self.data}"]
        if any(row.teacher is not None and row.kept is None for row in self.rows):
            lines.append("kept: - where the teacher is within two standard errors of chance")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [*lines, f"{self.hardware}; {versions}; {self.seconds:.0f} s"]


def _cells(row: EvalRow) -> tuple[str, ...]:
    student, teacher = row.student, row.teacher
    return (
        student.task,
        student.metric,
        f"{student.documents:,}",
        str(student.num_fewshot),
        f"{student.chance:.2f}",
        "-" if teacher is None else _with_error(teacher),
        _with_error(student),
        _signed(row.difference),
        _percent(row.kept),
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = zip(cells, widths, strict=True)
    return [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]


def _with_error(result: TaskResult) -> str:
    return f"{result.value:.3f}" + (f" ±{result.stderr:.3f}" if result.stderr is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
