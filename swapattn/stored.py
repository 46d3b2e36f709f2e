"""Under which names, and in which form, a checkpoint stores the parameters that are trained.

Some families hold other tensors in memory than in files: experts as one tensor (Mixtral, Qwen3-MoE), a matrix under a
newer name (GPT-NeoX), or without the name of the base model before them (GPT-2). transformers converts on loading, and
back on saving; here the same way back is taken for what has been trained alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from .errors import CheckpointError

_NUMBER = re.compile(r"\.\d+\.")
# Types of stored numbers that stand by themselves; smaller ones are quantised, and their scales are elsewhere.
PLAIN = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Source:
    """Parameters of a model from which stored tensors are made, `converted` where these are others."""

    model: Any
    parameters: Mapping[str, nn.Parameter]
    converted: bool = False

    def stored(self, device: str | None = None) -> dict[str, Tensor]:
        """Stored name -> tensor, on `device` if one is named; on "meta" nothing is computed."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        if device is not None:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return revert_weight_conversion(self.model, tensors) if self.converted else tensors


def trained_tensors(
    checkpoint: Path, weight_map: Mapping[str, str], model: nn.Module, trained: set[str]
) -> dict[str, Source]:
    """Stored name -> what it is made from, of everything that is trained, under all of its names.

    A tied matrix may be stored under both of its names; when only one of them is written anew, loading unties them.

    Args:
        checkpoint: its folder, for messages.
        weight_map: stored name -> file.
        model: that was loaded from it; its weights may be on the meta device.
        trained: names of its parameters.

    Raises:
        CheckpointError: one is stored quantised, or in a form to which transformers does not know the way back.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    keys = {name: name if name in weight_map else name.removeprefix(prefix) for name in every}
    names = {id(every[name]): name for name in trained}
    own = {keys[name]: p for name, p in every.items() if keys[name] in weight_map}
    found = {key: Source(model, {key: p}) for key, p in own.items() if id(p) in names}
    stored = {id(p) for p in own.values()}
    others = {key: p for key, p in model.named_parameters() if id(p) not in stored}  # a tied one under its first name
    for parameters, made in _together(model, others):
        missing = sorted(names[id(p)] for p in parameters.values() if id(p) in names)
        if missing and not made <= weight_map.keys():
            raise CheckpointError(
                f"{checkpoint} stores {missing[0]} in another form, so it cannot be trained: say train: new"
            )
        if missing:
            found |= dict.fromkeys(made, Source(model, parameters, converted=True))
    _check_plain(checkpoint, weight_map, found)
    return found


def _check_plain(checkpoint: Path, weight_map: Mapping[str, str], names: Collection[str]) -> None:
    """Refuse what is quantised, which loading may undo without a word."""
    for file in sorted({weight_map[name] for name in names}):
        with safe_open(checkpoint / file, framework="pt") as shard:
            for name in sorted(name for name in names if weight_map[name] == file):
                kind = shard.get_slice(name).get_dtype()
                if kind not in PLAIN:
                    raise CheckpointError(
                        f"{checkpoint} stores {name} quantised ({kind}), so it cannot be trained: say train: new"
                    )


def _together(model: nn.Module, others: dict[str, nn.Parameter]) -> list[tuple[dict[str, nn.Parameter], set[str]]]:
    """Parameters in groups that are stored in tensors of their own, with the names of these."""
    groups: list[tuple[dict[str, nn.Parameter], set[str]]] = []
    for name, parameter in others.items():
        parameters = {name: parameter}
        try:
            made = set(Source(model, parameters, converted=True).stored("meta"))
        except Exception:  # whatever a conversion raises that has no way back
            made = {name}
        joined = [group for group in groups if group[1] & made]
        groups = [group for group in groups if not group[1] & made]
        for before, before_made in joined:
            parameters, made = before | parameters, before_made | made
        groups.append((parameters, made))
    return groups


def check_way_back(folder: Path, weight_map: Mapping[str, str], sources: Mapping[str, Source]) -> None:
    """Make sure that what was converted on loading is stored as it was, in one layer of each kind.

    Args:
        folder: the checkpoint that the model was loaded from; nothing has been trained since.

    Raises:
        CheckpointError: the way back does not end where loading began.
    """
    seen: set[tuple[str, ...]] = set()
    for source in {id(source): source for source in sources.values() if source.converted}.values():
        kind = tuple(_NUMBER.sub(".", name) for name in source.parameters)
        if kind in seen or any(p.is_meta for p in source.parameters.values()):
            continue
        seen.add(kind)
        for name, tensor in source.stored().items():
            with safe_open(folder / weight_map[name], framework="pt") as shard:
                old = shard.get_tensor(name)
            if old.numel() != tensor.numel() or not torch.equal(old, tensor.to("cpu", old.dtype).reshape(old.shape)):
                raise CheckpointError(
                    f"{folder} stores {name} in a form that is not found again, so it cannot be trained: say train: new"
                )
