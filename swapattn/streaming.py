"""A teacher that runs without being loaded: each block reads its weights from the shards when it is called.

What is in memory is one block (a decoder layer, an embedding) and the hidden states of the batch. Nothing depends on
names of modules: a block is whatever holds an attention site, up to its number (`model.layers.3`), and each of its
neighbours (`model.layers.4`, also of another kind); around the blocks every module that owns parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.logging import disable_progress_bar

from . import surgery
from .errors import SwapattnError
from .shards import read_config
from .stored import PLAIN

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
        NotStreamableError: a parameter cannot be made from what is stored, or is stored quantised.
    """
    disable_progress_bar()  # of transformers, one for every block
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(read_config(folder), dtype=torch.float32)
    shards = _Shards(folder, weight_map, model, torch.device(device))
    blocks = _blocks(model, plan)
    stored = shards.by_block(blocks)
    for module in model.modules():  # few and small: rotary frequencies, scales
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer.to(device) if buffer is not None else None
    shards.load(shards.buffers)
    surgery.apply_(model, plan)
    for path in (site.path for site in plan.swap):
        model.get_submodule(path).swap.to(device)
    for block, names in blocks.items():
        _stream(model, block, names, stored[block], shards)
    _watch(model.base_model)
    return model.eval()


def _blocks(model: nn.Module, plan: surgery.SwapPlan) -> dict[str, list[str]]:
    """Path of each block -> the full names of its parameters; every parameter of the model is in one block."""
    paths, neighbours = set(), set()
    for site in (*plan.swap, *plan.keep):
        found = _BLOCK.match(site.path)
        paths.add(found.group(1) if found else site.path)
        neighbours |= {found.group(2)} if found else set()
    for name, _ in model.named_modules():  # layers without attention read each other's weights no less
        found = _BLOCK.match(name)
        paths |= {found.group(1)} if found and found.group(2) in neighbours else set()
    blocks: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        block = next((path for path in paths if owner == path or owner.startswith(f"{path}.")), owner)
        blocks.setdefault(block, []).append(name)
    return blocks


def _stream(model: nn.Module, block: str, names: list[str], stored: list[str], shards: _Shards) -> None:
    """Let a block have its weights while it runs."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    empty = [owner._parameters[key] for owner, key in owners]

    def fill(*_: Any) -> None:
        shards.load(stored)

    def drop(*_: Any) -> None:
        for (owner, key), parameter in zip(owners, empty, strict=True):
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
    """Tensors of a model folder, loaded into parts of the model as transformers loads all of it.

    So names of older repositories are known, and what is stored in another form (experts one by one) is put together.
    """

    def __init__(self, folder: Path, weight_map: Mapping[str, str], model: Any, device: torch.device) -> None:
        self.folder, self.weight_map, self.model, self.device = folder, weight_map, model, device
        self.changes = get_model_conversion_mapping(model)
        renamings = [change for change in self.changes if isinstance(change, WeightRenaming)]
        converters = [change for change in self.changes if isinstance(change, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self.targets = {key: rename_source_key(key, renamings, converters, prefix, state)[0] for key in weight_map}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = [key for key, name in self.targets.items() if name in state and name not in parameters]

    def by_block(self, blocks: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Path of each block -> the stored names that its parameters are made from, by their headers."""
        of = {name: block for block, names in blocks.items() for name in names}
        stored: dict[str, list[str]] = {block: [] for block in blocks}
        for key, name in self.targets.items():
            if name in of:
                stored[of[name]].append(key)
        missing = self._load(self._empty([key for keys in stored.values() for key in keys]), "meta")
        for name in sorted(missing & of.keys()):
            if name.startswith(f"{self.model.base_model_prefix}."):  # the head, which may be tied, is not run
                raise NotStreamableError(f"{name} is not stored in a form that is known")
        return stored

    def _empty(self, keys: list[str]) -> dict[str, torch.Tensor]:
        found = {}
        with self._slices(keys) as slices:
            for key, stored in slices.items():
                if stored.get_dtype() not in PLAIN:
                    raise NotStreamableError(f"{key} is stored quantised ({stored.get_dtype()})")
                found[key] = torch.empty(stored.get_shape(), device="meta")
        return found

    def load(self, keys: list[str]) -> None:
        """Load stored tensors."""
        with self._slices(keys) as slices, _disable_current_modes():  # `_Present`: what is absent is looked at, too
            self._load(slices, self.device)

    @contextmanager
    def _slices(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        """Stored tensors, not read yet; files are closed behind, so that their pages do not count as this process's."""
        with ExitStack() as files:
            names = {self.weight_map[key] for key in keys}
            shards = {name: files.enter_context(safe_open(self.folder / name, framework="pt")) for name in names}
            yield {key: shards[self.weight_map[key]].get_slice(key) for key in keys}

    def _load(self, tensors: dict[str, Any], device: torch.device | str) -> set[str]:
        """Set the parameters that are made from tensors; returns the names of all others."""
        config = LoadStateDictConfig(weight_mapping=self.changes, device_map={"": device}, dtype=torch.float32)
        found, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        for name, shape, wanted in sorted(found.mismatched_keys):
            raise NotStreamableError(f"{name} is stored as {list(shape)}, not {list(wanted)}")
        for name, reason in found.conversion_errors.items():
            raise NotStreamableError(f"{name} cannot be made from what is stored: {reason}")
        missing: set[str] = found.missing_keys
        return missing
