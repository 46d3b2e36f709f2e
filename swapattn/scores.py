"""Records of an evaluation and their plain-text table; nothing is computed here but differences and shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .significance import Significance

SCHEMA = 1  # of eval.json


@dataclass(frozen=True)
class TaskResult:
    """One task's figure for one model.

    `metric` is the preferred one, `why` says for what reason, and `metrics` holds all of lm-eval's; `chance` is what
    guessing scores (the mean of 1/choices, 0 where nothing is chosen, None where answers are neither right nor wrong);
    `documents` is how many were scored, in `subtasks` tasks; `version` is lm-eval's task version; `batch_size` is what
    memory allowed in the end; `seconds` were spent when it was measured, now or, if it is `cached`, then.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    documents: int
    num_fewshot: int
    version: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    higher_is_better: bool = True
    subtasks: int = 1
    batch_size: int | None = None
    seconds: float = 0.0
    cached: bool = False

    @property
    def near_chance(self) -> bool:
        """Within two standard errors of chance, or below it; of an accuracy without an error nothing else is known."""
        if self.chance is None:
            return False
        margin = self.value - self.chance
        unknown = self.stderr is None and self.metric.startswith("acc")
        return margin <= 0 or unknown or margin < 2 * (self.stderr or 0.0)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood `nats` over `tokens` predicted tokens."""

    value: float
    tokens: int
    nats: float


@dataclass(frozen=True)
class Threshold:
    """A figure that was asked for (`--fail-under KEY=BOUND`) and what was found; None where there is no such figure."""

    key: str
    bound: float
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether the figure reaches the bound; one that is not there does not."""
        return self.value is not None and self.value >= self.bound

    def __str__(self) -> str:
        found = "has no figure" if self.value is None else f"is {self.value:.4f}"
        return f"{self.key} {found}, asked for at least {self.bound:g}"


def kept_share(student: TaskResult, teacher: TaskResult) -> float | None:
    """(student - chance) / (teacher - chance); None if the teacher is within two standard errors of chance.

    There the denominator is noise, and a share of it says nothing; nor does one of a metric where less is better, or
    where guessing has no figure.
    """
    if teacher.near_chance or not teacher.higher_is_better or teacher.chance is None or student.chance is None:
        return None
    return (student.value - student.chance) / (teacher.value - teacher.chance)


@dataclass(frozen=True)
class EvalRow:
    """Teacher and student on one task; the teacher's side is None if it was left out.

    `share_stderr` is the standard error of `kept`, from a paired bootstrap over the documents.
    """

    student: TaskResult
    teacher: TaskResult | None = None
    significance: Significance | None = None
    share_stderr: float | None = None

    @property
    def difference(self) -> float | None:
        """Student minus teacher."""
        return None if self.teacher is None else self.student.value - self.teacher.value

    @property
    def kept(self) -> float | None:
        """See `kept_share`; None without a teacher."""
        return None if self.teacher is None else kept_share(self.student, self.teacher)

    @property
    def kept_stderr(self) -> float | None:
        """The error of `kept`; None where that is None or there is no such error."""
        return None if self.kept is None else self.share_stderr

    @property
    def near_chance(self) -> bool:
        """The teacher itself is within two standard errors of chance on a task where more is better."""
        return self.teacher is not None and self.teacher.higher_is_better and self.teacher.near_chance

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what is derived."""
        names = ("difference", "kept", "kept_stderr", "near_chance")
        own = {key: value for key, value in asdict(self).items() if key != "share_stderr"}
        return {"task": self.student.task, **own, **{n: getattr(self, n) for n in names}, "why": self.student.why}


def mean_kept(rows: Iterable[EvalRow]) -> tuple[float | None, float | None]:
    """Mean kept share over the tasks that have one, and its standard error, tasks being independent of each other."""
    return mean_share((row.kept, row.kept_stderr) for row in rows)


def mean_share(shares: Iterable[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """The same from the shares with their errors; those that are None do not count."""
    found = [(share, error) for share, error in shares if share is not None]
    if not found:
        return None, None
    mean = sum(share for share, _ in found) / len(found)
    errors = [error for _, error in found if error is not None]
    return mean, math.hypot(*errors) / len(found) if len(errors) == len(found) else None


@dataclass(frozen=True)
class EvalReport:
    """Everything an evaluation found, and with what; `path` is where it was written.

    `num_fewshot` and `seed` are None where lm-eval's own are taken. `text_perplexity`, `probes` and `cost` are the
    plain values of `swapattn.probes` and `swapattn.cost`, None where they were not asked for; so is `baselines`, what
    `baselines.beside` gives by role, teacher and student among them.
    """

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
    time: str = ""
    command: str = ""
    num_fewshot: int | None = None
    batch_size: int | str = 16
    seed: int | None = None
    text_perplexity: Mapping[str, Any] | None = None
    probes: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    baselines: Mapping[str, Any] | None = None
    thresholds: tuple[Threshold, ...] = ()

    @property
    def kept(self) -> float | None:
        """Mean kept share over the tasks that have one."""
        return mean_kept(self.rows)[0]

    @property
    def kept_stderr(self) -> float | None:
        """Standard error of `kept`."""
        return mean_kept(self.rows)[1]

    @property
    def missed(self) -> tuple[Threshold, ...]:
        """The thresholds that were not reached."""
        return tuple(threshold for threshold in self.thresholds if not threshold.passed)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before comparing the figures."""
        near = [row.student.task for row in self.rows if row.near_chance]
        if not near:
            return ()
        return (
            f"the teacher itself is within two standard errors of chance on {', '.join(near)}: "
            "no share kept is given there, and a difference says little",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, every metric of lm-eval included."""
        plain = {
            "schema": SCHEMA,
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "kept": self.kept,
            "kept_stderr": self.kept_stderr,
            "warnings": list(self.warnings),
            "thresholds": [{**asdict(threshold), "passed": threshold.passed} for threshold in self.thresholds],
        }
        found: dict[str, Any] = _finite(plain)
        return found

    def to_table(self) -> str:
        """The report as plain text, about 130 columns wide."""
        from .eval_table import eval_table  # which imports what makes the tables beside it

        return eval_table(self)


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON lacks, such as a perplexity that overflowed."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
