"""Forward pass of lightning attention on a GPU: one program for a segment, a few query heads and BV value columns.

Source: Lightning Attention-2, arXiv 2401.04658, algorithm 1. Dimensions: B rows, T tokens, Hq query heads, Hkv
key/value heads, Hs heads of the decay and of the state, N sequences, D features of q and k, Dv of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bulk import bulk_copies, head_steps
from .hopper import Pair, chunk_sums, fits_hopper, hopper_sweep
from .launch import sweep_config
from .shape import Shape, outputs_per_program, padded, precision
from .states import entering_states
from .sweep import FORWARD, locate, rows_of, sweep

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


@triton.jit(do_not_specialize=["scale", "length", "segment", "segments", "sequences", "tokens"])
def forward_kernel(
    q, k, v, steps, o, log_decay, mask, cu_seqlens, sums, entering, entering_sum, final, final_sum,
    scale, length, segment, segments, sequences, tokens, query_heads, shared, heads,
    stride_q_row, stride_q, stride_q_head, stride_k_row, stride_k, stride_k_head, stride_v_row, stride_v, stride_v_head,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, ENTERING: tl.constexpr,
    FINAL: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """o, 1/z (sums) and the final state; `entering` is the state before each segment."""
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    programs = query_heads // GROUP
    block, first, item = pid % blocks, (pid // blocks) % programs * GROUP, pid // (blocks * programs)
    sequence, row, start, stop, _, end = locate(item, cu_seqlens, length, segment, segments, sequences, SEQUENCES)
    if sequence >= sequences:
        return
    head = first // (query_heads // heads)
    column = block * BV
    row, own_head, pair_head = row.to(tl.int64), first.to(tl.int64), (first // (query_heads // shared)).to(tl.int64)
    dims, columns = tl.arange(0, BD), column + tl.arange(0, BV)
    keep = (dims < D)[:, None] & (columns < V)[None, :]
    state = tl.zeros([BD, BV], tl.float32)
    extra = tl.zeros([BD, 16], tl.float32)
    if ENTERING:
        here = item.to(tl.int64) * heads + head
        state = tl.load(entering + here * D * V + dims[:, None] * V + columns[None, :], mask=keep, other=0.0)
        if NORMALIZE:
            extra += tl.load(entering_sum + here * D + dims, mask=dims < D, other=0.0)[:, None]
    q = rows_of(q + row * stride_q_row + own_head * stride_q_head, end, stride_q, steps, D, C, BD, GROUP, BULK)
    k = rows_of(k + row * stride_k_row + pair_head * stride_k_head, end, stride_k, steps, D, C, BD, 1, BULK)
    v = rows_of(v + row * stride_v_row + pair_head * stride_v_head, end, stride_v, steps, V, C, BV, 1, BULK)
    state, extra = sweep(
        q, k, v, o + (row * length * query_heads + first) * V, steps, steps,
        log_decay + row * length * heads * PER_TOKEN + head, mask + row * length,
        sums, sums, sums + own_head * tokens + row * length, q, sums,
        state, extra, start, stop, column, scale,
        stride_q, stride_k, stride_v, query_heads * V, heads, tokens, 0, 0, start,
        stride_q_head, 0, V,
        FORWARD, D, V, BD, BV, C, GROUP, PER_TOKEN, MASKED, NORMALIZE, False, PRECISION, BULK, FINAL,
    )  # fmt: skip
    if FINAL:
        if (stop == end) & (first % (query_heads // heads) == 0):
            here = sequence.to(tl.int64) * heads + head
            tl.store(final + here * D * V + dims[:, None] * V + columns[None, :], state, mask=keep)
            if NORMALIZE:
                if block == 0:
                    tl.store(final_sum + here * D + dims, tl.sum(extra, 1) / 16, mask=dims < D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, shape: Shape, *, scale: float,
    initial: Pair = (None, None), final: bool = False,
    cu_seqlens: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Pair, Pair]:  # fmt: skip
    """Launch the forward pass.

    Args:
        q, k, v: `[B, T, Hq, D]`, `[B, T, Hkv, D]`, `[B, T, Hkv, Dv]`, one dtype, contiguous last dimension.
        log_decay: fp32 `[Hs]` or `[B, T, Hs]`, contiguous.
        shape: their sizes.
        scale: factor of the output; 1 when the output is normalised.
        initial: fp32 state `[N, Hs, D, Dv]` and, normalised, sum state `[N, Hs, D]`, contiguous.
        final: compute the state behind the last token.
        cu_seqlens: `[N + 1]` integers.
        mask: uint8 `[B, T]`, contiguous.

    Returns:
        o `[B, T, Hq, Dv]`; 1/z fp32 `[Hq, B, T]` or None; final state and sum state; the pair that enters each
        segment, which the backward pass needs.
    """
    o = v.new_empty(shape.rows, shape.length, shape.query_heads, shape.value_dim)
    vectors = (shape.query_heads, shape.rows, shape.length)
    sums = v.new_empty(vectors, dtype=torch.float32) if shape.normalize else None
    leaving: Pair = (None, None)
    if final:
        state = v.new_empty(shape.sequences, shape.heads, shape.dim, shape.value_dim, dtype=torch.float32)
        leaving = state, v.new_empty(state.shape[:3], dtype=torch.float32) if shape.normalize else None
    config = sweep_config("forward", shape.dim, shape.value_dim, q.dtype, shape.normalize, shape.narrow)
    entering = entering_states(k, v, log_decay, mask, cu_seqlens, initial, shape, config, exact=final)
    # A NaN of the next sequence would come into the state that is handed on there.
    if not (final and shape.packed) and fits_hopper(shape, q, k, v):
        hopper_sweep(
            (q, k, v, o), None, log_decay, scale, entering, shape,
            leaving=leaving, into="v", cu_seqlens=cu_seqlens, sums=chunk_sums(log_decay), made=sums,
        )  # fmt: skip
        return o, sums, leaving, entering

    def given(tensor: Tensor | None) -> Tensor:  # a pointer that is not read still has to be one
        return o if tensor is None else tensor

    block, group = min(config.columns, padded(shape.value_dim)), outputs_per_program(shape)
    bulk = bulk_copies(shape, config, group, (q, k, v))
    forward_kernel[(triton.cdiv(shape.value_dim, block) * (shape.query_heads // group) * shape.items,)](
        q, k, v, head_steps(q), o, log_decay, given(mask), given(cu_seqlens), given(sums),
        given(entering[0]), given(entering[1]), given(leaving[0]), given(leaving[1]),
        scale, shape.length, shape.segment, shape.segments, shape.sequences, shape.rows * shape.length,
        shape.query_heads, shape.shared, shape.heads,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        D=shape.dim, V=shape.value_dim, BD=padded(shape.dim), BV=block, C=config.chunk, GROUP=group,
        PER_TOKEN=shape.per_token, MASKED=shape.masked, NORMALIZE=shape.normalize,
        ENTERING=entering[0] is not None, FINAL=final, SEQUENCES=shape.block_sequences,
        PRECISION=precision(q.dtype), BULK=bulk, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return o, sums, leaving, entering
