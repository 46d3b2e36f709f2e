"""The swapped layers' place in transformers' attention interface.

A file of the checkpoint runtime: it imports torch, transformers and its neighbours only.

One dispatcher function is registered with `AttentionInterface`. A layer that has a `swap` submodule is computed
by it; every other layer goes to the implementation that the model would have used. Projections, q/k norms and
RoPE stay the model's own: they happen before the dispatch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .cache import adopt
from .inputs import NoRotary, layer_inputs
from .masks import unpacked
from .swap import LightningSwap, Observer

PREFIX = "swapattn_"
BASES = ("sdpa", "eager")
PADDING_ONLY = PREFIX + "padding_only_"  # before the base, for adapted families without a kept layer


def _softmax_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The stock implementation; `eager` is a function of the model's own file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]


def compute(
    swap: LightningSwap, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, given: Mapping[str, Any]
) -> torch.Tensor:
    """What a swapped layer puts out, `[B, T, Hq, Dv]`, for q `[B, Hq, T, D]`, k and v; see `LightningSwap.call`."""
    cache, swap.found.cache_layer = swap.found.cache_layer, None
    seen = cache.seen_before(q.shape[-2]) if cache is not None else 0
    count = cache.count if cache is not None else None
    output: torch.Tensor = swap(swap.call(q, k, v, mask, seen, given, count), cache)
    batch, _, length, _ = q.shape
    return output.reshape(batch, length, *output.shape[2:]).contiguous()  # as stock: some models take views of it


def _dispatcher(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        swap: LightningSwap | None = getattr(module, "swap", None)
        if swap is None or swap.observer is not None:
            mask = _additive(attention_mask, query, key) if base == "eager" else attention_mask
            output, weights = _softmax_function(base, module)(module, query, key, value, mask, **kwargs)
            if swap is not None and swap.observer is not None:
                swap.observer(swap, swap.call(query, key, value, attention_mask, 0, kwargs), output)
            return output, weights
        return compute(swap, query, key, value, attention_mask, kwargs), None

    return attention


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The numbers that eager adds to the scores, of sdpa's mask.

    That is None for a single token, which sees all keys, and for the first tokens, where it would be causal.
    """
    if mask is None:
        length, keys = query.shape[-2], key.shape[-2]
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril() if length > 1 else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), torch.finfo(query.dtype).min)


def _mask_function(base: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        found = ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
        # transformers looks for packed sequences only where there is no padding mask.
        return unpacked(found) if kwargs.get("attention_mask") is not None else found

    return mask


def _padding_only(base: str) -> Callable[..., Any]:
    def mask(*args: Any, batch_size: int, kv_length: int, mask_function: Any, device: Any, **kwargs: Any) -> Any:
        """Real tokens, bool `[B, S]`: swapped layers need no more, and nothing quadratic is made."""
        if mask_function is not causal_mask_function:  # sequences are packed: their borders are in the whole mask
            given = {"batch_size": batch_size, "kv_length": kv_length, "mask_function": mask_function, "device": device}
            return _mask_function(base)(*args, **given, **kwargs)
        known = kwargs.get("attention_mask")
        if known is None:
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        known = known[:, -kv_length:].bool()
        return F.pad(known, (0, kv_length - known.shape[1]))  # a static cache has room for tokens to come

    return mask


def register() -> None:
    """Register the dispatcher and its mask for each stock implementation that kept layers may use; idempotent.

    The mask is sdpa's for eager too, whose own is a number for each pair of tokens, also where no layer is kept.
    """
    for base in BASES:
        AttentionInterface.register(PREFIX + base, _dispatcher(base))
        AttentionMaskInterface.register(PREFIX + base, _mask_function("sdpa"))
        AttentionMaskInterface.register(PADDING_ONLY + base, _padding_only(base))


def find_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a swapped attention module: find what the attention function is not given.

    That is the `Cache`, by type, whatever its argument is called, and the module's inputs where the layer reads them.
    """
    swap: LightningSwap = module.swap  # or what peft wraps around it (`modules_to_save`), which passes all on to it
    if swap.reads_inputs:
        swap.found.inputs = layer_inputs(args, kwargs)
    if swap.observer is None:
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        swap.found.cache_layer = adopt(cache, swap.layer_idx) if cache is not None else None


def swaps(model: nn.Module) -> dict[str, LightningSwap]:
    """All swapped layers of a model by the path of their attention module, in the order of the layers."""
    named = model.named_modules()
    found = {name.removesuffix(".swap"): module for name, module in named if isinstance(module, LightningSwap)}
    return dict(sorted(found.items(), key=lambda item: item[1].layer_idx))


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Let the model compute its own softmax attention, and show each call of a swapped layer to the observer."""
    layers = list(swaps(model).values())
    nopes = [module for module in model.modules() if isinstance(module, NoRotary)]  # the teacher has its embedding
    for swap in layers:
        swap.observer = observer
    for nope in nopes:
        nope.active = False
    try:
        yield
    finally:
        for swap in layers:
            swap.observer = None
        for nope in nopes:
            nope.active = True


def set_branch(model: nn.Module, branch: Literal["both", "linear", "local"]) -> None:
    """Let every swapped layer compute one branch at full weight: the window-only baseline, or the linear part alone."""
    for swap in swaps(model).values():
        swap.branch = branch


@contextmanager
def only_branch(model: nn.Module, branch: Literal["linear", "local"]) -> Iterator[None]:
    """`set_branch` for the time."""
    set_branch(model, branch)
    try:
        yield
    finally:
        set_branch(model, "both")
