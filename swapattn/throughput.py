"""`bench train`: how fast the stages of a recipe train, beside plain fine-tuning of the teacher at the same shape.

Weights are random (speed does not depend on them), tokens too; everything else is what `distill` runs: the Trainer,
the optimiser, the losses, the progress line.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM

from . import sources
from .compilation import align_function
from .data import SHORTEST
from .environment import default_device, hardware, say, versions
from .errors import RecipeError
from .lora import inject_
from .objectives import distill_loss, stage_flops
from .peak import forward_flops, share_of_peak, step_flops
from .recipe import Recipe
from .shards import read_config
from .stages import AlignStage, DistillStage, TrainStage
from .surgery import apply_, plan
from .training import LossFunction, run_stage

KINDS = ("align", "distill", "finetune")
_TOP_KERNELS = 25


class RandomTokens(IterableDataset[dict[str, torch.Tensor]]):
    """Endless windows of random token ids, made beforehand so that they cost nothing.

    With `document_mask` each is four documents (of at least 64 tokens).
    """

    def __init__(self, vocabulary: int, length: int, windows: int = 64, *, document_mask: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.windows = torch.randint(vocabulary, (windows, length), generator=generator)
        positions = torch.arange(length) % max(SHORTEST, -(-length // 4))
        self.positions = {"position_ids": positions} if document_mask else {}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            for window in self.windows:
                yield {"input_ids": window, **self.positions}


@dataclass(frozen=True)
class Throughput:
    """What `measure` found: one row per length and kind of step."""

    model: str
    recipe: str
    hardware: str
    rows: tuple[dict[str, Any], ...]
    kernels: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        rows = list(self.rows)
        found = {"model": self.model, "recipe": self.recipe, "hardware": self.hardware, "rows": rows}
        return {**found, "versions": versions(), "kernels": self.kernels}

    def to_table(self) -> str:
        """The same as text."""
        lines = [
            f"{'step':<10}{'tokens':>12}{'ms/step':>10}{'tokens/s':>12}{'of peak':>9}{'memory':>11}{'to finetune':>13}"
        ]
        for row in self.rows:
            share, ratio, memory = row["share_of_peak"], row["of_finetune"], row["memory_bytes"]
            shape = f"{row['batch']} x {row['length']}"
            lines.append(
                f"{row['step']:<10}{shape:>12}{row['milliseconds']:>10,.1f}{row['tokens_per_second']:>12,.0f}"
                f"{'-' if share is None else f'{share:.1%}':>9}"
                f"{'-' if memory is None else f'{memory / 2**30:.1f} GiB':>11}"
                f"{'-' if ratio is None else f'{ratio:.2f}x':>13}"
            )
        lines += ["", f"{self.model}, random weights, recipe {self.recipe}, {self.hardware}"]
        return "\n".join(lines + [f"\n{title}\n{table}" for title, table in self.kernels.items()])


def finetune_loss(
    model: Any, ids: torch.Tensor, *, position_ids: torch.Tensor | None = None, amp: bool
) -> torch.Tensor:
    """Mean next-token cross-entropy as transformers computes it: what plain fine-tuning costs."""
    given = {} if position_ids is None else {"position_ids": position_ids}
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        logits = model(input_ids=ids, use_cache=False, **given).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def measure(
    model: str,
    recipe: Recipe,
    *,
    lengths: Sequence[int] = (512, 2048),
    kinds: Sequence[str] = KINDS,
    steps: int = 20,
    warmup: int = 5,
    profile: bool = False,
    device: str | None = None,
) -> Throughput:
    """Time training steps of each kind at each length; the batch shrinks so that a step keeps its tokens.

    Args:
        model: as for `convert`; of a local folder only config.json is read.
        recipe: its convert section and the settings of its first align and distill stages.
        lengths: tokens in a window.
        kinds: of `KINDS`.
        steps: timed optimiser steps.
        warmup: steps before them, in which kernels are compiled.
        profile: also record the CUDA kernels (on a CPU the operators) that take the most time.
        device: default "cuda" if there is one.

    Raises:
        RecipeError: the recipe has no such stage.
        UsageError, SourceError, UnsupportedModelError: no such model, or it is converted already.
    """
    device = device or default_device()
    config = _config(model)
    rows: list[dict[str, Any]] = []
    kernels: dict[str, str] = {}
    for length in lengths:
        found: list[dict[str, Any]] = []
        for kind in kinds:
            stage = _stage(recipe, kind, length)
            say(f"{kind} at {stage.batch} x {length}")
            row, table = _measure_one(config, recipe, stage, kind, (steps, warmup, profile), device)
            found.append(row)
            if table:
                kernels[f"{kind}, {stage.batch} x {length}"] = table
        plain = next((row["tokens_per_second"] for row in found if row["step"] == "finetune"), None)
        rows += [{**row, "of_finetune": row["tokens_per_second"] / plain if plain else None} for row in found]
    return Throughput(model, recipe.name, hardware(device), tuple(rows), kernels)


def _config(model: str) -> Any:
    path = Path(model).expanduser()
    if not (path / "config.json").is_file():
        path = sources.materialize(sources.resolve(model)).path
    return read_config(path)


def _stage(recipe: Recipe, kind: str, length: int) -> TrainStage:
    wanted = AlignStage if kind == "align" else DistillStage
    found = next((stage for stage in recipe.distill.stages if isinstance(stage, wanted)), None)
    if found is None:
        raise RecipeError(f"recipe {recipe.name} has no stage {wanted.__name__.removesuffix('Stage').lower()}")
    batch = max(1, found.batch * found.length // length)
    micro = found.micro_batch and max(1, found.micro_batch * found.length // length)
    changed: dict[str, Any] = {"length": length, "batch": batch, "micro_batch": micro, "tokens": batch * length}
    if kind == "distill":
        changed["teacher"] = None  # random tokens have no written logits
    if kind == "finetune":
        changed |= {
            "train": "all",
            "lora": {},
            "learning_rates": {},
            "backbone_learning_rate": found.backbone_learning_rate or 1e-6,
        }
    values = {**found.model_dump(), **changed}
    if micro and batch % micro:
        values["micro_batch"] = 1
    return type(found).model_validate(values)


def _measure_one(
    config: Any, recipe: Recipe, stage: TrainStage, kind: str, counts: tuple[int, int, bool], device: str
) -> tuple[dict[str, Any], str]:
    steps, warmup, profile = counts
    model, loss, teacher = prepared(config, recipe, stage, kind, device)
    plain = kind == "finetune"
    flops = step_flops(kind, forward_flops(model, stage.length)) if plain else stage_flops(model, stage, teacher)
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(3))

        def run(count: int, **changed: Any) -> dict[str, Any]:
            timed = stage.model_copy(update={"tokens": count * stage.batch * stage.length, **changed})
            place = Path(folder) / f"run-{next(runs)}"
            vocabulary = model.config.get_text_config().vocab_size
            data = RandomTokens(vocabulary, stage.length, document_mask=stage.document_mask)
            log = Path(folder) / "log.jsonl"
            return run_stage(
                model,
                timed,
                loss,
                data,
                title=kind,
                folder=place,
                log=log,
                device=device,
                seed=0,
                flops=flops,
                teacher=teacher,
            )

        run(warmup)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        figures = run(steps)
        memory = peak_memory() if device != "cpu" else None
        # the same kernels one by one: a recording would add those of its own calls
        table = _profiled(functools.partial(run, 2, cuda_graph=False), device) if profile else ""
    rate = stage.batch * stage.length / figures["step_seconds"]
    row = {
        "step": kind,
        "batch": stage.batch,
        "micro_batch": stage.micro_batch or stage.batch,
        "length": stage.length,
        "steps": steps,
        "milliseconds": 1000 * figures["step_seconds"],
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "share_of_peak": share_of_peak(rate, flops, device),
        "memory_bytes": memory,
    }
    return row, table


def prepared(
    config: Any,
    recipe: Recipe,
    stage: TrainStage,
    kind: str,
    device: str,
    *,
    own_teacher: bool | None = None,
    teacher_config: Any = None,
) -> tuple[Any, LossFunction, Any]:
    """A model of random weights on `device`, the loss of a stage, and its teacher where that is a model beside it.

    `kind` is "finetune" for the unswapped model; `own_teacher` says whether the teacher is the student's own weights,
    by default if they are frozen; `teacher_config` is that of another one.
    """
    amp = device != "cpu"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind == "finetune":
        return model.to(device), functools.partial(finetune_loss, amp=amp), None
    teacher = None
    own = own_teacher or (own_teacher is None and isinstance(stage, DistillStage) and stage.train in ("new", "lora"))
    if isinstance(stage, DistillStage) and stage.runs_teacher and not own:
        teacher = AutoModelForCausalLM.from_config(
            teacher_config or config, dtype=torch.bfloat16 if amp else torch.float32
        )
        teacher = teacher.to(device).eval().requires_grad_(False)
    apply_(model, plan(model.config, recipe.convert))
    if stage.train == "lora":
        inject_(model, stage, key=kind)
    model.to(device).eval()  # with dropout the same tokens would give other logits each time
    if isinstance(stage, DistillStage):
        return model, functools.partial(distill_loss, stage=stage, teacher=teacher, amp=amp), teacher
    assert isinstance(stage, AlignStage)
    return model, align_function(stage, amp=amp), None


def peak_memory() -> int:
    """Bytes that training needs on the GPU: what a recorded step works in counts as reserved, not as allocated."""
    return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())


def _profiled(run: Any, device: str) -> str:
    from torch.profiler import ProfilerActivity, profile

    cuda = device != "cpu"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        run()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    averages = recorded.key_averages()
    return str(averages.table(sort_by=order, row_limit=_TOP_KERNELS, max_name_column_width=80))
