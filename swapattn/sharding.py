"""Sharded parameters by FSDP2, torch's `fully_shard`: every process holds its share of each weight and its optimiser.

Units are the decoder layers, as wherever transformers is sharded, and in align the swaps within them: these are called
and trained there while nothing else has a gradient. Nothing turns a sharded model back into a plain one, so
a run loads it anew after each stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from . import processes
from .environment import is_first_process
from .swap import LightningSwap


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has gone through `shard_`."""
    return isinstance(model, FSDPModule)


def shard_(model: nn.Module, device: str, *, swaps: bool) -> None:
    """Spread a model that is to be trained over all processes, in place; its shards are on `device`.

    A model on the CPU goes to the device layer by layer. The parameters that no layer has (embeddings, norm) are whole
    while the model's forward pass runs, which is how the loss comes by the output embedding.

    Args:
        model: in fp32, its trainable parameters marked; `sharded` already, it stays as it is.
        device: "cpu" or "cuda".
        swaps: make units of the swaps, see above.
    """
    if is_sharded(model):
        return
    mesh = _mesh(device)
    for swap in [part for part in model.modules() if swaps and isinstance(part, LightningSwap)]:
        fully_shard(swap, mesh=mesh)
    _shard_layers_(model, mesh)
    fully_shard(model, mesh=mesh)


def shard_frozen_(teacher: Any, device: str) -> None:
    """Spread a teacher over all processes, in place, all but its output embedding, which the loss reads on its own."""
    if is_sharded(teacher.base_model):
        return
    mesh = _mesh(device)
    _shard_layers_(teacher, mesh)
    fully_shard(teacher.base_model, mesh=mesh, reshard_after_forward=True)
    teacher.to(device)


def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (processes.count(),))


def _shard_layers_(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a plain one: put together where it is sharded, in which case every process has to ask."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def as_shard_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is whole in every process, the share that `like` has; all of it where `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    # nothing is sent, for every process has it all
    here = tensor.to(like.device)
    shared: torch.Tensor = distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)
    return shared


def gathered(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, one at a time, in the first process; nothing in the others, which have to ask too."""
    found = {}
    for name, tensor in named:
        complete = whole(tensor)
        if is_first_process():
            found[name] = complete.cpu().contiguous()
    return found


def whole_state_(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser save and load its state as if it were not sharded, so that any number of processes reads it."""
    optimizer.register_state_dict_post_hook(_gather_state)
    optimizer.register_load_state_dict_pre_hook(_share_state)


def _gather_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    tensors = {index: gathered(values.items()) for index, values in state["state"].items()}
    return {**state, "state": tensors}


def _share_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    shared = {
        index: {
            # steps are single numbers, which every process has
            key: as_shard_of(parameters[index], value) if value.shape == parameters[index].shape else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": shared}
