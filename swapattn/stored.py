"""Under which names, and in which form, a checkpoint stores the parameters that are trained.

Some families hold other tensors in memory than in files: experts as one tensor (Mixtral, Qwen3-MoE), a matrix under a
newer name (GPT-NeoX). transformers converts on loading, and back on saving; here the same way back is taken for what
has been trained alone, block by block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from .errors import CheckpointError

_BLOCK = re.compile(r".*?\.\d+\.")


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
        CheckpointError: one is stored in a form to which transformers does not know the way back.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    names = {id(every[name]): name for name in trained}
    found = {key: Source(model, {key: p}) for key, p in every.items() if id(p) in names and key in weight_map}
    stored = {id(p) for key, p in every.items() if key in weight_map}
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for key, p in model.named_parameters():  # a tied one under its first name
        if id(p) not in stored:
            blocks.setdefault(_block(key), {})[key] = p
    for parameters in blocks.values():
        missing = sorted(names[id(p)] for p in parameters.values() if id(p) in names)
        if not missing:
            continue
        source = Source(model, parameters, converted=True)
        try:
            made = source.stored("meta").keys()
        except Exception:  # whatever a conversion raises that has no way back
            made = parameters.keys()
        if not made <= weight_map.keys():
            raise CheckpointError(
                f"{checkpoint} stores {missing[0]} in another form, so it cannot be trained: say train: new"
            )
        found |= dict.fromkeys(made, source)
    return found


def _block(name: str) -> str:
    """The numbered module that a parameter belongs to, such as a decoder layer: what is converted at a time."""
    found = _BLOCK.match(name)
    return found.group() if found else ""


def check_way_back(folder: Path, weight_map: Mapping[str, str], sources: Mapping[str, Source]) -> None:
    """Make sure that what was converted on loading is stored as it was, by one block of each size.

    Args:
        folder: the checkpoint that the model was loaded from; nothing has been trained since.

    Raises:
        CheckpointError: the way back does not end where loading began.
    """
    seen: set[tuple[str, ...]] = set()
    for source in {id(source): source for source in sources.values() if source.converted}.values():
        kind = tuple(_BLOCK.sub("", name) for name in source.parameters)
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
