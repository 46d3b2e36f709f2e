"""What a student is set beside: each of its branches alone, the teacher with the window alone, other models.

A window of softmax can hide a linear branch that does nothing: short tasks fit into it. Only the same measurements
with one branch switched off, and on the teacher with nothing but the window, show what each part carries.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .cells import aligned, number, p_value, share, with_error
from .checkpoint import Checkpoint
from .environment import say
from .errors import UsageError
from .measurement import Measured, Subject
from .scores import EvalRow, mean_kept
from .significance import compare, error_of_share
from .tasks import Unit

if TYPE_CHECKING:
    import torch

    from .score_store import Store

BRANCHES: dict[str, Literal["linear", "local"]] = {"linear-off": "local", "window-off": "linear"}
WINDOW_ONLY = "window-only"  # the teacher with window and sinks in the swapped layers, nothing trained
_TITLES = {
    "linear-off": "linear branch off",
    "window-off": "window off",
    WINDOW_ONLY: "teacher, window only",
}


def subjects(
    found: Checkpoint,
    *,
    branches: bool,
    teacher: bool,
    against: Sequence[str | Path],
    device: str,
    dtype: torch.dtype | None,
    own: Store,
    others: Store,
) -> list[Subject]:
    """The models to measure, by role: the keys of `BRANCHES`, `WINDOW_ONLY`, the names of other models' folders.

    Args:
        found: the student.
        branches: whether the first three are wanted; a student without a window has none.
        teacher: whether the teacher is measured; without it there is no `WINDOW_ONLY` either.
        against: folders of other checkpoints or plain models.
        device, dtype: as in `evaluation.evaluate`.
        own, others: where the results of the student and of all other models are kept.

    Raises:
        UsageError: a folder holds no model, or two have the same name.
    """
    common = {"device": device, "dtype": "as stored" if dtype is None else str(dtype)}
    chosen: list[Subject] = []
    spec = json.loads((found.path / "config.json").read_text(encoding="utf-8"))["swapattn"]["spec"]
    window = spec["local"]
    if branches and window is None:
        say(f"{found.path} has no window beside its linear branch: there is no branch to switch off")
    if branches and window is not None:
        for role, branch in BRANCHES.items():
            loader = functools.partial(_one_branch, found.path, branch, device=device, dtype=dtype)
            chosen.append(Subject(role, found.path, loader, own, **common, variant=f"branch {branch}"))
    if branches and window is not None and teacher:
        sizes = {"window": window["window"], "sinks": window["sinks"]}
        kept = {"local": sizes, "keep_softmax": spec["keep_softmax"]}
        loader = functools.partial(_window_only, found, kept, device=device, dtype=dtype)
        variant = f"window only {json.dumps(kept)}"
        chosen.append(Subject(WINDOW_ONLY, found.teacher_path, loader, others, **common, variant=variant))
    for folder in map(Path, against):
        name = folder.resolve().name
        if not (folder / "config.json").is_file():
            raise UsageError(f"--against {folder}: no model there")
        # the branches' names are taken even where none is switched off: the tables say what they stand for
        if name in {"teacher", found.kind, *_TITLES, *(subject.role for subject in chosen)}:
            raise UsageError(f"--against {folder}: another model is called {name} as well; rename the folder")
        loader = functools.partial(_other, folder, device=device, dtype=dtype)
        chosen.append(Subject(name, folder, loader, others, **common))
    return chosen


def _one_branch(path: Path, branch: Literal["linear", "local"], **options: Any) -> tuple[Any, Any]:
    from .attention import set_branch
    from .loading import load

    model, tokenizer = load(path, **options)
    set_branch(model, branch)
    return model, tokenizer


def _window_only(found: Checkpoint, spec: Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    """The teacher with softmax over window and sinks alone where the student has swapped layers."""
    from .attention import set_branch
    from .loading import load_teacher
    from .recipe import ConvertSpec
    from .surgery import apply_, plan

    model, tokenizer = load_teacher(found, **options)
    apply_(model, plan(model.config, ConvertSpec.model_validate(spec)))
    set_branch(model, "local")
    return model.to(model.device).eval(), tokenizer  # with a cache a layer runs both branches, on one device


def _other(folder: Path, **options: Any) -> tuple[Any, Any]:
    from .loading import load, load_teacher

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (load if "swapattn" in config else load_teacher)(folder, **options)


def beside(
    baseline: Measured, student: Measured, teacher: Measured | None, units: Sequence[Unit], seed: int
) -> dict[str, Any]:
    """One baseline and how the student compares with it, as plain values.

    Returns:
        "kept", "kept_stderr": mean share of the teacher's margin over chance that the baseline has. "tasks": a row
        each with its figure, its share, and what the student has more ("ahead" with a paired "significance").
        "text_perplexity" and "perplexity" (of the given and the embedded text, where they were measured): the figures
        and "ratio", "far_ratio" to the student's with paired errors. "recall", "passkey": as `probes.collect` gives
        them.
    """
    from .probes import compare_perplexity

    rows = [_row(unit, baseline, teacher, seed) for unit in units]
    kept, error = mean_kept(rows)
    probes: Mapping[str, Any] = baseline.extras.get("probes", {})
    texts = {name: (_texts(baseline)[name], _texts(student)[name]) for name in _texts(student)}
    return {
        "kept": kept,
        "kept_stderr": error,
        "tasks": [_task(unit, row, baseline, student, seed) for unit, row in zip(units, rows, strict=True)],
        **{name: _perplexity(compare_perplexity(*pair)) for name, pair in texts.items()},
        "recall": probes.get("recall", []),
        "passkey": probes.get("passkey", []),
    }


def _texts(measured: Measured) -> dict[str, Mapping[str, Any]]:
    """The perplexities by position, of the given and of the embedded text, where they were measured."""
    given, probes = measured.extras.get("text"), measured.extras.get("probes")
    return {
        **({"text_perplexity": given} if given else {}),
        **({"perplexity": probes["perplexity"]} if probes else {}),
    }


def _row(unit: Unit, baseline: Measured, teacher: Measured | None, seed: int) -> EvalRow:
    ours = baseline.tasks[unit.name]
    if teacher is None:
        return EvalRow(ours.result)
    theirs = teacher.tasks[unit.name]
    values = ours.result.value, theirs.result.value
    share = error_of_share(ours.items, theirs.items, theirs.result.chance, values, seed=seed)
    return EvalRow(ours.result, theirs.result, share_stderr=share)


def _task(unit: Unit, row: EvalRow, baseline: Measured, student: Measured, seed: int) -> dict[str, Any]:
    own, other = student.tasks[unit.name], baseline.tasks[unit.name]
    ahead = own.result.value - other.result.value
    test = compare(own.items, other.items, ahead, unit.aggregate(own.result.metric), seed=seed)
    result = row.student
    found = {"task": unit.name, "metric": result.metric, "value": result.value, "stderr": result.stderr}
    shares = {"kept": row.kept, "kept_stderr": row.kept_stderr}
    return {**found, **shares, "ahead": ahead, "significance": asdict(test) if test is not None else None}


def _perplexity(compared: Mapping[str, Any]) -> dict[str, Any]:
    """What `compare_perplexity` says of a baseline in the student's place and the student in the teacher's."""
    own = compared["student"]
    names = ("ratio", "ratio_stderr", "far_ratio", "far_ratio_stderr")
    bins = [
        {key: row[key] for key in ("start", "end", "ratio")} | {"perplexity": row["student"]}
        for row in compared["bins"]
    ]
    far = own["far"]["perplexity"] if own["far"] else None
    found = {"text": compared["text"], "perplexity": own["perplexity"], "far_perplexity": far}
    windows = {name: own[name] for name in ("window_nats", "window_far_nats")}  # to pair with another run's
    return {**found, **{name: compared[name] for name in names}, "bins": bins, **windows}


def title(role: str) -> str:
    """A role in words."""
    return _TITLES.get(role, role)


def to_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of `beside` by role as plain text, a column each."""
    first = next(iter(found.values()))
    rows: list[tuple[str, ...]] = [("branches and baselines", *map(title, found))]
    rows.append(("kept share, mean", *(share(one["kept"], one["kept_stderr"]) for one in found.values())))
    for index, task in enumerate(first["tasks"]):
        here = [one["tasks"][index] for one in found.values()]
        rows.append((f"{task['task']} {task['metric']}", *(with_error(row["value"], row["stderr"]) for row in here)))
        rows.append(("  student minus this", *map(_ahead, here)))
    for name, words in (("text_perplexity", "perplexity, given text"), ("perplexity", "perplexity, embedded text")):
        texts = [one[name] for one in found.values() if name in one]
        if not texts:
            continue
        for prefix, where in (("", ""), ("far_", ", far")):
            rows.append((words + where, *(number(text[f"{prefix}perplexity"], 2) for text in texts)))
            ratios = ((text[f"{prefix}ratio"], text[f"{prefix}ratio_stderr"]) for text in texts)
            rows.append(("  times the student's", *(with_error(*ratio) for ratio in ratios)))
    for name, key, error in (("recall", "exact", "exact_stderr"), ("passkey", "accuracy", "stderr")):
        of_lengths = [{row["length"]: row for row in one[name]} for one in found.values()]  # not all read the longest
        for length in sorted({length for rows_of in of_lengths for length in rows_of}):
            probes = [rows_of.get(length) for rows_of in of_lengths]
            cells = (with_error(row[key], row[error]) if row else "-" for row in probes)
            rows.append((f"{name}{', exact,' if key == 'exact' else ''} at {length:,}", *cells))
    return aligned(rows)


def _ahead(row: Mapping[str, Any]) -> str:
    test = row["significance"]
    return f"{row['ahead']:+.3f}" + (f" p {p_value(test['p_value'])}" if test else "")
