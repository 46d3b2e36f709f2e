"""Is the difference between two models more than luck? Paired tests on their per-document results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Items = Mapping[str, Any]  # document -> what the metric is made of: a number, or what lm-eval aggregates
Aggregate = Callable[[list[Any]], float]

_CONFIDENCE = 0.95
_RESAMPLES = 9999  # of means, which are fast; the smallest p-value is then 0.0002
_SHARE_RESAMPLES = 1999  # of shares, of which only the middle 68 % are looked at
_SLOW_RESAMPLES = 999  # where lm-eval's own Python function aggregates
_BATCH_NUMBERS = 4_000_000  # resampled numbers in memory at a time: 32 MB
_TOLERANCE = 1e-6  # between the reported difference and the one found from the documents


@dataclass(frozen=True)
class Significance:
    """A two-sided p-value and a 95 % interval (`low`, `high`) of the difference student minus teacher.

    `gained` and `lost` count the documents that only the student or only the teacher has right; McNemar's test only.
    """

    test: Literal["mcnemar", "bootstrap"]
    p_value: float
    low: float
    high: float
    documents: int
    gained: int | None = None
    lost: int | None = None


def compare(
    student: Items, teacher: Items, difference: float, aggregate: Aggregate | None = None, *, seed: int = 0
) -> Significance | None:
    """Test a difference of two figures on the documents behind them.

    Args:
        student, teacher: by document.
        difference: the reported one; what the documents give must agree with it, or the test would be of another
            figure (a group that weighs its tasks equally, for example).
        aggregate: lm-eval's function from all documents to the figure, where that is no plain mean.
        seed: of the resampling.

    Returns:
        None where there is no such test: fewer than two documents, other documents, or another figure.
    """
    if student.keys() != teacher.keys() or len(student) < 2:
        return None
    ours, theirs = list(student.values()), [teacher[key] for key in student]
    if all(isinstance(value, int | float) for value in (*ours, *theirs)):
        mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
        if abs(mean - difference) <= _TOLERANCE:
            binary = set(ours) | set(theirs) <= {0, 1}
            return mcnemar(ours, theirs) if binary else _bootstrap_of_mean(ours, theirs, seed)
    if aggregate is None:
        return None
    found = aggregate(ours) - aggregate(theirs)
    if abs(found - difference) > _TOLERANCE * max(1.0, abs(difference)):
        return None
    return _bootstrap_of_aggregate(ours, theirs, aggregate, seed)


def mcnemar(student: Sequence[float], teacher: Sequence[float]) -> Significance:
    """McNemar's exact test of two lists of 0 and 1, with the interval of Agresti and Min (2005).

    The test is binomial over the documents on which only one is right. The interval is Wald's after half a document
    was added to each of the four cells ("Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24): it stays honest where few documents differ.
    """
    from scipy import stats

    count = len(student)
    gained = sum(ours > theirs for ours, theirs in zip(student, teacher, strict=True))
    lost = sum(ours < theirs for ours, theirs in zip(student, teacher, strict=True))
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    first, second, total = gained + 0.5, lost + 0.5, count + 2
    centre = (first - second) / total
    error = ((first + second) / total - centre**2) ** 0.5 / total**0.5
    half = float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * error
    return Significance("mcnemar", p_value, centre - half, centre + half, count, gained, lost)


def error_of_share(
    student: Items, teacher: Items, chance: float | None, values: tuple[float, float], *, seed: int = 0
) -> float | None:
    """Standard error of (student - chance) / (teacher - chance) under a paired bootstrap over the documents.

    It is half the width of the interval that holds 68.27 % of the resampled shares: for a normal distribution the
    standard deviation, which a single resample in which the teacher's margin vanishes could make arbitrarily large.

    Args:
        student, teacher: by document; numbers of which the figures are the means.
        chance: what guessing scores.
        values: the reported figures of student and teacher, which the documents' means must agree with.
        seed: of the resampling.

    Returns:
        None where there is no such error: no chance, fewer than two documents, other documents, another figure, or a
        teacher that guesses in too many resamples.
    """
    import numpy as np

    if chance is None or student.keys() != teacher.keys() or len(student) < 2:
        return None
    ours, theirs = list(student.values()), [teacher[key] for key in student]
    if not all(isinstance(value, int | float) for value in (*ours, *theirs)):
        return None
    margins = np.asarray([ours, theirs], dtype=np.float64) - chance
    if np.abs(margins.mean(1) + chance - values).max() > _TOLERANCE:
        return None
    rng, count = np.random.default_rng(seed), len(ours)
    chosen = (rng.integers(count, size=count) for _ in range(_SHARE_RESAMPLES))
    drawn = np.asarray([margins[:, places].mean(1) for places in chosen])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = drawn[:, 0] / drawn[:, 1]
        shares = shares[~np.isnan(shares)]
        low, high = np.percentile(shares, (15.865, 84.135)) if shares.size else (np.nan, np.nan)
        error = float(high - low) / 2
    return error if np.isfinite(error) else None


def _bootstrap_of_mean(student: Sequence[float], teacher: Sequence[float], seed: int) -> Significance:
    import numpy as np

    differences = np.asarray(student, dtype=np.float64) - np.asarray(teacher, dtype=np.float64)
    batch = max(1, _BATCH_NUMBERS // len(differences))
    return _bootstrap(differences, np.mean, seed, resamples=_RESAMPLES, vectorized=True, batch=batch)


def _bootstrap_of_aggregate(student: list[Any], teacher: list[Any], aggregate: Aggregate, seed: int) -> Significance:
    import numpy as np

    def statistic(chosen: Any) -> float:
        return aggregate([student[i] for i in chosen]) - aggregate([teacher[i] for i in chosen])

    places = np.arange(len(student))
    return _bootstrap(places, statistic, seed, resamples=_SLOW_RESAMPLES, vectorized=False, batch=1)


def _bootstrap(
    sample: Any, statistic: Callable[..., Any], seed: int, *, resamples: int, vectorized: bool, batch: int
) -> Significance:
    """Percentile bootstrap; the p-value is twice the smaller share of resamples on one side of zero."""
    import numpy as np
    from scipy import stats

    result = stats.bootstrap(
        (sample,),
        statistic,
        n_resamples=resamples,
        vectorized=vectorized,
        batch=batch,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    drawn = result.bootstrap_distribution
    # one is added, so that no p-value is zero that was only estimated
    side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1
    interval = result.confidence_interval
    p_value = min(1.0, 2 * side / (resamples + 1))
    return Significance("bootstrap", p_value, float(interval.low), float(interval.high), len(sample))
