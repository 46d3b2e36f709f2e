"""`local_attention_cached` as a Triton kernel: a few new tokens on keys in any order, such as a ring of the last ones.

Dimensions as in `local_kernels`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of local_attention need triton") from error

from .local_kernels import LN_2, load_features, softmax_step, store_features
from .local_op import LocalConfig, promoted, sizes
from .shape import addressable, padded
from .sweep import LOG2E

_NAMESPACE = re.sub(r"\W", "_", __name__)  # as in `local_op`


@triton.jit(do_not_specialize=["scale", "length", "slots", "window", "sinks"])
def cached_kernel(
    q, k, v, o, lse, q_position, k_position,
    scale, length, slots, window, sinks, query_heads, group,
    stride_q_row, stride_q, stride_q_head, stride_k_row, stride_k, stride_k_head, stride_v_row, stride_v, stride_v_head,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """o of a few new tokens on keys in any order; the rows of a tile are the tokens and heads of a group.
    With LSE also the natural logarithm of the sum of weights `[B, T, Hq]`.
    """
    pieces, shared = tl.cdiv(length * group, BM), query_heads // group
    pid = tl.program_id(0)
    piece, head, row = pid % pieces, (pid // pieces % shared).to(tl.int64), (pid // (pieces * shared)).to(tl.int64)
    index = piece * BM + tl.arange(0, BM)
    token, query_head = index // group, head * group + index % group
    position = tl.load(q_position + row * length + token, mask=token < length, other=-1)
    real, here = position >= 0, token < length
    dims, columns = tl.arange(0, BD), tl.arange(0, BV)
    there = row * stride_q_row + token.to(tl.int64) * stride_q + query_head * stride_q_head
    queries = load_features(q, there, real, dims, D, BD)
    factor = scale * LOG2E
    acc = tl.zeros([BM, BV], tl.float32)
    top, weight = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for slot in range(0, slots, BN):
        j = slot + tl.arange(0, BN)
        number = tl.load(k_position + row * slots + j, mask=j < slots, other=-1)
        held = number >= 0  # an empty slot may hold NaN: it is not read
        spot = row * stride_k_row + j.to(tl.int64) * stride_k + head * stride_k_head
        keys = load_features(k, spot, held, dims, D, BD)
        spot = row * stride_v_row + j.to(tl.int64) * stride_v + head * stride_v_head
        values = load_features(v, spot, held, columns, V, BV)
        distance = position[:, None] - number[None, :]
        seen = (distance >= 0) & ((distance < window) | (number < sinks)[None, :]) & (held[None, :] & real[:, None])
        acc, top, weight = softmax_step(acc, top, weight, queries, keys, values, seen, factor, PRECISION)
    weight = tl.where(weight > 0, weight, 1.0)
    acc = acc / weight[:, None]
    there = (row * length + token) * query_heads + query_head
    store_features(o, there * V, acc, here, columns, V, BV)
    if LSE:
        logarithm = tl.where(top > float("-inf"), (top + tl.log2(weight)) * LN_2, 0.0)
        tl.store(lse + there, logarithm, mask=here)


def cached_config(rows: int, dim: int, value_dim: int, dtype: torch.dtype) -> LocalConfig:
    """Launch parameters for `rows` = new tokens times query heads of a group."""
    wide = max(dim, value_dim) > 128 or dtype == torch.float32
    return LocalConfig(min(padded(rows), 32 if wide else 64), 32 if wide else 64, 4, 2)


@torch.library.custom_op(f"{_NAMESPACE}::cached", mutates_args=())
def _cached(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> list[Tensor]:  # fmt: skip
    """o `[B, T, Hq, Dv]`, and with `return_lse` the natural logarithm of the sum of weights, fp32 `[B, T, Hq]`."""
    q, k, v = addressable(q), addressable(k), addressable(v)
    rows, length, heads = q.shape[:3]
    shared = k.shape[2]
    group = heads // shared
    config = cached_config(length * group, q.shape[3], v.shape[3], q.dtype)
    o = v.new_empty(rows, length, heads, v.shape[3])
    lse = [v.new_empty(rows, length, heads, dtype=torch.float32)] if return_lse else []
    cached_kernel[(-(-length * group // config.block) * shared * rows,)](
        q, k, v, o, *(lse or [o]), q_positions, k_positions, scale, length, k.shape[1], window, sinks, heads, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **sizes(q, v),
        BM=config.block, BN=config.step, LSE=return_lse, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return [o, *lse]


@_cached.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> list[Tensor]:  # fmt: skip
    o = v.new_empty(*q.shape[:3], v.shape[3])
    return [o, v.new_empty(q.shape[:3], dtype=torch.float32)] if return_lse else [o]


def local_attention_cached_kernel(
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
    """`local_attention_cached` by one kernel, without a gradient; arguments checked by the caller."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    positions = q_positions.contiguous(), k_positions.contiguous()
    o, *lse = _cached(*promoted(q, k, v), *positions, scale, window, sinks, return_lse)
    o = o.to(v.dtype)
    return (o, lse[0]) if return_lse else o
