"""`convert`: a teacher's folder -> a checkpoint with swapped layers, without loading the teacher's weights.

The teacher's shards are hard-linked (or copied) as they are and the new parameters go into a shard of their own, so
that what was taken over is equal bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from . import sources, surgery
from .attention import LightningSwap
from .checkpoint import RECORD, atomic_folder, new_record, write_json, write_runtime
from .errors import CheckpointError, SourceError, UnsupportedModelError
from .modeling import MODEL_TYPE_PREFIX
from .recipe import CalibrateStage, Recipe, load_recipe

INDEX = "model.safetensors.index.json"
NEW_SHARD = "swap.safetensors"
# Files of a model folder that go along: tokenizer, generation settings, licence. Never weights or code.
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` made, or with `dry_run` would make; `path` is the checkpoint folder."""

    path: Path
    plan: surgery.SwapPlan
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
        linear = f"{spec.feature_map}, normalizer {spec.normalizer}, decay {spec.decay.schedule} per {spec.decay.per}"
        state, kv = plan.state_bytes() / 2**20, plan.kv_bytes_per_token() * 4096 / 2**20
        kept = ", ".join(str(site.layer_idx) for site in plan.keep) or "none"
        rows = [
            ("would write" if self.dry_run else "wrote", str(self.path)),
            ("model type", plan.base_model_type + (f" ({self.teacher_note})" if self.teacher_note else "")),
            ("layers swapped", f"{len(plan.swap)} of {len(plan.swap) + len(plan.keep)} (kept softmax: {kept})"),
            ("linear branch", linear),
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
    if dry_run and source.kind == "hub":
        with contextlib.suppress(OSError):
            plan = surgery.plan(AutoConfig.from_pretrained(source.location), resolved.convert)
            return ConvertResult(target, plan, source.note, True, _count(new_parameters(plan)), None)
    teacher = sources.materialize(source)
    config = read_config(teacher.path)
    plan = surgery.plan(config, resolved.convert)
    tensors = new_parameters(plan)
    weight_map = read_weight_map(teacher.path)
    kept = count_parameters(teacher.path, weight_map)
    result = ConvertResult(target, plan, teacher.note, dry_run, _count(tensors), kept)
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
        write_checkpoint(folder, teacher.path, plan, tensors, weight_map)
        trained = _calibrate(folder, resolved) if calibrate else []
        name = record_name or source.name
        record = new_record("converted", name, resolved, origin, calibrated=calibrate, trained=trained)
        write_json(folder / RECORD, record)
    return result


def read_config(folder: Path) -> Any:
    """The transformers config of a teacher's folder.

    Raises:
        UnsupportedModelError: transformers does not know the model type, or it is one of ours.
    """
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: no readable config.json ({error})") from error
    model_type = str(data.get("model_type"))
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise UnsupportedModelError(f"{folder} is already converted (model type {model_type})")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{folder}: transformers does not know the model type {model_type!r}") from error


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors file of a model folder.

    Raises:
        CheckpointError: a shard is missing or damaged.
    """
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for name in sorted(set(weight_map.values())):
            _open_shard(folder / name)
        return weight_map
    return {key: "model.safetensors" for key in _open_shard(folder / "model.safetensors")}


def _open_shard(path: Path) -> list[str]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def new_parameters(plan: surgery.SwapPlan) -> dict[str, torch.Tensor]:
    """Start values of every parameter that the plan adds, by its name in the checkpoint."""
    slopes = plan.slopes()
    spec = plan.spec.model_dump(mode="json")
    return {
        f"{site.path}.swap.{name}": tensor.contiguous()
        for site in plan.swap
        for name, tensor in LightningSwap(site.shape(), spec, slopes[site.path]).state_dict().items()
    }


def write_checkpoint(
    folder: Path, teacher: Path, plan: surgery.SwapPlan, tensors: dict[str, torch.Tensor], weight_map: dict[str, str]
) -> None:
    """Write everything but the record: linked shards, the new shard, index, config, tokenizer, runtime files."""
    # transformers prefers a file called model.safetensors to an index, so the teacher's gets another name here.
    names = {name: "teacher.safetensors" if name == "model.safetensors" else name for name in set(weight_map.values())}
    for old, new in names.items():
        link_or_copy(teacher / old, folder / new)
    save_file(tensors, folder / NEW_SHARD, metadata={"format": "pt"})
    merged = {key: names[name] for key, name in weight_map.items()} | dict.fromkeys(tensors, NEW_SHARD)
    size = sum((folder / name).stat().st_size for name in set(merged.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": merged})
    copy_companions(teacher, folder)
    data = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    auto_map = write_runtime(folder, plan.base_model_type)
    data.update(
        model_type=MODEL_TYPE_PREFIX + plan.base_model_type,
        architectures=[auto_map["AutoModelForCausalLM"].split(".")[-1]],
        auto_map=auto_map,
        swapattn=plan.config_block(),
    )
    write_json(folder / "config.json", data)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and licence files."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, following symbolic links; copy it where the file system cannot link."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def count_parameters(folder: Path, weight_map: dict[str, str]) -> int:
    """Numbers stored in a model folder, from the headers alone."""
    total = 0
    for name in set(weight_map.values()):
        with safe_open(folder / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                size = 1
                for extent in shard.get_slice(key).get_shape():
                    size *= extent
                total += size
    return total


def _count(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _calibrate(folder: Path, recipe: Recipe) -> list[str]:
    """Run the recipe's calibrate stage on a checkpoint that is being written; returns the names that it set."""
    from .calibration import calibrate_stage
    from .data import PackedTokens
    from .modeling import load

    stage = next((s for s in recipe.distill.stages if isinstance(s, CalibrateStage)), CalibrateStage(stage="calibrate"))
    model, tokenizer = load(folder)
    if tokenizer is None:
        raise CheckpointError("calibration needs a tokenizer, and the model has none")
    data = PackedTokens(recipe.distill.text, tokenizer, stage.length, seed=recipe.distill.seed)
    names: list[str] = calibrate_stage(model, stage, data)["trained"]
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if ".swap." in name}
    save_file(tensors, folder / NEW_SHARD, metadata={"format": "pt"})
    return names
