"""One trained stage on `transformers.Trainer`: our loss, our parameter groups, one progress line, a log in JSONL."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .attention import swaps
from .errors import TrainingError
from .recipe import AlignStage, TrainStage

SAVE_SECONDS = 300  # an interrupted run loses at most this much work
LossFunction = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def trainable_parameters(model: nn.Module, stage: TrainStage) -> tuple[list[str], list[str]]:
    """Mark what a stage trains; returns the names of the new and of the teacher's own trainable parameters.

    `new` is every parameter of the swaps, but slopes that are not learnable; `attention` adds the rest of the
    attention modules that were swapped; `all` everything.
    """
    owners = {name.split(".swap.")[0] + "." for name, _ in model.named_parameters() if ".swap." in name}
    fixed = {f"{path}.swap.log_slope" for path, swap in swaps(model).items() if not swap.learnable_decay}
    new, own = [], []
    for name, parameter in model.named_parameters():
        if ".swap." in name:
            parameter.requires_grad_(name not in fixed)
            if name not in fixed:
                new.append(name)
            continue
        wanted = stage.train == "all" or (stage.train == "attention" and any(name.startswith(o) for o in owners))
        parameter.requires_grad_(wanted)
        if wanted:
            own.append(name)
    return new, own


def build_optimizer(model: nn.Module, stage: TrainStage, new: list[str], own: list[str]) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with one learning rate for new and one for the teacher's own parameters."""
    parameters = dict(model.named_parameters())
    groups = [{"params": [parameters[n] for n in new], "lr": stage.learning_rate}]
    if own:
        groups.append({"params": [parameters[n] for n in own], "lr": stage.backbone_learning_rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=stage.weight_decay)


def build_scheduler(optimizer: torch.optim.Optimizer, stage: TrainStage) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to `final_learning_rate` of the peak."""
    steps, warmup, final = stage.steps, max(1, round(stage.warmup * stage.steps)), stage.final_learning_rate

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class StageProgress(TrainerCallback):  # type: ignore[misc]
    """One line on stderr (stage, step, loss, tokens/s, time left), a JSONL log, and saves by the clock."""

    def __init__(self, title: str, stage: TrainStage, log: Path, run: str) -> None:
        """`run` tells stages of the same kind apart in the log."""
        self.title, self.log, self.run = title, log, run
        self.tokens_per_step = stage.batch * stage.length
        self.bar: Any = None
        self.trainer: StageTrainer | None = None
        self.saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the line; a resumed run starts where it was."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", file=sys.stderr)
        self.started, self.first = time.monotonic(), state.global_step
        done = [record for record in self.history() if record["step"] <= self.first]
        self.before = done[-1]["seconds"] if done else 0.0

    def history(self) -> list[dict[str, Any]]:
        """The stage's log by step; steps that a resumed run repeated count once, the later time."""
        if not self.log.is_file():
            return []
        records = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        steps = {record["step"]: record for record in records if record["run"] == self.run}
        return [steps[step] for step in sorted(steps)]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a non-finite loss changes any weight."""
        assert self.trainer is not None
        if not math.isfinite(self.trainer.step_loss()):
            raise TrainingError(
                f"{self.title}: the loss is not finite at step {state.global_step + 1}; no weight was changed by it. "
                "Lower the learning rate (--set distill.stages.STAGE.learning_rate=...)"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show and log the step; ask for a save when the last is long ago."""
        assert self.trainer is not None
        loss = self.trainer.take_loss()
        seconds = time.monotonic() - self.started
        rate = (state.global_step - self.first) * self.tokens_per_step / max(seconds, 1e-9)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(1)
        record = {
            "stage": self.title,
            "run": self.run,
            "step": state.global_step,
            "loss": loss,
            "seconds": round(self.before + seconds, 3),
            "tokens_per_second": round(rate, 1),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if time.monotonic() - self.saved > SAVE_SECONDS and state.global_step < state.max_steps:
            self.saved = time.monotonic()
            control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the line."""
        self.bar.close()


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is ours and is a mean, so that it is divided by the accumulation steps."""

    # The Trainer divides a loss by the accumulation steps unless it believes that the model has scaled it, which it
    # would for a batch with labels. Ours have none; said outright (5.23 here, 5.17 below) it does not hang on that.
    loss_is_scaled_for_ga = False

    def __init__(self, loss_function: LossFunction, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False
        self.loss_function = loss_function
        self._losses: list[torch.Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one micro-batch, without dropout: the teacher may be the model itself."""
        _without_dropout(self.accelerator.unwrap_model(model))
        loss = self.loss_function(self.accelerator.unwrap_model(model), inputs["input_ids"])
        self._losses.append(loss.detach())
        return (loss, None) if return_outputs else loss

    def step_loss(self) -> float:
        """Mean loss of the micro-batches since the last optimiser step."""
        return float(torch.stack(self._losses).mean())

    def take_loss(self) -> float:
        """The same, and start anew."""
        loss = self.step_loss()
        self._losses.clear()
        return loss


def _last_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint that is whole: its state is what the Trainer writes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _without_dropout(model: nn.Module) -> None:
    """Eval mode, except for layers that compute their activations again: they do so in training mode only."""
    model.eval()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def run_stage(
    model: Any,
    stage: TrainStage,
    loss_function: LossFunction,
    dataset: Any,
    *,
    title: str,
    folder: Path,
    log: Path,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Train one stage in place, resuming from the newest Trainer checkpoint in `folder` if there is one.

    Args:
        model: converted model in fp32, on any device; it ends on `device`.
        stage: budget, batch and learning rates.
        loss_function: (model, ids `[B, T]`) -> scalar, a mean over tokens or layers.
        dataset: yields {"input_ids": LongTensor[T]} without end.
        title: shown before the progress bar.
        folder: for Trainer checkpoints of this stage.
        log: JSONL file, appended to.
        device: "cpu" or "cuda".
        seed: of the Trainer.

    Returns:
        Tokens, steps, seconds, tokens/s, first and last loss (means over a tenth of the steps), trained names.

    Raises:
        TrainingError: nothing to train, a non-finite loss, or out of memory.
    """
    new, own = trainable_parameters(model, stage)
    if not new and not own:
        raise TrainingError(f"{title}: nothing is trainable")
    micro = stage.micro_batch or stage.batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch // micro,
        max_steps=stage.steps,
        max_grad_norm=stage.max_grad_norm,
        # align's loss is computed inside the layers, which the Trainer must not run a second time
        gradient_checkpointing=stage.gradient_checkpointing and not isinstance(stage, AlignStage),
        save_strategy="no",
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
    )
    _ = arguments.device  # sets the next line's count to all visible GPUs, which would multiply the batch
    arguments._n_gpu = 1
    progress = StageProgress(title, stage, log, run=folder.name)
    optimizer = build_optimizer(model, stage, new, own)
    trainer = StageTrainer(
        loss_function,
        model=model,
        args=arguments,
        train_dataset=dataset,
        callbacks=[progress],
        optimizers=(optimizer, build_scheduler(optimizer, stage)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    progress.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{title}: out of memory; lower distill.stages.{title}.micro_batch (now {micro})"
        ) from error
    history = progress.history()
    losses = [record["loss"] for record in history]
    tenth = max(1, len(losses) // 10)
    tokens, seconds = stage.steps * stage.batch * stage.length, history[-1]["seconds"]
    return {
        "stage": title,
        "tokens": tokens,
        "steps": stage.steps,
        "seconds": seconds,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "trained": [*new, *own],
    }
