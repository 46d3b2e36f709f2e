"""What a trained stage shows and keeps of its steps: one progress line, a log in JSONL, saves by the clock."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from . import processes
from .environment import is_first_process
from .errors import TrainingError
from .peak import share_of_peak
from .stages import TrainStage, stage_title
from .stopping import STOP

SAVE_SECONDS = 300  # an interrupted run loses at most this much work


class StepFigures:
    """Loss and gradient norm of one optimiser step, on their way from the device without holding it up; its rate."""

    def __init__(self, step: int, figures: torch.Tensor, rate: float) -> None:
        self.step, self.rate = step, rate
        self.event: torch.cuda.Event | None = None
        self.figures = figures
        if figures.is_cuda:
            self.figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self.figures.copy_(figures, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def read(self) -> tuple[float, float]:
        """Loss and norm; waits until the device has come to them."""
        if self.event is not None:
            self.event.synchronize()
        loss, norm = self.figures.tolist()
        return loss, norm


class StageProgress(TrainerCallback):  # type: ignore[misc]
    """One line on stderr (stage, step, loss, tokens/s, time left), a JSONL log, and saves by the clock."""

    def __init__(
        self,
        title: str,
        stage: TrainStage,
        log: Path,
        run: str,
        key: str,
        flops: float | None = None,
        save_steps: int | None = None,
    ) -> None:
        """`run` tells stages of a kind apart in the log, `key` in `--set distill.stages.KEY`; `flops` are per token."""
        self.key, self.name = key, stage_title(title, key)
        self.title, self.log, self.run, self.flops, self.save_steps = title, log, run, flops, save_steps
        self.tokens_per_step = stage.batch * stage.length
        self.bar: Any = None
        self.trainer: Any = None  # a `training.StageTrainer`, made after this
        self.saved = time.monotonic()
        self.agreement = processes.Agreement()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the line; a resumed run starts where it was, and so does its log."""
        quiet = not is_first_process()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            file=sys.stderr,
            disable=quiet,
        )
        self.started, self.first = time.monotonic(), state.global_step
        self.ended = self.started
        if not quiet:
            cut_log(self.log, self.run, self.first)
        done = self.history()
        self.before = done[-1]["seconds"] if done else 0.0

    def history(self) -> list[dict[str, Any]]:
        """The stage's log, by step."""
        return [record for record in _records(self.log) if record["run"] == self.run]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A loss or gradient that is not finite changes no weight; on a CPU it is known at once and stops."""
        self.trainer.record_step(state.global_step + 1)
        if immediate(args.device):
            self.check(self.trainer.waiting)

    def check(self, steps: list[StepFigures]) -> None:
        """Raise TrainingError if one of the steps was not finite."""
        for figures in steps:
            loss, norm = figures.read()
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise TrainingError(
                    f"{self.name}: the {what} is not finite at step {figures.step}; no weight was changed by it. "
                    f"Lower the learning rate (--set distill.stages.{self.key}.learning_rate=...) and repeat the "
                    "command with --overwrite: this stage begins anew, those before it are kept"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show and log what is known; ask for a save when the last is long ago.

        On a GPU the figures come one step late, so that the next step is launched before this one has finished.
        """
        step, last = state.global_step, state.global_step == state.max_steps
        due = self.save_steps is not None and step % self.save_steps == 0
        late_save = time.monotonic() - self.saved > SAVE_SECONDS
        self.stopped, save = self.agreement.any(STOP.asked, STOP.asked or due or late_save)
        if save and not last:
            self.saved = time.monotonic()
            control.should_save = True
        late = 0 if last or control.should_save or immediate(args.device) else 1
        while len(self.trainer.waiting) > late:
            self._log(self.trainer.waiting[0])
            del self.trainer.waiting[0]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the save that was asked for, end."""
        if self.stopped:
            raise TrainingError(
                f"{self.name}: stopped by {STOP.by}, saved after step {state.global_step} of {state.max_steps}; "
                "repeat the command to go on"
            )

    def _log(self, figures: StepFigures) -> None:
        self.check([figures])
        loss, norm = figures.read()
        self.ended = time.monotonic()
        seconds = self.ended - self.started
        rate = (figures.step - self.first) * self.tokens_per_step / max(seconds, 1e-9)
        record = {
            "stage": self.title,
            "run": self.run,
            "step": figures.step,
            "loss": loss,
            "seconds": round(self.before + seconds, 3),
            "tokens_per_second": round(rate, 1),
        }
        share = share_of_peak(rate / processes.count(), self.flops, str(self.trainer.args.device))
        if share is not None:
            record["share_of_peak"] = round(share, 4)
        peak = f", {share:.1%} of peak" if share is not None else ""
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s{peak}", refresh=False)
        self.bar.update(1)
        if self.trainer.args.report_to:
            values = {"loss": loss, "grad_norm": norm, "learning_rate": figures.rate, "tokens_per_second": rate}
            self._report(figures.step, values)
        if is_first_process():
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _report(self, step: int, figures: dict[str, float]) -> None:
        """Hand figures to the reporting callbacks under their own step, which on a GPU is the one before."""
        trainer = self.trainer
        now, trainer.state.global_step = trainer.state.global_step, step
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, figures)
        trainer.state.global_step = now

    def close(self) -> None:
        """Close the line."""
        if self.bar is not None:
            self.bar.close()


def cut_log(log: Path, run: str, step: int) -> None:
    """Drop a stage's steps behind the one that it goes on from: they are about to come again, or never."""
    if not log.is_file():
        return
    kept = [record for record in _records(log) if record["run"] != run or record["step"] <= step]
    scratch = log.with_name(f".{log.name}.writing")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(scratch, log)
    if not kept:
        log.unlink()  # nothing to draw


def _records(log: Path) -> list[dict[str, Any]]:
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError):  # a process was killed, or the disk full, in the middle of a line
            found.append(json.loads(line))
    return found


def immediate(device: torch.device) -> bool:
    """Whether a figure is there as soon as it is asked for; a GPU works behind the caller's back."""
    return device.type == "cpu"
