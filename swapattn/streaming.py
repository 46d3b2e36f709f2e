"""A teacher that runs without being loaded: each block reads its weights from the shards when it is called.

What is in memory is one block (a decoder layer, an embedding) and the hidden states of the batch. Nothing depends on
names of modules: a block is whatever holds an attention site, up to its number (`model.layers.3`), and each of its
neighbours (`model.layers.4`, also of another kind); around the blocks every module that owns parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from . import surgery
from .errors import SwapattnError
from .shards import read_config

_BLOCK = re.compile(r"((.*?)\.\d+)(\.|$)")


class NotStreamableError(SwapattnError):
    """The model cannot be run block by block from its shards; the message says why."""


def streamed_teacher(
    folder: Path, plan: surgery.SwapPlan, weight_map: Mapping[str, str], device: str | torch.device = "cpu"
) -> Any:
    """The teacher with the plan's swaps in it, in eval mode, computing in fp32; its weights stay in the shards.

    Only the new parameters (with their start values) and buffers are real. Run its `base_model`: the output head is
    read like every other module, but whoever needs no logits need not pay for it.

    Args:
        folder: the teacher's folder.
        plan: made for its config.
        weight_map: tensor name -> file, see `shards.read_weight_map`.
        device: where to compute.

    Raises:
        NotStreamableError: a parameter is not stored under its own name and shape, as where loading fuses experts.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(read_config(folder), dtype=torch.float32)
    shards = _Shards(folder, weight_map, model.base_model_prefix, torch.device(device))
    blocks = _blocks(model, plan)
    stored = [(block, [(name, p) for name, p in parameters.items()]) for block, parameters in blocks.items()]
    for _, parameters in stored:
        shards.check(parameters)
    for module in model.modules():  # few and small: rotary frequencies, scales
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer.to(device) if buffer is not None else None
    shards.read_buffers(model)
    surgery.apply_(model, plan)
    for path in (site.path for site in plan.swap):
        model.get_submodule(path).swap.to(device)
    for block, parameters in stored:
        _stream(model, block, [name for name, _ in parameters], shards)
    _watch(model.base_model)
    return model.eval()


def _blocks(model: nn.Module, plan: surgery.SwapPlan) -> dict[str, dict[str, nn.Parameter]]:
    """Path of each block -> its parameters by their full names; every parameter of the model is in one block."""
    paths, neighbours = set(), set()
    for site in (*plan.swap, *plan.keep):
        found = _BLOCK.match(site.path)
        paths.add(found.group(1) if found else site.path)
        neighbours |= {found.group(2)} if found else set()
    for name, _ in model.named_modules():  # layers without attention read each other's weights no less
        found = _BLOCK.match(name)
        paths |= {found.group(1)} if found and found.group(2) in neighbours else set()
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        block = next((path for path in paths if owner == path or owner.startswith(f"{path}.")), owner)
        blocks.setdefault(block, {})[name] = parameter
    return blocks


def _stream(model: nn.Module, block: str, names: list[str], shards: _Shards) -> None:
    """Let a block have its weights while it runs."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in names]
    empty = [owner._parameters[key] for owner, key, _ in owners]

    def fill(*_: Any) -> None:
        for (owner, key, name), parameter in zip(owners, empty, strict=True):
            assert parameter is not None
            owner._parameters[key] = nn.Parameter(shards.read(name, parameter.dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        for (owner, key, _name), parameter in zip(owners, empty, strict=True):
            owner._parameters[key] = parameter

    module = model.get_submodule(block)
    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop, always_call=True)


class _Present(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets nothing be computed with weights of a block that does not run.

    By itself torch takes a convolution's or a product's weight on the meta device, and returns memory as it was.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            raise NotStreamableError("a module reads weights of another one that does not run")
        return func(*args, **(kwargs or {}))


def _watch(model: nn.Module) -> None:
    """Let whatever the model reads while it runs be there."""
    watch: Any = _Present
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        entered.append(watch().__enter__())

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


class _Shards:
    """Tensors of a model folder under the names of the model's parameters."""

    def __init__(self, folder: Path, weight_map: Mapping[str, str], prefix: str, device: torch.device) -> None:
        self.folder = folder
        self.weight_map = weight_map
        self.prefix = f"{prefix}."
        self.device = device

    def key(self, name: str) -> str | None:
        """The stored name; older repositories leave out the name of the base model."""
        short = name.removeprefix(self.prefix)
        return name if name in self.weight_map else short if short in self.weight_map else None

    def check(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        """Every parameter of a block is stored as it is, or the block's weights are found out to be missing later."""
        for name, parameter in parameters:
            key = self.key(name)
            if key is None:
                if name.startswith(self.prefix):
                    raise NotStreamableError(f"{name} is not stored under its own name")
                continue  # of the head, which may be tied and is not run
            with safe_open(self.folder / self.weight_map[key], framework="pt") as shard:
                shape = tuple(shard.get_slice(key).get_shape())
            if shape != tuple(parameter.shape):
                raise NotStreamableError(f"{name} is stored as {list(shape)}, not {list(parameter.shape)}")

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor on the device; the file is closed again, so that its pages do not count as this process's."""
        key = self.key(name)
        if key is None:
            raise NotStreamableError(f"{name} is not stored under its own name")
        with safe_open(self.folder / self.weight_map[key], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(key)
        return tensor.to(self.device, dtype)

    def read_buffers(self, model: nn.Module) -> None:
        """Load the buffers that the checkpoint stores."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in model.state_dict():
            if name not in parameters and self.key(name) is not None:
                buffer = model.get_buffer(name)
                buffer.copy_(self.read(name, buffer.dtype))
