"""What a distillation starts from: the layer that is meant, the teacher, the texts; checked before anything is trained.

And what it would take, for `distill --dry-run`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from . import processes
from .checkpoint import Checkpoint, find
from .conversion import convert, of_convert
from .data import documents, no_words
from .environment import check_device, say
from .errors import CheckpointError, RecipeError, SwapattnError, UsageError
from .estimate import estimate
from .logits import check_wanted_logits
from .lora import target_paths
from .optimizer import trainable_parameters
from .positions import check_length
from .recipe import Recipe, load_recipe
from .remote_code import use_own_code
from .shards import read_config, read_weight_map
from .stages import AlignStage, CalibrateStage, DistillStage, stage_keys, text_of, written_logits
from .stored import check_way_back, trained_tensors
from .surgery import apply_, plan
from .text import TextMixture, TextSpec
from .training import shares
from .vocabulary import check_same_vocabulary


def as_converted(recipe: str | Recipe, overrides: Sequence[str], start: Checkpoint) -> Recipe:
    """The recipe with the layer of the checkpoint where it says nothing else.

    That is where it has no convert section, and where what was set by hand when the checkpoint was converted, and is
    not set now, is all that differs.
    """
    have = start.recipe.convert
    resolved = load_recipe(recipe, overrides, convert=have)
    chosen = start.record.get("overrides", ())
    if chosen and resolved.convert != have:
        with contextlib.suppress(RecipeError):  # of a recipe with another layer it may make no sense
            same = load_recipe(recipe, [*chosen, *overrides])
            if same.convert == have:
                say(f"{', '.join(chosen)}, as {start.path} was converted")
                return same
    return resolved


def check_request(recipe: Recipe, start: Checkpoint, teacher: Path, device: str, *, named: bool, dry_run: bool) -> None:
    """What would otherwise show only after the first stages: the teacher, the texts, the device, the batches."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: say cpu or cuda, and choose the GPU with CUDA_VISIBLE_DEVICES")
    check_device(device)
    for stage, key in zip(recipe.distill.stages, stage_keys(recipe.distill.stages), strict=True):
        if not isinstance(stage, CalibrateStage):
            shares(stage, key, processes.count())
    _check_teacher(recipe, start, teacher, named=named)
    check_wanted_logits(recipe, start.path)
    for spec, key in _sources(recipe).items():
        try:
            if next(iter(documents(spec)), None) is None:
                raise no_words(spec)
        except SwapattnError as error:
            if not (dry_run and spec.hub):  # steps are measured on random tokens
                raise type(error)(f"{key}: {error}") from error
            say(f"{key}: {error}")


def _check_teacher(recipe: Recipe, start: Checkpoint, teacher: Path, *, named: bool) -> None:
    """The teacher is where a stage will look for it, and has the student's vocabulary."""
    own = own_teachers(recipe, start, teacher)
    taught = [isinstance(stage, DistillStage) and stage.runs_teacher for stage in recipe.distill.stages]
    needed = named or any(run and not mine for run, mine in zip(taught, own, strict=True))
    if needed and not (teacher / "config.json").is_file():
        if named:
            raise UsageError(f"--teacher {teacher}: no such model folder")
        raise CheckpointError(f"no teacher at {teacher}: it was moved or never there; name it with --teacher FOLDER")
    keys = stage_keys(recipe.distill.stages)
    for stage, key, changed in zip(recipe.distill.stages, keys, _changed(recipe, start), strict=True):
        if isinstance(stage, AlignStage) and changed:
            say(f"distill.stages.{key}: learns from the model's own softmax attention, which other stages have changed")
    if named:
        if not any(taught):
            raise UsageError(f"--teacher: no stage of recipe {recipe.name} asks a teacher's logits of a model")
        check_same_vocabulary(teacher, start.path)


def check_names(recipe: Recipe, model: Any, checkpoint: Path) -> None:
    """Every stage trains something, on windows that the model can read, and each tensor of it is stored under a name.

    Values are not asked for.
    """
    names: set[str] = set()
    for stage, key in zip(recipe.distill.stages, stage_keys(recipe.distill.stages), strict=True):
        check_length(model, stage.length, key, checkpoint)
        if isinstance(stage, CalibrateStage):
            continue
        found = {n for group in trainable_parameters(model, stage, key) for n in group}
        if stage.train == "lora":
            found |= {f"{path}.weight" for path in target_paths(model, stage, key)}
        if not found:
            raise RecipeError(f"distill.stages.{key}: nothing is trainable with these train and learning_rates")
        names |= found
    weight_map = read_weight_map(checkpoint)
    own = {name for name in names if ".swap." not in name}  # the swaps' may be made anew
    check_way_back(checkpoint, weight_map, trained_tensors(checkpoint, weight_map, model, own))


def own_teachers(recipe: Recipe, start: Checkpoint, teacher: Path) -> list[bool]:
    """For each stage whether the student's own weights can teach it: no stage has changed them, and this one does not.

    Adapters can be switched off while their stage runs, and are part of the weights afterwards.
    """
    same = teacher == start.teacher_path
    changed = _changed(recipe, start)
    return [
        same and not before and (isinstance(stage, CalibrateStage) or stage.train in ("new", "lora"))
        for stage, before in zip(recipe.distill.stages, changed, strict=True)
    ]


def _changed(recipe: Recipe, start: Checkpoint) -> list[bool]:
    """For each stage whether the weights beside the swaps are no longer the original ones when it begins."""
    changed = not all(".swap." in name for name in start.record.get("trained", ()))
    found = []
    for stage in recipe.distill.stages:
        found.append(changed)
        changed |= not isinstance(stage, CalibrateStage) and stage.train != "new"
    return found


def _sources(recipe: Recipe) -> dict[TextSpec, str]:
    """What is read, with the first key of the recipe that says so; written logits have their text with them."""
    found: dict[TextSpec, str] = {}
    for index, stage in enumerate(recipe.distill.stages):
        if written_logits(stage) is not None:
            continue
        text = text_of(stage, recipe.distill.text)
        key = "distill.text" if text is recipe.distill.text else f"distill.stages.{index}.text"
        for number, (spec, _) in enumerate(text.parts):
            found.setdefault(spec, f"{key}.{number}" if isinstance(text, TextMixture) else key)
    return found


def with_convert_section(
    start: Checkpoint, recipe: Recipe, overrides: Sequence[str], directory: Path, dry_run: bool, overwrite: bool
) -> Checkpoint:
    """The checkpoint, or a new conversion of its teacher when the recipe asks for another layer.

    `overrides` are in the recipe, and are what the new one remembers of it.
    """
    have, want = start.recipe.convert.model_dump(), recipe.convert.model_dump()
    different = sorted(f"convert.{key}" for key in want if have.get(key) != want[key])
    if not different:
        return start
    if start.kind == "distilled":
        raise UsageError(
            f"{start.path} is distilled already and its layers differ from recipe {recipe.name} in "
            f"{', '.join(different)}: convert the teacher anew, or take a recipe with the same convert section"
        )
    target = directory / f"{start.name}-swapattn-{recipe.name}-converted"
    differs = f"recipe {recipe.name} differs from {start.path} in {', '.join(different)}"
    if target.exists() and not dry_run:
        again = find(directory, target)
        if again.recipe.convert == recipe.convert and again.teacher_path == start.teacher_path:
            say(f"{differs}: taking {target}")
            return again
    say(f"{differs}: converting anew into {target}")
    if dry_run:
        return start
    if not (start.teacher_path / "config.json").is_file():
        raise CheckpointError(
            f"no teacher at {start.teacher_path}, which would be converted anew: put it back, or take a recipe with "
            "the convert section of the checkpoint"
        )
    convert(
        start.teacher_path,
        target,
        recipe=recipe,
        overrides=of_convert(overrides),
        overwrite=overwrite,
        record_name=start.name,
        origin=start.record["teacher"],
    )
    return find(directory, target)


def estimates(start: Checkpoint, recipe: Recipe, device: str, teacher: Path) -> tuple[dict[str, Any], ...]:
    """The figures of `estimate` for each stage."""
    config = _shape(start)
    other = read_config(teacher) if (teacher / "config.json").is_file() else config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        apply_(empty, plan(empty.config, recipe.convert))
    check_names(recipe, empty, start.path)
    own = own_teachers(recipe, start, teacher)
    stages = zip(recipe.distill.stages, stage_keys(recipe.distill.stages), own, strict=True)
    return tuple(
        estimate(config, recipe, stage, device, key=key, own_teacher=mine, teacher=other) for stage, key, mine in stages
    )


def _shape(start: Checkpoint) -> Any:
    """The config of the checkpoint's original model, wherever that is."""
    if (start.teacher_path / "config.json").is_file():
        return read_config(start.teacher_path)
    use_own_code(start.path)
    values = json.loads((start.path / "config.json").read_text(encoding="utf-8"))
    base = values.pop("swapattn")["base_model_type"]
    values.pop("auto_map", None)
    return AutoConfig.for_model(**{**values, "model_type": base})
