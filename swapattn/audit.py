"""Find what a model computes over all pairs of tokens, without knowing its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PRIME = 211  # a length that no width of a model equals, so that a T×T tensor cannot be mistaken


class _PairwiseOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the modules in which an operator returns a tensor with two dimensions of the sequence length."""

    def __init__(self, length: int, where: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.where, self.sites = length, where, dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Masking code asks whether all tokens are real or all of one sequence; there are no values: yes.
            return bool(1) if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:  # experts ask which of them have tokens: none
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        result = func(*args, **(kwargs or {}))
        name = str(func)
        outputs = result if isinstance(result, tuple | list) else (result,)
        pairwise = any(
            isinstance(x, torch.Tensor) and x.is_floating_point() and list(x.shape).count(self.length) >= 2
            for x in outputs
        )
        if "scaled_dot_product" in name:  # its fused forms return no weights; a window calls it on short blocks
            pairwise = min(args[0].shape[-2], args[1].shape[-2]) >= self.length
        if pairwise and self.where:
            self.sites.setdefault(self.where[-1], name)
        return result


def quadratic_sites(model: nn.Module, *, length: int = PRIME, device: str = "cpu") -> dict[str, str]:
    """Modules that compute something over all pairs of tokens, with the operator that shows it.

    Args:
        model: a causal LM; on the meta device nothing is computed.
        length: prime sequence length to run, longer than any local window.
        device: device of the token ids.

    Returns:
        path of the innermost module -> operator. Empty for a model that is linear in the length.
    """
    mode = _PairwiseOps(length, [])
    _run(model, length, device, mode)
    return mode.sites


def _run(model: nn.Module, length: int, device: str, mode: _PairwiseOps) -> None:
    """One forward pass under the mode, whose `where` holds the modules that are being called."""
    handles = []
    for name, module in model.named_modules():
        if name:
            enter = lambda _m, _a, name=name: mode.where.append(name)  # noqa: E731 - binds the loop's name
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_: mode.where.pop() and None, always_call=True))
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), mode:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def run_without_values(model: nn.Module, **inputs: Any) -> Any:
    """A forward pass on the meta device, where code that asks for a value gets one."""
    with torch.no_grad(), _PairwiseOps(PRIME, []):
        return model(**inputs)


@dataclass
class _Sizes:
    """By module: sizes of the dimensions that a softmax runs over, and the largest tensor of floats that is made."""

    softmax: dict[str, set[int]]
    largest: dict[str, int]


class _SizesOf(_PairwiseOps):  # type: ignore[no-untyped-call]
    """Collects `_Sizes` beside the pairwise operators."""

    def __init__(self, length: int, where: list[str]) -> None:
        super().__init__(length, where)
        self.sizes = _Sizes({}, {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        here = self.where[-1] if self.where else ""
        name = str(func)
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():  # reading a boolean mask is no attention
                self.sizes.largest[here] = max(self.sizes.largest.get(here, 0), x.numel())
        if "softmax" in name and "backward" not in name:
            self.sizes.softmax.setdefault(here, set()).add(args[0].shape[args[1]])
        elif "scaled_dot_product" in name:
            self.sizes.softmax.setdefault(here, set()).add(args[1].shape[-2])
        return result


def beyond_linear(model: nn.Module, *, window: int = 0, device: str = "meta") -> dict[str, str]:
    """Modules whose work grows faster than the length, with the reason; the model runs at two prime lengths.

    Three signs: an operator over all pairs of tokens (`quadratic_sites`), a softmax over more entries the longer the
    sequence is (so neither over a bounded window nor over features or experts), a tensor of floats that grows faster
    than the sequence.

    Args:
        model: a causal LM.
        window: tokens that a local branch may look at; the lengths are chosen well above it.
        device: of the token ids; on the meta device nothing is computed.
    """
    short, long = lengths(window)
    runs = []
    for length in (short, long):
        mode = _SizesOf(length, [])
        _run(model, length, device, mode)
        runs.append(mode)
    # At the long one alone: blocks of a linear attention may be longer than the short one.
    found = {path: f"{name} over all pairs of tokens" for path, name in runs[1].sites.items()}
    before, after = runs[0].sizes, runs[1].sizes
    for path in sorted({*before.softmax, *after.softmax}):
        few, many = before.softmax.get(path, set()), after.softmax.get(path, set())
        if max(many, default=0) > max(few, default=0):
            found.setdefault(
                path, f"softmax over {max(few, default=0)} entries at {short} tokens, {max(many)} at {long}"
            )
    for path, size in after.largest.items():
        if path and size > 2 * (long / short) * before.largest.get(path, size):
            found.setdefault(path, f"a tensor of {before.largest[path]} numbers at {short} tokens, {size} at {long}")
    return found


def lengths(window: int) -> tuple[int, int]:
    """The lengths at which `beyond_linear` runs a model."""
    short = _prime(max(PRIME, 4 * window + 1))
    return short, _prime(4 * short)


def _prime(least: int) -> int:
    while any(least % divisor == 0 for divisor in range(2, int(least**0.5) + 1)):
        least += 1
    return least
