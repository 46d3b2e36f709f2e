"""`distill --dry-run`: what every stage would take on the present hardware, from steps that are really run.

Weights and tokens are random, as in `throughput`: neither speed nor memory depends on them. Timed are steps of one
micro-batch; of the many steps of a stage no more than a few seconds' worth.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import processes
from .calibration import BATCH_TOKENS, calibrate_stage
from .environment import say
from .logits import LogitWindows
from .lora import inject_
from .losses import chunk_tokens
from .objectives import check_stages, stage_flops
from .optimizer import trainable_parameters
from .recipe import Recipe
from .stages import AlignStage, CalibrateStage, DistillStage, Stage, TrainStage, stage_title
from .surgery import apply_, plan
from .throughput import RandomTokens, peak_memory, prepared
from .training import LossFunction, run_stage, shares

CPU_TOKENS = 1024  # a timed step on a CPU; on a GPU it has the stage's own micro-batch
_STEPS = {"cpu": (1, 2), "cuda": (3, 6)}  # before the clock runs (kernels are compiled), and timed
_LOGITS_ON_CPU = 6  # fp32 tensors `[chunk, V]` at a time, see `losses.linear_loss`


def estimate(
    config: Any, recipe: Recipe, stage: Stage, device: str, *, key: str, own_teacher: bool, teacher: Any = None
) -> dict[str, Any]:
    """Figures of one stage of a recipe.

    Args:
        config: of the teacher.
        recipe: its convert section says what is swapped.
        stage: calibrate, align or distill.
        device: "cpu" or "cuda".
        key: of the stage in `--set distill.stages.KEY`, for messages.
        own_teacher: the teacher is the student's own weights, not a model beside it.

    Returns:
        stage, key, tokens, steps, trainable_parameters, memory_bytes (measured on a GPU; on a CPU weights, gradients,
        optimiser and what the backward pass keeps of a micro-batch), tokens_per_second, hours, measured (steps, batch,
        length, seconds); the last three None where the weights alone do not fit.

    Raises:
        TrainingError: out of memory, with the setting to lower.
        UnsupportedModelError: the model cannot do what the stage asks.
    """
    found: dict[str, Any] = {"stage": stage.stage, "key": key, "tokens": stage.spent}
    names: list[str] = []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        apply_(model, plan(model.config, recipe.convert))
    if not isinstance(stage, CalibrateStage):
        found["steps"] = stage.steps
        if stage.train == "lora":
            inject_(model, stage, key=key)
        names = [name for group in trainable_parameters(model, stage, key) for name in group]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found["trainable_parameters"] = sum(sizes[name] for name in names)
    # fp32 weights; of what is trained also gradient and Adam's two moments
    found["memory_bytes"] = 4 * sum(sizes.values()) + 12 * found["trainable_parameters"]
    if isinstance(stage, DistillStage) and stage.runs_teacher and not own_teacher:
        with torch.device("meta"):
            beside = AutoModelForCausalLM.from_config(teacher or config)
        found["memory_bytes"] += (4 if device == "cpu" else 2) * sum(p.numel() for p in beside.parameters())
    if processes.sharded() and not isinstance(stage, CalibrateStage):
        found["memory_bytes"] //= processes.count()
    found |= {"tokens_per_second": None, "hours": None, "measured": None}
    if found["memory_bytes"] > _free_bytes(device):
        return found
    if isinstance(stage, CalibrateStage):
        return found | _calibrate(config, recipe, stage, device)
    return found | _train(config, recipe, stage, device, key, found["memory_bytes"], own_teacher, teacher)


def _free_bytes(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 1 << 62)


def _calibrate(config: Any, recipe: Recipe, stage: CalibrateStage, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    apply_(model, plan(model.config, recipe.convert))
    model.to(device)
    tokens = min(stage.tokens, max(stage.length, CPU_TOKENS if device == "cpu" else BATCH_TOKENS))
    say(f"measuring calibrate on {tokens} random tokens")
    data = RandomTokens(model.config.get_text_config().vocab_size, stage.length)
    _reset_peak(device)
    figures = calibrate_stage(model, stage.model_copy(update={"tokens": tokens}), data)
    passes = 2 if stage.tokens > max(BATCH_TOKENS, stage.length) else 1  # see `calibration`
    rate = figures["tokens_per_second"] / passes
    peak = {"memory_bytes": torch.cuda.max_memory_allocated()} if device != "cpu" else {}
    return peak | _figures(stage, rate, 1, max(1, tokens // stage.length), figures["seconds"])


def _train(
    config: Any,
    recipe: Recipe,
    stage: AlignStage | DistillStage,
    device: str,
    key: str,
    fixed: int,
    own_teacher: bool,
    teacher_config: Any,
) -> dict[str, Any]:
    count = processes.count()
    micro, _ = shares(stage, key, count)
    windows = min(micro, max(1, CPU_TOKENS // stage.length)) if device == "cpu" else micro
    batch = windows * count
    warmup, steps = _STEPS[device]
    model, loss, teacher = prepared(
        config, recipe, stage, stage.stage, device, own_teacher=own_teacher, teacher_config=teacher_config
    )
    check_stages(model, [stage])
    flops = stage_flops(model, stage, teacher)
    vocabulary = model.config.get_text_config().vocab_size
    data: Any = RandomTokens(vocabulary, stage.length, document_mask=stage.document_mask)
    if isinstance(stage, DistillStage) and stage.teacher is not None:
        data = LogitWindows(Path(stage.teacher.logits))
    kept = _Kept(model, loss)
    say(
        f"measuring {stage_title(stage.stage, key)}: {warmup} + {steps} steps of {batch} x {stage.length} random tokens"
    )
    with tempfile.TemporaryDirectory() as place:

        def run(steps: int, function: LossFunction) -> dict[str, Any]:
            folder = Path(place) / str(steps)
            settings = {"batch": batch, "micro_batch": windows, "tokens": steps * batch * stage.length}
            return run_stage(
                model,
                stage.model_copy(update=settings),
                function,
                data,
                title=stage.stage,
                key=key,
                folder=folder,
                log=Path(place) / "log.jsonl",
                device=device,
                seed=0,
                flops=flops,
                teacher=teacher,
            )

        run(warmup, kept if device == "cpu" else loss)
        _reset_peak(device)
        figures = run(steps, loss)
    if device == "cpu":
        memory = fixed + kept.bytes * micro // windows + _logit_bytes(model, stage, micro)
    else:
        memory = peak_memory()
    rate, seconds = batch * stage.length / figures["step_seconds"], figures["seconds"]
    return {"memory_bytes": memory, **_figures(stage, rate, steps, batch, seconds)}


def _figures(stage: Stage, rate: float, steps: int, batch: int, seconds: float) -> dict[str, Any]:
    measured = {"steps": steps, "batch": batch, "length": stage.length, "seconds": round(seconds, 2)}
    return {"tokens_per_second": round(rate, 1), "hours": stage.spent / max(rate, 1e-9) / 3600, "measured": measured}


def _logit_bytes(model: Any, stage: TrainStage, windows: int) -> int:
    if not isinstance(stage, DistillStage):
        return 0
    vocabulary = int(model.config.get_text_config().vocab_size)
    chunk = stage.chunk or chunk_tokens(vocabulary, torch.float32, torch.device("cpu"))
    return _LOGITS_ON_CPU * 4 * vocabulary * min(chunk, windows * stage.length)


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


class _Kept:
    """A loss function that counts what its last call kept for the backward pass, weights left out."""

    def __init__(self, model: torch.nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        self.loss, self.bytes = loss, 0
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        saved: list[weakref.ref[torch.Tensor]] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(weakref.ref(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(model, *args, **kwargs)
        # a graph inside of the loss (see `losses.linear_loss`) is gone by now, and its memory may be another's
        kept = [tensor.untyped_storage() for reference in saved if (tensor := reference()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
        self.bytes = sum(size for place, size in sizes.items() if place not in self.own)
        return loss


def table(stages: tuple[dict[str, Any], ...]) -> list[str]:
    """The stages as lines of text, with the sum of the hours and what was measured."""
    lines = [f"{'stage':<14}{'tokens':>14}{'steps':>8}{'trainable':>14}{'memory':>11}{'tokens/s':>12}{'hours':>9}"]
    titles = [stage_title(row["stage"], row["key"]) for row in stages]
    for title, row in zip(titles, stages, strict=True):
        steps, rate, hours = row.get("steps"), row["tokens_per_second"], row["hours"]
        lines.append(
            f"{title:<14}{row['tokens']:>14,}{'-' if steps is None else f'{steps:,}':>8}"
            f"{row['trainable_parameters']:>14,}{row['memory_bytes'] / 2**30:>7.1f} GiB"
            f"{'-' if rate is None else f'{rate:,.0f}':>12}{'-' if hours is None else f'{hours:.3f}':>9}"
        )
    if all(row["hours"] is not None for row in stages):
        lines.append(f"{'in all':<73}{sum(row['hours'] for row in stages):>9.3f}")
    lines.append("")
    for title, row in zip(titles, stages, strict=True):
        if row["measured"] is None:
            lines.append(f"{title}: not measured, its weights do not fit into what memory is free here")
        else:
            measured = row["measured"]
            shape = f"{measured['batch']} x {measured['length']}"
            lines.append(f"{title}: measured {measured['steps']} step(s) of {shape} in {measured['seconds']} s")
    return lines
