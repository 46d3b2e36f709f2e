"""`convert`: a teacher's folder -> a checkpoint with swapped layers, without loading the teacher's weights.

torch and transformers are imported when they are needed: what is wrong with the request is said before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import publishing, sources, unpickling
from .checkpoint import atomic_folder, check_target, new_record, place_of
from .environment import default_device, say
from .errors import CheckpointError, SourceError, TrainingError, UsageError
from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch

    from .footprint import Footprint
    from .surgery import SwapPlan


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` made, or with `dry_run` would make; `path` is the checkpoint folder."""

    path: Path
    plan: SwapPlan
    teacher_note: str
    dry_run: bool
    footprint: Footprint

    @property
    def new_parameters(self) -> int:
        """Numbers that the conversion adds."""
        return self.footprint.new_parameters

    @property
    def kept_parameters(self) -> int:
        """Numbers that are taken over as they are."""
        return self.footprint.kept_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "path": str(self.path),
            "dry_run": self.dry_run,
            "teacher_note": self.teacher_note,
            **self.footprint.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def to_table(self) -> str:
        """The same as a short text table."""
        plan = self.plan
        spec = plan.spec
        local = f"window {spec.local.window} + {spec.local.sinks} sinks" if spec.local else "none"
        kept = ", ".join(str(site.layer_idx) for site in plan.keep) or "none"
        kept += ", without RoPE" if plan.nope() else ""
        rows = [
            ("would write" if self.dry_run else "wrote", str(self.path)),
            ("model type", plan.base_model_type + (f" ({self.teacher_note})" if self.teacher_note else "")),
            ("layers swapped", f"{len(plan.swap)} of {len(plan.swap) + len(plan.keep)} (kept softmax: {kept})"),
            ("linear branch", spec.linear_branch()),
            ("softmax branch", local),
            *self.footprint.rows(),
        ]
        return "\n".join(f"{name:<22} {value}" for name, value in rows)


def convert(
    model: str | Path,
    output: str | Path | None = None,
    *,
    recipe: str | Recipe = "short",
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    calibrate: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    record_name: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> ConvertResult:
    """Convert a model: take its weights over bit for bit and put a swap beside each softmax layer's projections.

    Args:
        model: alias, hub id, local folder or GGUF file.
        output: checkpoint folder, default `NAME-swapattn` in the current directory.
        recipe: name, YAML file or a `Recipe`; its convert section is used.
        overrides: `KEY=VALUE` changes of the recipe.
        overwrite: replace an existing folder.
        calibrate: run the recipe's calibrate stage at once (this runs the model, one block in memory at a time).
        dry_run: plan from config.json alone, write nothing; of a hub repository nothing else is fetched.
        push_to_hub: OWNER/NAME of a repository to upload the checkpoint to; asked for before anything is converted.
        allow_pickle: read a folder that holds pickled weights only, without running code of theirs.
        trust_remote_code: allow code that comes with the model, now and in later commands on it (`remote_code`).
        record_name, origin: what the record says of the teacher, when a recorded teacher is converted again.

    Raises:
        UsageError, RecipeError, SourceError, UnsupportedModelError, CheckpointError: each says what to do.
    """
    resolved = load_recipe(recipe, overrides)
    given = unpickling.as_safetensors(str(model)) if allow_pickle else str(model)
    source = sources.resolve(given, config_only=dry_run)
    if push_to_hub is not None:
        publishing.check_push(push_to_hub)
    target = Path(output) if output is not None else Path(f"{source.name}-swapattn")
    if not overwrite and not dry_run:
        check_target(target)  # before anything is fetched
    if dry_run:
        return _planned(target, source, resolved, trust_remote_code)
    teacher = sources.materialize(source, code=trust_remote_code)
    _check_apart(target, teacher.path)
    from . import footprint, shards, surgery
    from .loading import check_tensors
    from .model_card import teacher_licence

    config = shards.read_config(teacher.path, trust_remote_code=trust_remote_code)
    plan = surgery.plan(config, resolved.convert)
    tensors = shards.new_parameters(plan)
    weight_map = shards.read_weight_map(teacher.path)
    if tensors.keys() & weight_map.keys() or shards.NEW_SHARD in weight_map.values():
        raise CheckpointError(f"{teacher.path} was saved from a swapped model already: convert the original")
    check_tensors(teacher.path)
    weight = footprint.footprint(plan, shards.count(tensors), config, teacher.path, weight_map.values())
    result = ConvertResult(target, plan, teacher.note, dry_run, weight)
    origin = origin or {
        "given": str(model),
        "hub_id": teacher.hub_id,
        "revision": teacher.revision,
        "note": teacher.note,
        "licence": teacher_licence(teacher.path, source.location if source.kind == "hub" else None),
    }
    with atomic_folder(target, overwrite=overwrite) as folder:
        trained = _calibrate(teacher.path, plan, tensors, weight_map, resolved) if calibrate else []
        name = record_name or source.name
        decay = shards.decays(tensors)
        record = new_record(
            "converted",
            name,
            resolved,
            {**origin, **place_of(teacher.path, target)},
            overrides=of_convert(overrides),
            calibrated=calibrate,
            trained=trained,
            decay=decay,
        )
        shards.write_checkpoint(folder, teacher.path, plan, tensors, weight_map, record)
    if push_to_hub is not None:
        publishing.push(target, push_to_hub)
    return result


def of_convert(overrides: Sequence[str]) -> list[str]:
    """Those of `KEY=VALUE` that say what a swapped layer is."""
    return [override for override in overrides if override.partition("=")[0].partition(".")[0] == "convert"]


def _check_apart(target: Path, teacher: Path) -> None:
    """Refuse a target whose replacement would take the teacher away."""
    if target.resolve() in (teacher.resolve(), *teacher.resolve().parents):
        relation = "is" if target.resolve() == teacher.resolve() else "holds"
        raise UsageError(f"{target} {relation} the model itself: choose another folder with -o")


def _planned(target: Path, source: sources.Source, recipe: Recipe, trust_remote_code: bool) -> ConvertResult:
    """The dry run: the config is enough; weights that are there anyway are checked and counted."""
    from . import footprint, shards, surgery

    teacher = sources.describe(source, code=trust_remote_code)
    _check_apart(target, teacher.path)
    config = shards.read_config(teacher.path, trust_remote_code=trust_remote_code)
    plan = surgery.plan(config, recipe.convert)
    whole = teacher.hub_id is None and any(teacher.path.glob("*.safetensors"))
    files = shards.read_weight_map(teacher.path).values() if whole else ()
    new = shards.count(shards.new_parameters(plan))
    return ConvertResult(target, plan, teacher.note, True, footprint.footprint(plan, new, config, teacher.path, files))


def _calibrate(
    teacher: Path, plan: SwapPlan, tensors: dict[str, torch.Tensor], weight_map: dict[str, str], recipe: Recipe
) -> list[str]:
    """Run the recipe's calibrate stage and set its numbers among the new parameters; returns the names it set.

    Block by block from the shards, so that the teacher is never in memory; where that fails, with all of it.
    """
    import torch

    from . import surgery
    from .calibration import calibrate_stage
    from .data import PackedTokens
    from .loading import load_teacher, tokenizer_in
    from .streaming import streamed_teacher

    tokenizer = tokenizer_in(teacher)
    if tokenizer is None:
        raise CheckpointError("calibration needs a tokenizer, and the model has none")
    stage = recipe.distill.calibration
    data = PackedTokens(recipe.distill.text, tokenizer, stage.length, seed=recipe.distill.seed)
    device = default_device()
    try:
        model = streamed_teacher(teacher, plan, weight_map, device)
        names: list[str] = calibrate_stage(model, stage, data)["trained"]
    except (TrainingError, SourceError, UsageError):
        raise
    except Exception as error:  # what the code of a family raises when its weights come and go
        reason = " ".join(str(error).split())[:200]
        say(f"the model does not run block by block ({reason}): calibrating with all of it in memory")
        model, _ = load_teacher(teacher, device=device, dtype=torch.float32)
        surgery.apply_(model, plan)
        model.to(device)  # the new parameters too
        names = calibrate_stage(model.eval(), stage, data)["trained"]
    state = model.state_dict()
    tensors.update({name: state[name].cpu() for name in names})
    return names
