"""The recurrent cache layer that takes a softmax layer's place in any transformers `Cache`.

A file of the checkpoint runtime: it imports torch, transformers and its neighbours only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .masks import recorded
from .rollback import Rollback

# What models call their cache, as an argument and in their outputs: renamed in transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LightningCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):  # type: ignore[misc]
    """State of one swapped layer; its size does not depend on the number of tokens.

    It inherits both mixins: the linear one makes transformers size the masks on a real softmax layer where there
    is one, the other keeps the sequence length known where there is none.

    Tensors, all with the batch first, allocated by the first forward pass:
        state: fp32 `[B, Hs, D, Dv]`, the sum of decayed φ(k)vᵀ.
        norm: fp32 `[B, Hs, D]` or None, the sum of decayed φ(k).
        ring_k, ring_v: `[B, sinks + window + 1, Hkv, D or Dv]` or None: the first `sinks` and the last `window`
            tokens of the local branch; the last slot takes what need not be kept.
        ring_linear: as ring_k, or None: the same keys as the linear branch takes them over, where that goes without
            their rotary embedding.
        ring_position: int64 `[B, sinks + window + 1]`, position among the row's real tokens, −1 = empty.
        count: int64 `[B]`, real tokens seen by each row.

    Attributes:
        seen: tokens seen, padding included. Where the cache is static it is a tensor on the device from the first
            token on, int64 `[]`: a number on the host would be a constant of the compiled step.
        record_past: keep what `crop` needs; set by the generate modes that draft tokens, through
            `Cache.activate_past_recording`. Otherwise nothing is kept and nothing is done for it.
        rollback: what is kept.
        static_length: length of the cache where its other layers are static, 0 if they drop old tokens and do not tell,
            None if they are not. In a static cache all tensors are changed in place, from call to call: a recorded
            CUDA graph knows no more of them than their addresses.
    """

    is_croppable = True
    is_sliding = False
    TENSORS = ("state", "norm", "ring_k", "ring_v", "ring_linear", "ring_position", "count")

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.seen: int | torch.Tensor = 0
        self.record_past = False
        self.rollback = Rollback()
        self.static_length: int | None = None
        for name in self.TENSORS:
            setattr(self, name, None)

    state: torch.Tensor | None
    norm: torch.Tensor | None
    ring_k: torch.Tensor | None
    ring_v: torch.Tensor | None
    ring_linear: torch.Tensor | None
    ring_position: torch.Tensor | None
    count: torch.Tensor | None

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` makes whole masks: kept static layers would attend to tokens taken back without.

        Beside dynamic layers, or alone, the layer has no use for one, and it would grow with every token.
        """
        return self.static_length is not None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the attention layer knows the shapes and allocates."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Count the new tokens and hand keys and values `[B, Hkv, T, D]` back; nothing is appended."""
        if self.static_length is not None and not isinstance(self.seen, torch.Tensor):
            self.seen = self._at_fixed_address(torch.zeros((), dtype=torch.long, device=key_states.device))
        self._leave_inference_mode()
        self._count(key_states.shape[-2])
        self.is_initialized = True
        return key_states, value_states

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Refuse: a swapped layer has no convolution."""
        raise TypeError("a swapped attention layer has no convolution state")

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Refuse: the layer's own recurrence lives elsewhere (a model that mixes both in one layer)."""
        raise TypeError("a swapped attention layer keeps its own state; this model type mixes both in one layer")

    def _leave_inference_mode(self) -> None:
        """Copy what inference mode made, where it is over: that cannot be changed in place outside of it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        for name in (*self.TENSORS, "seen"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(self, name, self._at_fixed_address(value.clone()))

    def _count(self, tokens: int) -> None:
        if isinstance(self.seen, torch.Tensor):
            self.seen.add_(tokens)
        else:
            self.seen += tokens

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen, padding included."""
        return self.seen

    def seen_before(self, length: int) -> int | torch.Tensor:
        """Tokens seen before the last `length`; the int 0 at the start, which the host knows without the device."""
        return self.seen - length if self.state is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | torch.Tensor]:
        """Length and offset of the key axis that a mask for `query_length` new tokens covers."""
        seen = self.seen
        if isinstance(seen, torch.Tensor) and not recorded(seen):
            seen = int(seen)  # `generate` makes the mask before its compiled step, when host and device wait anyway
        if self.static_length == 0:
            return query_length, seen  # of one size, step by step
        # transformers sizes the mask of all full layers on the first one, and static layers want all of their slots.
        length = self.static_length or 0
        if isinstance(seen, torch.Tensor):
            torch._assert_async(seen <= length - query_length, f"a static cache of {length} tokens is full")
            return length, 0
        return max(seen + query_length, length), 0

    def get_max_length(self) -> int:
        """Length of the cache where it is static: bloom pads its mask to that; else −1, for there is no maximum."""
        return self.static_length or -1

    def activate_past_recording(self) -> None:
        """From here on keep what `crop` needs, for the last `rollback.MOST_TOKENS` tokens at least."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, exactly, and commit to the others: a next call cannot go further back.

        Args:
            tokens_to_remove: −n for n tokens, 0 to commit only, as transformers' own layers take it.

        Raises:
            RuntimeError: the layer has not recorded that many.
            ValueError: positive, a length in old versions of transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to remove, found {tokens_to_remove}")
        tokens_to_remove = int(tokens_to_remove)  # a tensor in transformers 5.17
        self._leave_inference_mode()
        self.rollback.take_back(-tokens_to_remove, self)
        self._count(tokens_to_remove)

    def tensors(self) -> list[tuple[str, torch.Tensor | None]]:
        """Name and value of every tensor."""
        return [(name, getattr(self, name)) for name in self.TENSORS]

    def restore(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        """Take over what `tensors()` gave."""
        for name in self.TENSORS:
            self._put(name, tensors[name])
        self._leave_inference_mode()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.is_initialized = False
        self.rollback.forget()
        for name in self.TENSORS:
            setattr(self, name, None)

    def _put(self, name: str, tensor: torch.Tensor | None) -> None:
        """Set a tensor; of a static cache in place, unless there is none yet or its size changes."""
        held = getattr(self, name)
        if self.static_length is not None and held is not None and tensor is not None and held.shape == tensor.shape:
            held.copy_(tensor)
        else:
            setattr(self, name, self._at_fixed_address(tensor) if tensor is not None else None)

    def _at_fixed_address(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, marked if the cache is static: a compiled step that changes other inputs is no CUDA graph."""
        if self.static_length is not None and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def _map(self, function: Any) -> None:
        self._leave_inference_mode()
        self.rollback.map(function)
        for name in self.TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                self._put(name, function(tensor))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take row `beam_idx[i]` as row i (beam search)."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these numbers, or those that are True."""
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Keep the state where it is: it is small."""

    def prefetch(self) -> None:
        """Nothing was offloaded."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (getattr(self, name) for name in self.TENSORS)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def past(self) -> Any:
        """Initial state for `lightning_attention`: the state, the pair with the norm, or None at the start."""
        return (self.state, self.norm) if self.norm is not None else self.state

    def keep(self, final: Any) -> None:
        """Take over a final state; cloned, for it may be a view of the states of all chunks."""
        if isinstance(final, tuple):
            for name, tensor in zip(("state", "norm"), final, strict=True):
                self._put(name, tensor.clone())
        else:
            self._put("state", final.clone())

    def positions(self, tokens: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Positions `[B, T]` of new tokens among their row's real tokens, −1 for padding; advances `count`."""
        if self.count is None:
            self._put("count", torch.zeros(batch, dtype=torch.long, device=device))
            assert self.count is not None
        if tokens is None:
            positions = self.count[:, None] + torch.arange(length, device=device)
            self.count.add_(length)
            return positions
        running = self.count[:, None] + tokens.long().cumsum(1)
        self.count.copy_(running[:, -1])
        return torch.where(tokens, running - 1, -1)

    @property
    def leaving_keys(self) -> torch.Tensor | None:
        """The ring of keys as the linear branch takes them over."""
        return self.ring_k if self.ring_linear is None else self.ring_linear

    def in_order(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A ring of keys, ring_v and ring_position in the order of positions, empty slots first."""
        assert self.ring_v is not None
        assert self.ring_position is not None
        position, order = self.ring_position.sort(dim=1)
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        return keys[rows, order], self.ring_v[rows, order], position

    def match(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Hold the ring in the dtypes of new keys and values: what came before may have been read under autocast."""
        for name, new in (("ring_k", k), ("ring_v", v), ("ring_linear", k)):
            held = getattr(self, name)
            if held is not None and held.dtype != new.dtype:
                setattr(self, name, self._at_fixed_address(held.to(new.dtype)))

    def remember(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        window: int,
        sinks: int,
        linear: torch.Tensor | None = None,
    ) -> None:
        """Keep of new tokens k, v `[B, T, Hkv, D]` at `positions` `[B, T]` what later tokens attend to locally.

        `linear` are the keys as the linear branch takes them over, where those are others.
        """
        batch = k.shape[0]
        slots = sinks + window
        if self.ring_k is None or self.ring_v is None or self.ring_position is None:
            self._put("ring_k", k.new_zeros(batch, slots + 1, *k.shape[2:]))
            self._put("ring_v", v.new_zeros(batch, slots + 1, *v.shape[2:]))
            self._put("ring_linear", None if linear is None else linear.new_zeros(batch, slots + 1, *linear.shape[2:]))
            self._put("ring_position", positions.new_full((batch, slots + 1), -1))
        assert self.ring_k is not None
        assert self.ring_v is not None
        assert self.ring_position is not None
        assert self.count is not None
        sink = (positions >= 0) & (positions < sinks)
        recent = (positions >= sinks) & (positions >= self.count[:, None] - window)
        slot = torch.where(sink, positions, torch.where(recent, sinks + (positions - sinks) % window, slots))
        rows = torch.arange(batch, device=k.device)[:, None]
        self.ring_k[rows, slot] = k
        self.ring_v[rows, slot] = v
        if linear is not None:
            assert self.ring_linear is not None
            self.ring_linear[rows, slot] = linear
        self.ring_position[rows, slot] = positions
        self.ring_position[:, slots] = -1


def _static_length(layer: Any) -> int | None:
    """Tokens that a static layer has room for; 0 for one that drops old ones, and so for any number; else None."""
    if isinstance(layer, LightningCacheLayer):
        return layer.static_length
    keeps_all = not getattr(layer, "is_sliding", False) or getattr(layer, "is_croppable", False)
    length: int | None = getattr(layer, "max_cache_len", None)
    return length if keeps_all or length is None else 0


def adopt(cache: Any, layer_idx: int) -> LightningCacheLayer:
    """Put a `LightningCacheLayer` at `layer_idx` of a transformers `Cache`, unless it is there, and return it.

    Raises:
        TypeError: a cache of an encoder-decoder, or one that already holds keys of a softmax layer there.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"a swapped layer cannot use a cache of type {type(cache).__name__}")
    while len(cache.layers) <= layer_idx:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer = cache.layers[layer_idx]
    if isinstance(layer, LightningCacheLayer):
        return layer
    if isinstance(layer, CacheLayerMixin) and layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise TypeError(f"the cache already holds softmax keys for layer {layer_idx}, which is swapped")
    recurrent = LightningCacheLayer()
    recurrent.record_past = getattr(layer, "record_past", False)
    lengths = [length for length in map(_static_length, cache.layers) if length is not None]
    recurrent.static_length = max(lengths, default=None)
    cache.layers[layer_idx] = recurrent
    return recurrent
