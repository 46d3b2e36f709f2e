"""`distill`: run a recipe's stages on a converted checkpoint and write the result as a new one."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import processes
from .calibration import calibrate_stage
from .checkpoint import LOG, RECORD, Checkpoint, atomic_folder, check_target, find, new_record, place_of, write_json
from .compilation import align_function
from .curves import CURVES, draw_curves
from .data import PackedTokens, borders
from .environment import default_device, hardware, is_first_process, say
from .errors import CheckpointError, RecipeError, TrainingError, UsageError
from .estimate import table
from .integrity import samples
from .loading import load, load_teacher
from .logits import LogitWindows, read_manifest, wanted_logits
from .lora import inject_, merge_
from .model_card import CARD, model_card
from .objectives import check_document_mask, check_stages, distill_loss, stage_flops
from .positions import positions_of
from .preparation import as_converted, check_names, check_request, estimates, own_teachers, with_convert_section
from .recipe import Recipe
from .reporting import Reporting
from .resumption import enter, new_state, write_state
from .sharding import gathered, is_sharded
from .shards import NEW_SHARD, decays, write_trained
from .stages import AlignStage, CalibrateStage, DistillStage, Stage, stage_keys, stage_title, text_of, written_logits
from .stopping import stopping_in_order
from .training import LossFunction, out_of_memory, run_stage

_COLUMNS = (("tokens", 12), ("steps", 8), ("seconds", 10), ("tokens_per_second", 11))


@dataclass(frozen=True)
class DistillResult:
    """What `distill` made, or with `dry_run` would make; one dict of figures per stage."""

    path: Path
    parent: Path
    teacher_note: str
    text: str
    device: str
    stages: tuple[dict[str, Any], ...]
    dry_run: bool = False
    taught_by: Path | None = None  # where it is not the parent's teacher

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        stages = [{k: v for k, v in stage.items() if k != "trained"} for stage in self.stages]
        return {
            "path": str(self.path),
            "parent": str(self.parent),
            "teacher_note": self.teacher_note,
            "taught_by": str(self.taught_by) if self.taught_by else None,
            "text": self.text,
            "device": self.device,
            "dry_run": self.dry_run,
            "stages": stages,
        }

    def to_table(self) -> str:
        """The same as a short text table."""
        note = f" ({self.teacher_note})" if self.teacher_note else ""
        teacher = f"teacher  {self.taught_by}" if self.taught_by else f"teacher of {self.parent}{note}"
        ends = ["", f"text     {self.text}", teacher]
        if self.dry_run:
            return "\n".join([*table(self.stages), *ends, f"would write {self.path}"])
        heads = "".join(f"{key.replace('_per_second', '/s'):>{width}}" for key, width in _COLUMNS)
        lines = [f"{'stage':<14}{heads}   loss"]
        kinds = [stage["stage"] for stage in self.stages]
        for index, stage in enumerate(self.stages):
            title = stage_title(stage["stage"], str(index) if kinds.count(stage["stage"]) > 1 else stage["stage"])
            loss = ""
            if stage.get("first_loss") is not None:
                loss = f"{stage['first_loss']:.4f} -> {stage['last_loss']:.4f}"
            elif "error_before" in stage:
                loss = f"layer error {stage['error_before']:.3f} -> {stage['error_after']:.3f}"
            cells = [_cell(stage.get(key), width) for key, width in _COLUMNS]
            lines.append(f"{title:<14}" + "".join(cells) + f"   {loss}")
        return "\n".join([*lines, *ends, f"wrote {self.path}"])


def _cell(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width},}"


def distill(
    checkpoint: str | Path | None = None,
    *,
    recipe: str | Recipe = "short",
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    teacher: str | Path | None = None,
    directory: str | Path = ".",
    report_to: Sequence[str] = (),
) -> DistillResult:
    """Train a converted checkpoint to answer as its teacher does.

    Args:
        checkpoint: folder; default the newest undistilled conversion in `directory`.
        recipe: name, YAML file or a `Recipe`; its distill section is run.
        output: default `NAME-swapattn-RECIPE` in `directory`.
        overrides: `KEY=VALUE` changes of the recipe.
        overwrite: replace an existing folder.
        dry_run: check everything, write nothing; run a few steps of each stage with random weights (`estimate`).
        device: default "cuda" if there is one, else "cpu".
        teacher: folder of another teacher than the recorded one.
        directory: where to look and to write.
        report_to: "tensorboard", "wandb", as far as installed; event files go to `runs/NAME` beside the output.

    Raises:
        UsageError, RecipeError, CheckpointError, SourceError, TrainingError: each says what to do.
    """
    start = find(directory, checkpoint, kind="converted" if checkpoint is None else None)
    resolved = as_converted(recipe, overrides, start)
    if not resolved.distill.stages:
        raise RecipeError(f"recipe {resolved.name} has no distill.stages")
    if checkpoint is None:
        say(f"checkpoint: {start.path} (the newest undistilled conversion here)")
    target = Path(output) if output is not None else Path(directory) / f"{start.name}-swapattn-{resolved.name}"
    check_target(target, overwrite=overwrite or dry_run)
    teacher_path = Path(teacher) if teacher is not None else start.teacher_path
    if target.resolve() in (start.path.resolve(), teacher_path.resolve()):
        raise UsageError(f"{target} is what the run starts from: choose another folder with -o")
    reporting = Reporting(tuple(report_to), target.parent / "runs" / target.name)
    reporting.check()
    device = device or default_device()
    check_request(resolved, start, teacher_path, device, named=teacher is not None, dry_run=dry_run)
    processes.join(device)
    if is_first_process():
        start = with_convert_section(start, resolved, overrides, Path(directory), dry_run, overwrite)
    start = processes.from_first(start)
    if dry_run:
        stages = estimates(start, resolved, device, teacher_path)
    else:
        with stopping_in_order():
            stages = tuple(_Run(start, resolved, target, device, teacher_path, reporting).run(overwrite))
    text, other = resolved.distill.describe_text(), teacher_path if _other(start, teacher_path) else None
    return DistillResult(target, start.path, start.teacher_note, text, device, stages, dry_run, other)


class _Run:
    """One distillation on disk: finished stages and Trainer checkpoints lie beside the target until it is whole."""

    def __init__(
        self, start: Checkpoint, recipe: Recipe, target: Path, device: str, teacher: Path, reporting: Reporting
    ) -> None:
        self.reporting = reporting
        self.start, self.recipe, self.target, self.device, self.teacher = start, recipe, target, device, teacher
        self.work = target.parent / f".{target.name}.run"
        self.keys = stage_keys(recipe.distill.stages)
        self.state = new_state(recipe, start, teacher)

    def run(self, overwrite: bool) -> list[dict[str, Any]]:
        model, tokenizer = load(self.start.path, dtype=torch.float32)
        if tokenizer is None:
            raise CheckpointError(f"{self.start.path} has no tokenizer, which distillation needs")
        known = model.get_input_embeddings().num_embeddings
        beyond = [token for tokens in borders(tokenizer) for token in tokens if token >= known]
        if beyond:
            raise CheckpointError(
                f"{self.start.path}: its tokenizer sets texts apart by token {beyond[0]}, and the model knows {known} "
                "tokens: name another one in its tokenizer_config.json"
            )
        check_names(self.recipe, model, self.start.path)
        if is_first_process():
            titles = [self._title(index) for index in range(len(self.keys))]
            self.state, held = enter(self.work, self.state, titles, overwrite=overwrite)
        self.state = processes.from_first(self.state)
        model = self._restored(model)
        check_stages(model, self.recipe.distill.stages[len(self.state["stages"]) :])
        for index, stage in enumerate(self.recipe.distill.stages):
            if index < len(self.state["stages"]):
                continue
            with self._told(index, stage):
                self.state["stages"].append(self._stage(index, stage, model, tokenizer))
                self._save(model, index)
            if is_sharded(model):
                del model
                gc.collect()  # modules and their hooks hold each other
                model = self._restored(load(self.start.path, dtype=torch.float32)[0])
        if is_first_process():
            self._write(model, overwrite)
            held.close()
            shutil.rmtree(self.work)
        processes.from_first(None)  # nobody leaves before the result is there
        return list(self.state["stages"])

    def _title(self, index: int) -> str:
        return stage_title(self.recipe.distill.stages[index].stage, self.keys[index])

    @contextlib.contextmanager
    def _told(self, index: int, stage: Stage) -> Iterator[None]:
        """Say what to do where memory or the disk is full, also beside the steps: the teacher, a calibration."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            line = out_of_memory(error, self._title(index), self.keys[index], stage)
            if line is None:
                raise
            raise line from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise TrainingError(
                f"{self._title(index)}: the disk of {self.work} is full: free some space and repeat the command; what "
                "was saved before is kept"
            ) from error

    def _stage(self, index: int, stage: Stage, model: Any, tokenizer: Any) -> dict[str, Any]:
        text, seed = text_of(stage, self.recipe.distill.text), self.recipe.distill.seed + index
        apart = not isinstance(stage, CalibrateStage) and stage.document_mask
        data: Any
        if written := written_logits(stage):
            data = LogitWindows(Path(written.logits))
        else:
            data = PackedTokens(text, tokenizer, stage.length, seed=seed, document_mask=apart)
        if isinstance(stage, CalibrateStage):
            model.to(self.device)
            figures = calibrate_stage(model, stage, data) if is_first_process() else None
            processes.copy_from_first_(p for name, p in model.named_parameters() if ".swap." in name)
            model.to("cpu" if processes.sharded() else self.device)
            return dict(processes.from_first(figures))
        loss: LossFunction
        teacher = None
        if isinstance(stage, AlignStage):
            loss = align_function(stage, amp=self.device != "cpu")
        else:
            loss, teacher = self._distill_loss(index, stage, model)
        if stage.train == "lora":
            inject_(model, stage, seed=seed)
        if apart and teacher is not None:
            check_document_mask(teacher)
        if stage.length > (known := positions_of(teacher or model)):
            say(f"{stage.stage}: windows of {stage.length} tokens, the teacher was made for {known}")
        figures = run_stage(
            model,
            stage,
            loss,
            data,
            title=stage.stage,
            key=self.keys[index],
            folder=self.work / f"stage-{index}",
            log=self.work / LOG,
            device=self.device,
            seed=self.recipe.distill.seed,
            flops=stage_flops(model, stage, teacher),
            teacher=teacher,
            save_steps=self.recipe.distill.save_steps,
            reporting=self.reporting,
        )
        figures["trained"] = [name for name in figures["trained"] if ".lora_" not in name] + merge_(model)
        return figures

    def _distill_loss(self, index: int, stage: DistillStage, model: Any) -> tuple[LossFunction, Any | None]:
        """The teacher is the student itself where it can be, else a separate model, if any."""
        own = own_teachers(self.recipe, self.start, self.teacher)[index]
        if own or not stage.runs_teacher:
            return functools.partial(distill_loss, stage=stage, teacher=None, amp=self.device != "cpu"), None
        dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
        teacher, _ = load_teacher(self.teacher, device=None if processes.sharded() else self.device, dtype=dtype)
        teacher.requires_grad_(False)
        return functools.partial(distill_loss, stage=stage, teacher=teacher, amp=self.device != "cpu"), teacher

    def _trained(self) -> set[str]:
        return {name for stage in self.state["stages"] for name in stage.get("trained", ())}

    def _save(self, model: Any, index: int) -> None:
        trained = self._trained()
        state = gathered((name, p) for name, p in model.named_parameters() if name in trained)
        if is_first_process():
            save_file(state, self._saved(index))
            write_state(self.work, self.state)
            if index:
                self._saved(index - 1).unlink(missing_ok=True)
            shutil.rmtree(self.work / f"stage-{index}", ignore_errors=True)
        processes.from_first(None)  # the others may read it next

    def _saved(self, index: int) -> Path:
        return self.work / f"stage-{index}.safetensors"

    def _restored(self, model: Any) -> Any:
        """The model as the finished stages left it; one that is to be sharded stays on the CPU so far."""
        if self.state["stages"]:
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, tensor in load_file(self._saved(len(self.state["stages"]) - 1)).items():
                    parameters[name].copy_(tensor)
        return model if processes.sharded() else model.to(self.device)

    def _write(self, model: Any, overwrite: bool) -> None:
        stages = [{k: v for k, v in stage.items() if k != "trained"} for stage in self.state["stages"]]
        trained = self._trained()
        with atomic_folder(self.target, overwrite=overwrite) as folder:
            write_trained(folder, self.start.path, model, trained)
            if (self.work / LOG).is_file():
                shutil.copyfile(self.work / LOG, folder / LOG)
                draw_curves(folder / LOG, folder / CURVES, self.target.name)
            record = new_record(
                "distilled",
                self.start.name,
                self.recipe,
                {**self.start.record["teacher"], **place_of(self.start.teacher_path, self.target)},
                overrides=self.start.record.get("overrides", []),
                parent={"path": str(self.start.path.resolve()), "time": self.start.time},
                taught_by=place_of(self.teacher, self.target) if _other(self.start, self.teacher) else None,
                text=self.recipe.distill.describe_text(),
                logits=[read_manifest(wanted.folder) for wanted in wanted_logits(self.recipe)],
                hardware=f"{processes.count()} x " * (processes.count() > 1) + hardware(self.device),
                calibrated=bool(self.start.record.get("calibrated")),
                earlier=[*self.start.record.get("earlier", ()), *self.start.record.get("stages", ())],
                stages=stages,
                trained=sorted(trained | set(self.start.record.get("trained", ()))),
                decay=decays(dict(model.named_parameters())),
            )
            block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["swapattn"]
            (folder / CARD).write_text(model_card(record, block), encoding="utf-8")
            known = self.start.record.get("weights", {})  # of a file that is the parent's, too, its word counts
            shared = {name for name in known if _is_one_file(folder / name, self.start.path / name)}
            weights = samples(folder, NEW_SHARD) | {name: known[name] for name in shared}
            write_json(folder / RECORD, {**record, "weights": weights})


def _other(start: Checkpoint, teacher: Path) -> bool:
    """Whether it is not the one that the checkpoint was converted from."""
    return teacher.resolve() != start.teacher_path.resolve()


def _is_one_file(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.samefile(b)
