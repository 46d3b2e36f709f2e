"""Causal softmax attention over the last `window` and the first `sinks` tokens, O(T * window) in time and memory.

The softmax branch that may stand beside the linear one: sinks as in StreamingLLM, arXiv 2309.17453, blocks as in
Longformer, arXiv 2004.05150. This is the plain PyTorch form; on a GPU the Triton kernels of `local_op` take over.

Dimensions: B rows, T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D features of q and k, Dv of v,
W tokens in a block, NB blocks, N sequences, S keys given to the cached form.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import accumulation_dtype, check_boundaries, check_mask, no_autocast
from .switch import on_kernels

MOST_SINKS = 64  # of the kernels

# Blocks shorter than this cost more in small matmuls than they save in hidden scores.
_SMALLEST_BLOCK = 32


class _Sizes(TypedDict):
    """What the forms for whole sequences take alike."""

    window: int
    sinks: int
    scale: float | None
    cu_seqlens: Tensor | None
    mask: Tensor | None


class _Blocks(NamedTuple):
    """Where tokens lie once every sequence, freed of its hidden tokens, starts a block of its own."""

    slot: Tensor | None  # [B * T] place of each token among the NB * W + 1 slots, the last one for hidden tokens;
    #                      None if the blocks are the padded rows themselves
    number: Tensor  # [NB] number of the block within its sequence
    first: Tensor  # [NB] first block of the same sequence


@overload
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scale: float | None = None,
    cu_seqlens: Tensor | None = None, mask: Tensor | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scale: float | None = None,
    cu_seqlens: Tensor | None = None, mask: Tensor | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention over the last `window` and the first `sinks` tokens of each sequence.

    Args:
        q: queries `[B, T, Hq, D]`, before any feature map.
        k: keys `[B, T, Hkv, D]`; query head h reads key/value head h // (Hq // Hkv).
        v: values `[B, T, Hkv, Dv]`.
        window: number of tokens seen, the current one included, at least 1.
        sinks: number of tokens at the start of a sequence seen by all later ones, at least 0; a sink within the
            window counts once.
        scale: factor of the scores, None for D ** -0.5.
        cu_seqlens: `[N + 1]` integer boundaries, from 0 to T, of sequences packed in one row (B = 1); empty ones are
            allowed.
        mask: `[B, T]` bool; a False token is not attended, its output is 0, and it counts neither for the window
            nor for the sinks: a padded row gives what its real tokens give alone.
        return_lse: whether to return also lse, with which outputs on disjoint sets of keys can be merged.

    Returns:
        `[B, T, Hq, Dv]` in the dtype of v. Scores and softmax are float32 (float64 for float64 inputs). Nothing is
        read on the host.
        lse, with `return_lse`: `[B, T, Hq]` float32 (float64 for float64 inputs), the natural logarithm of the sum of
        exp(scale * q . k) over the keys seen, 0 for a hidden token; differentiable as the output is. The kernels lay
        the tokens of a head together.

    Raises:
        ValueError: if shapes, `window` or `sinks` do not fit.
    """
    _check(q, k, v, window, sinks)
    _check_whole(q, k, cu_seqlens, mask)
    if 0 in q.shape[:2]:
        nothing = v.new_zeros(*q.shape[:3], v.shape[-1])
        return (nothing, nothing.new_zeros(q.shape[:3], dtype=accumulation_dtype(q, k, v))) if return_lse else nothing
    if _on_kernels(sinks, q, k, v):
        from .local_op import local_attention_kernel

        return local_attention_kernel(
            q, k, v, window=window, sinks=sinks, scale=scale, cu_seqlens=cu_seqlens, mask=mask, return_lse=return_lse
        )
    rows, length = q.shape[:2]
    width = min(max(window, _SMALLEST_BLOCK), length)
    blocks = _padded_rows(q, width) if cu_seqlens is None and mask is None else _place(q, width, cu_seqlens, mask)
    queries = _split(q, blocks, width)
    keys, values = (_reach(_split(x, blocks, width), blocks, min(sinks, length)) for x in (k, v))
    hidden = _hidden(blocks.number, width, window, min(sinks, length))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = _join(_attend(queries, keys, values, hidden, scale), blocks, rows, length)
    if not return_lse:
        return out
    return out, _join(_logsumexp(queries, keys, hidden, scale, accumulation_dtype(q, k, v)), blocks, rows, length)


def merged_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Tensor,
    other_log_sum: Tensor,
    other_scale: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`local_attention` and an attention over other keys under one denominator, as if one softmax saw all of them.

    o = (e^lse * local + e^other_log_sum * other_scale * other) / (e^lse + e^other_log_sum)

    Args:
        q: as in `local_attention`, and so are k, v, window, sinks, scale, cu_seqlens and mask.
        other: output of the other attention `[B, T, Hq, Dv]`.
        other_log_sum: `[B, T, Hq]` natural logarithm of its weight, beside the lse of the window; -inf where it has
            none, and `other` is ignored.
        other_scale: `[Hq, Dv]` its factor.

    Returns:
        `[B, T, Hq, Dv]` in the dtype of v, 0 for a hidden token; differentiable in all six tensors.

    Raises:
        ValueError: if shapes, `window` or `sinks` do not fit.
    """
    _check(q, k, v, window, sinks)
    _check_whole(q, k, cu_seqlens, mask)
    expected = {
        "other": [*q.shape[:3], v.shape[3]],
        "other_log_sum": [*q.shape[:3]],
        "other_scale": [q.shape[2], v.shape[3]],
    }
    for (name, shape), x in zip(expected.items(), (other, other_log_sum, other_scale), strict=True):
        if [*x.shape] != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {list(x.shape)}")
    sizes: _Sizes = {"window": window, "sinks": sinks, "scale": scale, "cu_seqlens": cu_seqlens, "mask": mask}
    if 0 not in q.shape[:2] and _on_kernels(sinks, q, k, v, other):
        from .local_op import merged_local_attention_kernel

        return merged_local_attention_kernel(q, k, v, other, other_log_sum, other_scale, **sizes)
    local, lse = local_attention(q, k, v, return_lse=True, **sizes)
    if mask is not None:
        other_log_sum = other_log_sum.masked_fill(~mask[..., None], -torch.inf)
    # Filling, not weighting by 0: it may hold NaN.
    other = other.masked_fill((other_log_sum == -torch.inf)[..., None], 0)
    share = torch.sigmoid(lse - other_log_sum)[..., None]
    out = (other * ((1 - share) * other_scale) + local * share).to(v.dtype)
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)


@overload
def local_attention_cached(
    q: Tensor, k: Tensor, v: Tensor, *, k_positions: Tensor, q_positions: Tensor, window: int, sinks: int,
    scale: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def local_attention_cached(
    q: Tensor, k: Tensor, v: Tensor, *, k_positions: Tensor, q_positions: Tensor, window: int, sinks: int,
    scale: float | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def local_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_positions: Tensor,
    q_positions: Tensor,
    window: int,
    sinks: int,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`local_attention` of a few new tokens on keys in any order, such as a ring of the last ones and the sinks.

    Args:
        q: queries of the new tokens `[B, T, Hq, D]`.
        k: keys `[B, S, Hkv, D]`: what the cache holds and the new tokens.
        v: values `[B, S, Hkv, Dv]`.
        k_positions: `[B, S]` integer number of each key among the real tokens of its row, -1 for an empty slot, whose
            content is ignored. A position must not occur twice.
        q_positions: `[B, T]` the same for the queries, -1 for padding, whose output is 0.
        window: as in `local_attention`: keys at a distance 0 <= q - k < window are seen.
        sinks: as in `local_attention`: keys with k < sinks and k <= q are seen.
        scale: factor of the scores, None for D ** -0.5.
        return_lse: as in `local_attention`; 0 for padding and for a query that sees no key.

    Returns:
        `[B, T, Hq, Dv]` in the dtype of v, and lse if asked for. The T x S scores are dense: meant for decoding
        and short pieces.

    Raises:
        ValueError: if shapes, `window` or `sinks` do not fit.
    """
    _check(q, k, v, window, sinks)
    for name, positions, tokens in (("k_positions", k_positions, k), ("q_positions", q_positions, q)):
        if positions.shape != tokens.shape[:2]:
            raise ValueError(f"{name}: expected shape {list(tokens.shape[:2])}, found {list(positions.shape)}")
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.numel() > 0 and not differentiated and _on_kernels(0, q, k, v):
        from .local_cached import local_attention_cached_kernel

        return local_attention_cached_kernel(
            q, k, v, k_positions=k_positions, q_positions=q_positions, window=window, sinks=sinks, scale=scale,
            return_lse=return_lse,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    held, real = k_positions >= 0, q_positions >= 0
    # Filling, not weighting by 0: an empty slot may hold NaN.
    k, v = (x.masked_fill(~held[..., None, None], 0) for x in (k, v))
    q = q.masked_fill(~real[..., None, None], 0)
    distance = q_positions[:, :, None] - k_positions[:, None]
    seen = (distance >= 0) & ((distance < window) | (k_positions < sinks)[:, None]) & held[:, None]
    # A row that sees nothing would be 0 / 0; its output is replaced below.
    blind = ~seen.any(-1, keepdim=True)
    hidden = ~(seen | blind)
    nothing = blind | ~real[..., None]
    out = _attend(q, k, v, hidden, scale).masked_fill(nothing[..., None], 0)
    if not return_lse:
        return out
    return out, _logsumexp(q, k, hidden, scale, accumulation_dtype(q, k, v)).masked_fill(nothing, 0)


def _on_kernels(sinks: int, *tensors: Tensor) -> bool:
    """Whether the Triton kernels take this call."""
    return on_kernels(*tensors, refused=f"{sinks} sinks are more than {MOST_SINKS}" if sinks > MOST_SINKS else None)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, H, D], found shape {list(x.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: expected [B, T, Hkv, D] with Hkv dividing Hq of q {list(q.shape)}, found {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected [B, T, Hkv] as k {list(k.shape)}, found shape {list(v.shape)}")
    if window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    if sinks < 0:
        raise ValueError(f"sinks: expected at least 0, found {sinks}")


def _check_whole(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    """Of whole sequences each token is a query and a key."""
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: expected {q.shape[1]} tokens as q, found {k.shape[1]}")
    if mask is not None:
        check_mask(mask, *q.shape[:2])
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, *q.shape[:2])


def _padded_rows(q: Tensor, width: int) -> _Blocks:
    count = -(-q.shape[1] // width)
    index = torch.arange(count, device=q.device).repeat(q.shape[0])
    return _Blocks(None, index, torch.arange(q.shape[0] * count, device=q.device) - index)


def _place(q: Tensor, width: int, cu_seqlens: Tensor | None, mask: Tensor | None) -> _Blocks:
    """Rows become sequences of one stream; (tokens + N (W - 1)) // W blocks hold them, however they are cut."""
    rows, length, device = q.shape[0], q.shape[1], q.device
    tokens = rows * length
    if cu_seqlens is None:
        bounds = torch.arange(rows + 1, device=device) * length
    else:
        bounds = cu_seqlens.long()
    real = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask.flatten()
    # Real tokens before each place of the stream: differences are the numbers of tokens within a sequence.
    before = F.pad(real.cumsum(0), (1, 0))
    starts = before[bounds[:-1]]
    chunks = (before[bounds[1:]] - starts + width - 1) // width
    last = chunks.cumsum(0)
    first = last - chunks
    sequences = bounds.shape[0] - 1
    count = (tokens + sequences * (width - 1)) // width
    owner = torch.searchsorted(bounds[1:].contiguous(), torch.arange(tokens, device=device), right=True)
    slot = first[owner] * width + before[:-1] - starts[owner]
    index = torch.arange(count, device=device)
    holder = torch.searchsorted(last, index, right=True).clamp(max=sequences - 1)
    return _Blocks(slot.where(real, count * width), index - first[holder], first[holder])


def _split(x: Tensor, blocks: _Blocks, width: int) -> Tensor:
    """`[B, T, H, D]` to `[NB, W, H, D]`, empty slots 0."""
    if blocks.slot is None:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % width))
        return torch.unflatten(x, 1, (-1, width)).flatten(0, 1)
    slots = x.new_zeros(blocks.number.shape[0] * width + 1, *x.shape[2:])
    return torch.unflatten(slots.index_copy(0, blocks.slot, x.flatten(0, 1))[:-1], 0, (-1, width))


def _join(x: Tensor, blocks: _Blocks, rows: int, length: int) -> Tensor:
    """`[NB, W, ...]` to `[B, T, ...]`, hidden tokens 0."""
    x = x.flatten(0, 1)
    if blocks.slot is None:
        return torch.unflatten(x, 0, (rows, -1))[:, :length]
    # The slot of hidden tokens lies behind the blocks and reads 0.
    x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
    return torch.unflatten(x.index_select(0, blocks.slot), 0, (rows, length))


def _reach(x: Tensor, blocks: _Blocks, sinks: int) -> Tensor:
    """What the queries of a block may see `[NB, 2 W + sinks, H, D]`: the block before, their own, the sinks."""
    before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
    slots = x.flatten(0, 1)
    places = blocks.first[:, None] * x.shape[1] + torch.arange(sinks, device=x.device)
    # A sequence may have fewer tokens than sinks: what is read beyond it is hidden.
    far = slots.index_select(0, places.clamp(max=slots.shape[0] - 1).flatten())
    return torch.cat([before, x, torch.unflatten(far, 0, places.shape)], 1)


def _hidden(index: Tensor, width: int, window: int, sinks: int) -> Tensor:
    """`[NB, W, 2 W + sinks]`, True where a query must not look. Every query sees itself, so no row is empty."""
    query = torch.arange(width, device=index.device)
    key = torch.arange(-width, width, device=index.device)
    distance = query[:, None] - key
    near = (distance < 0) | (distance >= window) | ((key < 0) & (index == 0)[:, None])[:, None]
    position = index[:, None] * width + query
    # A sink within the window is among the near keys already.
    far = position[..., None] - torch.arange(sinks, device=index.device) < window
    return torch.cat([near, far], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Masked softmax attention of `[R, T, Hq, D]` on `[R, S, Hkv, D]`, hidden `[R, T, S]`; dtype of v."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    shared, length = k.shape[2], q.shape[1]
    groups = q.shape[2] // shared
    rows = _grouped(q, shared).to(dtype)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=q.device).masked_fill(hidden, -torch.inf)
    bias = bias.repeat(1, groups, 1)[:, None]
    with no_autocast(q):
        out = F.scaled_dot_product_attention(
            rows, k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype), attn_mask=bias, scale=scale
        )
    return torch.unflatten(out, 2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2, 3).to(v.dtype)


def _logsumexp(q: Tensor, k: Tensor, hidden: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`[R, T, Hq]`: logarithm of the sum of weights in `_attend`, which keeps it to itself."""
    shared, length = k.shape[2], q.shape[1]
    groups = q.shape[2] // shared
    with no_autocast(q):
        scores = (_grouped(q, shared).to(dtype) * scale) @ k.permute(0, 2, 3, 1).to(dtype)
    lse = scores.masked_fill(hidden.repeat(1, groups, 1)[:, None], -torch.inf).logsumexp(-1)
    return torch.unflatten(lse, 2, (groups, length)).permute(0, 3, 1, 2).flatten(2, 3)


def _grouped(q: Tensor, shared: int) -> Tensor:
    """`[R, Hkv, G * T, D]`: query heads of a group are further rows of one matmul, so keys and values do not repeat."""
    return torch.unflatten(q, 2, (shared, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
