"""`convert`: a teacher's folder -> a checkpoint with swapped layers, without loading the teacher's weights.

torch and transformers are imported when they are needed: what is wrong with the request is said before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import sources
from .checkpoint import atomic_folder, new_record
from .environment import default_device, say
from .errors import CheckpointError, SourceError, TrainingError, UsageError
from .recipe import CalibrateStage, Recipe, load_recipe

if TYPE_CHECKING:
    import torch

    from .surgery import SwapPlan


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` made, or with `dry_run` would make; `path` is the checkpoint folder."""

    path: Path
    plan: SwapPlan
    teacher_note: str
    dry_run: bool
    new_parameters: int
    kept_parameters: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "path": str(self.path),
            "dry_run": self.dry_run,
            "teacher_note": self.teacher_note,
            "new_parameters": self.new_parameters,
            "kept_parameters": self.kept_parameters,
            "plan": self.plan.to_dict(),
        }

    def to_table(self) -> str:
        """The same as a short text table."""
        plan = self.plan
        spec = plan.spec
        local = f"window {spec.local.window} + {spec.local.sinks} sinks" if spec.local else "none"
        state, kv = plan.state_bytes() / 2**20, plan.kv_bytes_per_token() * 4096 / 2**20
        kept = ", ".join(str(site.layer_idx) for site in plan.keep) or "none"
        kept += ", without RoPE" if plan.nope() else ""
        rows = [
            ("would write" if self.dry_run else "wrote", str(self.path)),
            ("model type", plan.base_model_type + (f" ({self.teacher_note})" if self.teacher_note else "")),
            ("layers swapped", f"{len(plan.swap)} of {len(plan.swap) + len(plan.keep)} (kept softmax: {kept})"),
            ("linear branch", spec.linear_branch()),
            ("softmax branch", local),
            ("new parameters", f"{self.new_parameters:,}"),
            ("memory a sequence", f"{state:.2f} MiB at any length (KV cache at 4K: {kv:.1f} MiB)"),
        ]
        if self.kept_parameters is not None:
            rows.insert(-1, ("parameters taken over", f"{self.kept_parameters:,}"))
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
        calibrate: run the recipe's calibrate stage at once (this loads and runs the model).
        dry_run: check everything, write nothing.
        record_name, origin: what the record says of the teacher, when a recorded teacher is converted again.

    Raises:
        UsageError, RecipeError, SourceError, UnsupportedModelError, CheckpointError: each says what to do.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    source = sources.resolve(str(model))
    target = Path(output) if output is not None else Path(f"{source.name}-swapattn")
    if target.exists() and not overwrite and not dry_run:
        with atomic_folder(target):  # says that it exists, before anything is fetched
            pass
    if dry_run and source.kind == "hub" and sources.hub_reachable():
        with contextlib.suppress(OSError):
            return _planned(target, source, resolved)
    teacher = sources.materialize(source)
    if target.resolve() == teacher.path.resolve():
        raise UsageError(f"{target} is the model itself: choose another folder with -o")
    from . import shards, surgery

    plan = surgery.plan(shards.read_config(teacher.path), resolved.convert)
    tensors = shards.new_parameters(plan)
    weight_map = shards.read_weight_map(teacher.path)
    new, kept = shards.count(tensors), shards.count_parameters(teacher.path, weight_map)
    result = ConvertResult(target, plan, teacher.note, dry_run, new, kept)
    if dry_run:
        return result
    origin = origin or {
        "given": str(model),
        "path": str(teacher.path.resolve()),
        "hub_id": teacher.hub_id,
        "revision": teacher.revision,
        "note": teacher.note,
    }
    with atomic_folder(target, overwrite=overwrite) as folder:
        trained = _calibrate(teacher.path, plan, tensors, weight_map, resolved) if calibrate else []
        name = record_name or source.name
        record = new_record("converted", name, resolved, origin, calibrated=calibrate, trained=trained)
        shards.write_checkpoint(folder, teacher.path, plan, tensors, weight_map, record)
    return result


def _planned(target: Path, source: sources.Source, recipe: Recipe) -> ConvertResult:
    """The dry run of a model on the hub: its config is enough."""
    from transformers import AutoConfig

    from . import shards, surgery

    plan = surgery.plan(AutoConfig.from_pretrained(source.location), recipe.convert)
    return ConvertResult(target, plan, source.note, True, shards.count(shards.new_parameters(plan)), None)


def _calibrate(
    teacher: Path, plan: SwapPlan, tensors: dict[str, torch.Tensor], weight_map: dict[str, str], recipe: Recipe
) -> list[str]:
    """Run the recipe's calibrate stage and set its numbers among the new parameters; returns the names it set.

    Block by block from the shards, so that the teacher is never in memory; where that fails, with all of it.
    """
    import torch
    from transformers import AutoTokenizer

    from . import surgery
    from .calibration import calibrate_stage
    from .data import PackedTokens
    from .modeling import load_teacher
    from .streaming import streamed_teacher

    if not (teacher / "tokenizer_config.json").is_file():
        raise CheckpointError("calibration needs a tokenizer, and the model has none")
    stage = next((s for s in recipe.distill.stages if isinstance(s, CalibrateStage)), CalibrateStage(stage="calibrate"))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
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
