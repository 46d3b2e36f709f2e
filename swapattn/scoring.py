"""One model on one task: lm-eval does the work, what it found is brought into our records."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

from .environment import say
from .errors import CheckpointError, SwapattnError, UsageError
from .scores import TaskResult
from .tasks import Unit

_NORMALISED = ("hellaswag", "piqa", "arc_challenge", "openbookqa")  # where papers report acc_norm
_PLAIN = ("arc_easy",)  # where there are both and they report acc
_BOOTSTRAP = 1000  # resamples for the error of perplexities; accuracies have a closed form and do not use it
_SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own for random, numpy, torch and few-shot examples
_AUTO_START = 64  # what lm-eval's automatic batch size starts from


@dataclass(frozen=True)
class Settings:
    """How to score, as lm-eval names it.

    `num_fewshot` None is each task's own number, `seed` None lm-eval's own four; a number is taken for all four.
    `batch_size` may be "auto".
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError where a number makes no sense."""
        batch = 1 if self.batch_size == "auto" else self.batch_size
        limit = 1 if self.limit is None else self.limit
        if not isinstance(batch, int) or batch < 1 or limit < 1 or (self.num_fewshot or 0) < 0:
            given = f"limit {self.limit}, num_fewshot {self.num_fewshot}, batch_size {self.batch_size}"
            raise UsageError(f"{given}: must be positive; batch_size may be auto")
        if self.seed is not None and not 0 <= self.seed < 2**32:  # what NumPy takes
            raise UsageError(f"--seed {self.seed}: choose one from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Scored:
    """A figure, what it is made of, and lm-eval's own account of every document.

    `items` maps "task:document" to the metric's value there, `samples` a task's name to lm-eval's samples.
    """

    result: TaskResult
    items: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def to_record(self, *, samples: bool) -> dict[str, Any]:
        """Plain values; the samples are large and only there when asked for."""
        kept = {leaf: [plain_sample(s) for s in found] for leaf, found in self.samples.items()} if samples else None
        return {"result": asdict(self.result), "items": dict(self.items), "samples": kept}


def from_record(record: Mapping[str, Any], *, samples: bool) -> Scored | None:
    """Read `Scored.to_record` again, marked as cached; None if it is of another version or lacks wanted samples."""
    try:
        if samples and record["samples"] is None:
            return None
        result = replace(TaskResult(**record["result"]), cached=True)
        return Scored(result, dict(record["items"]), record["samples"] or {})
    except (KeyError, TypeError):
        return None


class Scorer:
    """Scores units with one model; a batch size that memory did not allow is not tried again."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.batch: int | str = settings.batch_size

    def score(self, unit: Unit) -> Scored:
        """Score one unit, with half the batch whenever memory is short.

        Raises:
            SwapattnError: not even one sequence at a time fits.
        """
        start = time.perf_counter()
        while True:
            found, batch = self._attempt(unit)
            if found is not None:
                return _scored(unit, found, batch, round(time.perf_counter() - start, 2))
            _free()  # out here the exception and the tensors in its frames are gone
            if batch <= 1:
                raise SwapattnError(
                    f"out of memory on task {unit.name} with one sequence at a time: use a larger device or --device "
                    "cpu; the tasks before it are kept, the same command goes on from there"
                )
            self.batch = batch // 2
            say(f"out of memory on {unit.name} with batch size {batch}: going on with {self.batch}")

    def _attempt(self, unit: Unit) -> tuple[Mapping[str, Any] | None, int]:
        """(lm-eval's results or None without memory, the batch size that was used)."""
        from accelerate.utils.memory import should_reduce_batch_size

        was_training = self.model.training
        seeds = _SEEDS if self.settings.seed is None else (self.settings.seed,) * 4
        lm: Any = None
        try:
            with _quiet_lm_eval():
                from lm_eval.evaluator import simple_evaluate
                from lm_eval.models.huggingface import HFLM
                from lm_eval.tasks import TaskManager

                lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.batch)
                found = simple_evaluate(
                    model=lm,
                    tasks=[unit.item],
                    num_fewshot=self.settings.num_fewshot,
                    limit=self.settings.limit,
                    bootstrap_iters=_BOOTSTRAP,
                    random_seed=seeds[0],
                    numpy_random_seed=seeds[1],
                    torch_random_seed=seeds[2],
                    fewshot_random_seed=seeds[3],
                    task_manager=TaskManager(include_defaults=False),  # the items are loaded
                )
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            return None, self._used(lm)
        finally:
            self.model.train(was_training)  # HFLM puts the model in evaluation mode
        assert found is not None  # None only on the other ranks of a distributed run
        return found, self._used(lm)

    def _used(self, lm: Any) -> int:
        """The batch size; where lm-eval chose it, the largest that it did choose."""
        if isinstance(self.batch, int):
            return self.batch
        return max(getattr(lm, "batch_sizes", {}).values(), default=_AUTO_START)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scored(unit: Unit, found: Mapping[str, Any], batch: int, seconds: float) -> Scored:
    metrics, filters = _metrics(found["results"][unit.name])
    if not metrics:
        raise UsageError(f"task {unit.name} has no numeric metric of its own; name its subtasks instead")
    metric, why = _choose(unit.name, metrics)
    _check_numbers(unit.name, found["samples"])
    samples = {leaf: found["samples"][leaf] for leaf in unit.leaves}
    scored = {leaf: [s for s in samples[leaf] if s["filter"] == filters[metric]] for leaf in unit.leaves}
    first = next(iter(unit.leaves))
    items = _items(scored, metric.partition(",")[0])
    result = TaskResult(
        task=unit.name,
        metric=metric,
        value=metrics[metric],
        stderr=metrics.get(_stderr(metric)),
        chance=_chance(scored, items, found) if metric in ("acc", "acc_norm") else 0.0,
        documents=sum(len(documents) for documents in scored.values()),
        num_fewshot=int(found["n-shot"].get(first) or 0),
        version=str(found["versions"].get(unit.name)),
        metrics=metrics,
        why=why,
        higher_is_better=found["higher_is_better"].get(unit.name, {}).get(metric.partition(",")[0]) is not False,
        subtasks=len(unit.leaves),
        batch_size=batch,
        seconds=seconds,
    )
    return Scored(result, items, samples)


def _check_numbers(task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse likelihoods that are NaN: the first answer would pass for the most likely one."""
    every = [sample for documents in samples.values() for sample in documents]
    broken = sum(any(isinstance(x, float) and math.isnan(x) for x in _flat(sample["resps"])) for sample in every)
    if broken:
        raise CheckpointError(
            f"{task}: on {broken:,} of {len(every):,} documents a likelihood is NaN: the model overflows in its dtype "
            "(--dtype bfloat16 or float32), or its weights are not finite"
        )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _metrics(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """(figure, filter) by metric; the first filter's go by the metric's name, others by lm-eval's `metric,filter`."""
    metrics: dict[str, float] = {}
    filters: dict[str, str] = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or not isinstance(value, int | float) or math.isnan(value):
            continue  # the error of a single document is NaN
        name = name if name not in metrics else key
        metrics[name], filters[name] = float(value), chosen
    return metrics, filters


def _stderr(metric: str) -> str:
    name, comma, chosen = metric.partition(",")
    return f"{name}_stderr{comma}{chosen}"


def _choose(task: str, metrics: Mapping[str, float]) -> tuple[str, str]:
    """The metric to compare by, and why."""
    accuracies = [metric for metric in ("acc", "acc_norm") if metric in metrics]
    if not accuracies:
        metric = next(iter(metrics))
        return metric, f"{metric}, the first that lm-eval gives"
    if len(accuracies) == 1:
        return accuracies[0], f"{accuracies[0]}, the only accuracy there is"
    if task in _NORMALISED:
        return "acc_norm", "acc_norm (likelihood divided by the length of the answer), as papers report it"
    return "acc", "acc, as papers report it" if task in _PLAIN else "acc, where nothing says otherwise"


def _items(scored: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> dict[str, Any]:
    """The metric's value on each document, as JSON can hold it; nothing if it is something else."""
    items = {}
    for leaf, samples in scored.items():
        for sample in samples:
            value: Any = sample.get(metric)
            if hasattr(value, "item"):  # of numpy or torch
                value = value.item()
            if not isinstance(value, int | float | str | list | tuple):
                return {}
            items[f"{leaf}:{sample['doc_id']}"] = float(value) if isinstance(value, int) else value
    return items


def _chance(
    scored: Mapping[str, Sequence[Mapping[str, Any]]], items: Mapping[str, Any], found: Mapping[str, Any]
) -> float | None:
    """What guessing scores; None where a document is neither right nor wrong, as in truthfulqa_mc2."""
    if not set(items.values()) <= {0.0, 1.0}:
        return None
    chances = [
        1 / len(sample["resps"]) if found["configs"][leaf].get("output_type") == "multiple_choice" else 0.0
        for leaf, samples in scored.items()
        for sample in samples
    ]
    return sum(chances) / len(chances) if chances else 0.0


def plain_sample(sample: Mapping[str, Any]) -> Any:
    """A sample as lm-eval writes it to its own files."""
    import json

    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(sample, default=handle_non_serializable, ensure_ascii=False))


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's log and prints, and skip what it collects about the machine.

    That would be a `git describe` that complains on stderr outside a repository and a second of `collect_env`; a
    report of ours has its own account of hardware and versions.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import lm_eval.evaluator as evaluator

        with (
            contextlib.redirect_stdout(sys.stderr),
            mock.patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True),
            mock.patch.object(evaluator, "add_env_info", create=True),
        ):
            yield
    finally:
        logger.setLevel(level)
