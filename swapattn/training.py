"""One trained stage on `transformers.Trainer`: our loss, our parameter groups, one progress line, a log in JSONL."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import processes
from .compilation import compiled_layers
from .errors import SwapattnError, TrainingError, UsageError
from .objectives import trained_branches
from .optimizer import build_optimizer, build_scheduler, trainable_parameters
from .progress import StageProgress, StepFigures
from .replay import Inputs, Replay
from .reporting import Reporting
from .sharding import as_shard_of, gathered, is_sharded, shard_, shard_frozen_, whole, whole_state_
from .stages import AlignStage, CalibrateStage, DistillStage, TrainStage, stage_title
from .stopping import deferring

_WEIGHTS = "trained.safetensors"
LossFunction = Callable[..., torch.Tensor]


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is ours and is a mean, so that it is divided by the accumulation steps."""

    # The Trainer divides a loss by the accumulation steps unless it believes that the model has scaled it, which it
    # would for a batch with labels. Ours have none; said outright (5.23 here, 5.17 below) it does not hang on that.
    loss_is_scaled_for_ga = False

    def __init__(self, loss_function: LossFunction, *, replayed: bool = False, **kwargs: Any) -> None:
        """`replayed`: forward and backward pass of a micro-batch are a CUDA graph, see `replay`."""
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False
        if is_sharded(self.model):  # its parameters meet by themselves: no DDP around it
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.loss_function = loss_function
        self.waiting: list[StepFigures] = []
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | None = None
        self.replay = Replay(self._micro_batch, list(self.model.parameters())) if replayed else None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's, or the same by a replay."""
        if self.replay is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        loss: torch.Tensor = self.replay(self._prepare_inputs(inputs))
        self._losses.append(loss)
        return loss / int(self.args.gradient_accumulation_steps)

    def _micro_batch(self, inputs: Inputs) -> torch.Tensor:
        """Forward and backward pass as in one process, as kernels alone: what `Replay` records."""
        loss = self._loss_of(self.model, inputs)
        (loss / self.args.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one micro-batch, kept for `record_step`."""
        loss = self._loss_of(model, inputs)
        self._losses.append(loss.detach())
        return (loss, None) if return_outputs else loss

    def _loss_of(self, model: Any, inputs: Inputs) -> torch.Tensor:
        """The stage's loss of one micro-batch, without dropout: the teacher may be the model itself."""
        inner = self.accelerator.unwrap_model(model)
        _without_dropout(inner)
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        return _through(model, inner, self.loss_function, inputs["input_ids"], **others)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._norm = torch.as_tensor(norm).detach()
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's; one that cannot be written stops the stage, and the last one stays."""
        step = self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save makes a full disk a RuntimeError
            folder = Path(self.args.output_dir)
            free = shutil.disk_usage(folder).free if folder.is_dir() else 0
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            last = _last_checkpoint(folder)
            kept = (
                f"that of step {last.rpartition('-')[2]} is kept" if last else "there is no earlier one in this stage"
            )
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {folder} ({reason}; "
                f"{free / 2**20:,.1f} MiB were free there); {kept}: free some space and repeat the command"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What the stage trains, and nothing else: the rest is in the checkpoint that the run started from."""
        trained = gathered((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained, Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad(), safe_open(Path(resume_from_checkpoint) / _WEIGHTS, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - no mapping
                parameters[name].copy_(as_shard_of(parameters[name], saved.get_tensor(name)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model) and not self.args.should_save:
            self.optimizer.state_dict()  # the first process needs everybody's share
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does, but through the CPU: a GPU may have no room for the whole of what it has a share of."""
        if checkpoint is not None:
            for name, part in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
                state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)
                part.load_state_dict(state)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every process writes, before the first one declares the checkpoint whole."""
        super()._save_rng_state(output_dir)
        processes.from_first(None)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not the Trainer's count, which walks over all parameters in every micro-batch; see `peak`."""
        return 0

    def record_step(self, step: int) -> None:
        """Queue mean loss and gradient norm since the last step; a fused optimiser leaves out one that is not finite.

        It does so on the device (as under a gradient scaler), so that nobody has to wait for the verdict.
        """
        loss = processes.mean(torch.stack(self._losses).mean())
        self._losses.clear()
        norm = loss.new_zeros(()) if self._norm is None else whole(self._norm)
        figures = torch.stack((loss, norm.to(loss)))
        if figures.is_cuda:
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            optimizer.found_inf = (~figures.isfinite().all()).float()
        self.waiting.append(StepFigures(step, figures, self.optimizer.param_groups[0]["lr"]))


def _last_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint that is whole: its state is what the Trainer writes last."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(OSError, ValueError):
            json.loads(state.read_text(encoding="utf-8"))
            whole.append(state.parent)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _through(
    wrapper: nn.Module, inner: Any, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`function(inner, ...)` as the forward pass of the wrapper, whose hooks make gradients meet (DDP, FSDP).

    The way of Lightning Fabric's `_ForwardRedirection`: the wrapper's forward calls the inner model's, once replaced.
    A sharded model is its own wrapper.
    """
    if wrapper is inner and not is_sharded(inner):
        return function(inner, *args, **kwargs)

    def once(*given: Any, **named: Any) -> torch.Tensor:
        del inner.forward
        return function(inner, *given, **named)

    inner.forward = once
    result: torch.Tensor = wrapper(*args, **kwargs)
    return result


def _without_dropout(model: nn.Module) -> None:
    """Eval mode, except for layers that compute their activations again: they do so in training mode only."""
    model.eval()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def _recordable(stage: TrainStage, device: str) -> bool:
    """Whether a step is kernels of one GPU: recomputing sets the host's random state, documents differ in number."""
    alone = device != "cpu" and processes.count() == 1
    return stage.cuda_graph and alone and not stage.gradient_checkpointing and not stage.document_mask


def shares(stage: TrainStage, key: str, count: int) -> tuple[int, int]:
    """Windows a forward pass and forward passes a step in each of `count` processes; the step's batch stays whole.

    `key` is the stage's in `--set distill.stages.KEY`.

    Raises:
        UsageError: the batch cannot be shared out.
    """
    own, rest = divmod(stage.batch, count)
    if rest or not own:
        raise UsageError(
            f"{key}: batch {stage.batch} cannot be shared out among {count} processes: choose a multiple of {count} "
            f"(--set distill.stages.{key}.batch=...)"
        )
    micro = max(size for size in range(1, own + 1) if own % size == 0 and size <= (stage.micro_batch or own))
    return micro, own // micro


def out_of_memory(
    error: BaseException, title: str, key: str, stage: TrainStage | CalibrateStage, *, replayed: bool = False
) -> TrainingError | None:
    """The line for a stage that ran out of memory, with the settings that help most first; None for other errors."""
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
        return None
    place = f"{title}: out of memory; under distill.stages.{key}"
    if isinstance(stage, CalibrateStage):
        return TrainingError(f"{place}: lower length (now {stage.length})")
    micro, _ = shares(stage, key, processes.count())
    ways = [f"lower micro_batch (now {micro})"] if micro > 1 else []
    if not stage.gradient_checkpointing:
        ways.append("set gradient_checkpointing: true" + (" and compile: false" if stage.compile else ""))
    if replayed:  # a recording keeps what it works in to itself
        ways.append("set cuda_graph: false")
    if isinstance(stage, DistillStage):
        ways.append(f"lower chunk (now {stage.chunk or 'chosen by itself'})")
    ways.append(f"lower length (now {stage.length})")
    return TrainingError(f"{place}: {', or '.join(ways)}; what is done so far is kept")


def of_worker(error: SwapattnError) -> SwapattnError:
    """The error as it was raised: from a process of the data loader it comes with the traceback as its message."""
    kind, told = type(error), str(error)
    if "Traceback (most recent call last)" not in told:
        return error
    return kind(told.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


def _arguments(
    stage: TrainStage, key: str, folder: Path, *, device: str, seed: int, reporting: Reporting
) -> TrainingArguments:
    """The Trainer's settings for a stage: what it would do beside training is left to `StageProgress`."""
    micro, accumulated = shares(stage, key, processes.count())
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        max_steps=stage.steps,
        max_grad_norm=stage.max_grad_norm,
        # align's loss is computed inside the layers, which the Trainer must not run a second time; named only where
        # it is wanted, since transformers 5.24 warns of the name
        **(
            {"gradient_checkpointing": True}
            if stage.gradient_checkpointing and not isinstance(stage, AlignStage)
            else {}
        ),
        save_strategy="no",
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for the device in every micro-batch
        report_to=list(reporting.tools),
        run_name=reporting.name(folder.name),
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        accelerator_config={"dispatch_batches": False},  # every process reads its own share, none waits for another's
        dataloader_num_workers=int(device != "cpu"),  # one process tokenises while this one feeds the GPU
        ddp_find_unused_parameters=True,  # a swap may leave some of a family's own unused, such as sinks
    )
    _ = arguments.device  # sets the next line's count to all visible GPUs, which would multiply the batch
    arguments._n_gpu = 1
    return arguments


def _figures(title: str, stage: TrainStage, progress: StageProgress, ready: float | None) -> dict[str, Any]:
    """What `run_stage` returns of a stage that has run; `ready`: when its recording was, None without one."""
    history = processes.from_first(progress.history())
    losses = [record["loss"] for record in history]
    tenth = max(1, len(losses) // 10)
    tokens, seconds = stage.spent, history[-1]["seconds"]
    ready = progress.started if ready is None else ready
    return {
        "stage": title,
        "tokens": tokens,
        "steps": stage.steps,
        "seconds": seconds,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "step_seconds": (progress.ended - ready) / max(1, stage.steps - progress.first),
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
    }


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
    key: str | None = None,
    flops: float | None = None,
    teacher: Any | None = None,
    save_steps: int | None = None,
    reporting: Reporting | None = None,
) -> dict[str, Any]:
    """Train one stage in place, resuming from the newest Trainer checkpoint in `folder` if there is one.

    Args:
        model: converted model in fp32, on any device; it ends on `device`, sharded where the launcher asks for it.
        stage: budget, batch and learning rates.
        loss_function: (model, ids `[B, T]`) -> scalar, a mean over tokens or layers; whatever else the dataset yields
            comes by its name.
        dataset: yields {"input_ids": LongTensor[T]} without end, with "position_ids" where documents are kept apart.
        title: shown before the progress bar.
        folder: for Trainer checkpoints of this stage.
        log: JSONL file, appended to.
        device: "cpu" or "cuda".
        seed: of the Trainer.
        key: of the stage in `--set distill.stages.KEY`, for messages; default the title.
        flops: of a step per token, to show the share of peak; None if not known.
        teacher: a separate model that the loss function calls, to be sharded and compiled like the other.
        save_steps: optimiser steps between Trainer checkpoints, besides those by the clock.
        reporting: where figures go besides the log.

    Returns:
        Tokens, steps, seconds, tokens/s, seconds of a step without the recording, first and last loss (means over a
        tenth of the steps), trained names.

    Raises:
        TrainingError: nothing to train, a non-finite loss, out of memory, no room for a checkpoint, or SIGTERM or
            Ctrl-C, after a save.
        UsageError: the batch cannot be shared out among the processes.
    """
    key = key or title
    new, own = trainable_parameters(model, stage, key)
    if not new and not own:
        raise TrainingError(f"{title}: nothing is trainable")
    reporting = reporting or Reporting()
    arguments = _arguments(stage, key, folder, device=device, seed=seed, reporting=reporting)
    progress = StageProgress(title, stage, log, run=folder.name, key=key, flops=flops, save_steps=save_steps)
    # before the optimiser is chosen, which is fused on a GPU
    if processes.sharded():
        shard_(model, device, swaps=isinstance(stage, AlignStage))
        if teacher is not None:
            shard_frozen_(teacher, device)
    model.to(device)
    optimizer = build_optimizer(model, stage, new, own)
    if is_sharded(model):
        whole_state_(optimizer)
    with reporting.open(folder.name):
        trainer = StageTrainer(
            loss_function,
            replayed=_recordable(stage, device),
            model=model,
            args=arguments,
            train_dataset=dataset,
            callbacks=[progress],
            optimizers=(optimizer, build_scheduler(optimizer, stage)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        progress.trainer = trainer
        compiled = [model] if teacher is None else [model, teacher]
        try:
            compiling = compiled_layers(*compiled) if stage.compile else contextlib.nullcontext()
            with deferring(), trained_branches(model, stage), compiling:
                trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        except SwapattnError as error:
            raise of_worker(error) from error
        except (RuntimeError, MemoryError) as error:
            line = out_of_memory(error, stage_title(title, key), key, stage, replayed=trainer.replay is not None)
            if line is None:
                raise
            raise line from error
        finally:
            progress.close()  # an error starts a line of its own
            if trainer.replay is not None:
                trainer.replay.release()
    ready = trainer.replay.ready if trainer.replay is not None else None
    return {**_figures(title, stage, progress, ready), "trained": [*new, *own]}
