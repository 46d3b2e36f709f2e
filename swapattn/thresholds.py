"""Figures that an evaluation must reach: `kept=0.95`, `piqa.kept=0.9`, `piqa.acc_norm=0.60`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .errors import UsageError
from .scores import EvalRow, Threshold

_FORM = "expected kept=SHARE, TASK.kept=SHARE or TASK.METRIC=VALUE, such as piqa.acc_norm=0.60"


def parse(wanted: Iterable[str], *, teacher: bool) -> dict[str, float]:
    """Bounds by key.

    Args:
        wanted: each `KEY=VALUE`.
        teacher: whether a teacher is scored, which a share needs.

    Raises:
        UsageError: not of that form, no finite number, or a share without a teacher.
    """
    bounds = {}
    for text in wanted:
        key, _, value = text.rpartition("=")
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound) or not (key == "kept" or all(key.rpartition(".")[::2])):
            raise UsageError(f"--fail-under {text}: {_FORM}")
        if key.rpartition(".")[2] == "kept" and not teacher:
            raise UsageError(f"--fail-under {text}: a kept share needs the teacher, which --no-teacher leaves out")
        bounds[key] = bound
    return bounds


def check_keys(keys: Iterable[str], metrics: Mapping[str, Iterable[str]]) -> None:
    """Make sure that there will be a figure for each key.

    Args:
        keys: as in `parse`.
        metrics: what each task will report.

    Raises:
        UsageError: there is no such task or metric (the message names those that there are), or less of it is better.
    """
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY  # of lm-eval's own metrics; tasks may define others

    for key in keys:
        if not metrics:
            raise UsageError(f"--fail-under {key}: no task is scored, and without one there is no such figure")
        if key == "kept":
            continue
        task, metric = _split(key, metrics)
        if task is None:
            raise UsageError(f"--fail-under {key}: no such task is scored here, only {', '.join(metrics)}")
        if metric != "kept" and metric.partition(",")[0] not in metrics[task]:
            raise UsageError(f"--fail-under {key}: {task} has {', '.join(sorted(metrics[task]))} and kept")
        if HIGHER_IS_BETTER_REGISTRY.get(metric.partition(",")[0], None) is False:
            raise UsageError(f"--fail-under {key}: less {metric} is better, and only a least figure can be asked for")


def judge(bounds: Mapping[str, float], rows: Sequence[EvalRow], kept: float | None) -> tuple[Threshold, ...]:
    """Each bound with the student's figure."""
    tasks = {row.student.task: row for row in rows}
    found = []
    for key, bound in bounds.items():
        if key == "kept":
            found.append(Threshold(key, bound, kept))
            continue
        task, metric = _split(key, tasks)
        row = tasks[task] if task is not None else None
        value = None if row is None else row.kept if metric == "kept" else row.student.metrics.get(metric)
        found.append(Threshold(key, bound, value))
    return tuple(found)


def _split(key: str, tasks: Iterable[str]) -> tuple[str | None, str]:
    """(task or None, metric); the name of a task may itself have dots."""
    task, _, metric = key.rpartition(".")
    return (task if task in tasks else None), metric
