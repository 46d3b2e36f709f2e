"""Backward pass of lightning attention on a GPU: three sweeps in one launch, none of which waits for another.

Source: Lightning Attention-2, arXiv 2401.04658, algorithm 2. dk and dv are separate programs rather than one: each
keeps half the state, and both read the same q and do at the same time, so that the second read comes from the cache.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .bulk import bulk_copies, head_steps
from .decay import decay_gradient
from .hopper import CHUNK, chunk_sums, fits_hopper, hopper_sweep
from .launch import in_memory, sweep_config
from .shape import Shape, outputs_per_program, padded, precision
from .states import entering_states
from .sweep import GRAD_K, GRAD_Q, GRAD_V, locate, rows_of, sweep

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


@triton.jit(do_not_specialize=["length", "tokens"])
def delta_kernel(
    o, do, delta, inverse, d_inverse, length, heads, tokens, stride_row, stride, stride_head,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """z times the gradient of the sum z of the weights, for every head and token, o contiguous.

    Through o = N / z that is -(do . o); with SUM the caller has a use of 1/z of its own.
    """
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    token = (pid // heads).to(tl.int64) * C + tl.arange(0, C)
    columns = tl.arange(0, BV)
    ok = token < tokens
    keep = ok[:, None] & (columns < V)[None, :]
    other = token // length * stride_row + token % length * stride + head * stride_head
    x = tl.load(o + (token * heads + head)[:, None] * V + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    y = tl.load(do + other[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    place = head * tokens + token
    reached = -tl.sum(x * y, 1)
    if SUM:
        used = tl.load(inverse + place, mask=ok, other=0.0) * tl.load(d_inverse + place, mask=ok, other=0.0)
        reached -= used
    tl.store(delta + place, reached, mask=ok)


@triton.jit
def start_state(
    entering, entering_sum, here, dims, columns,
    A: tl.constexpr, V: tl.constexpr, BA: tl.constexpr, BV: tl.constexpr, STRIDE_A: tl.constexpr,
    STRIDE_V: tl.constexpr, ENTERING: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """State tile `[BA, BV]` and sum state `[BV]`, from memory where there is one."""
    state = tl.zeros([BA, BV], tl.float32)
    extra = tl.zeros([BV], tl.float32)
    if ENTERING:
        place = here * A * V + dims[:, None] * STRIDE_A + columns[None, :] * STRIDE_V
        state = tl.load(entering + place, mask=(dims < A)[:, None] & (columns < V)[None, :], other=0.0)
        if SUM:
            extra = tl.load(entering_sum + here * V + columns, mask=columns < V, other=0.0)
    return state, extra


_SIZES = ["scale", "length", "segment", "segments", "sequences", "tokens", "stride_dots_q", "stride_dots_k"]


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    q, k, v, do, steps_q, steps_do, dq, dk, dv, log_decay, mask, cu_seqlens, factor, delta, dots_q, dots_k,
    entering, entering_sum, behind, behind_sum, first_state, first_sum,
    scale, length, segment, segments, sequences, tokens, query_heads, shared, heads,
    stride_q_row, stride_q, stride_q_head, stride_k_row, stride_k, stride_k_head,
    stride_v_row, stride_v, stride_v_head, stride_do_row, stride_do, stride_do_head, stride_dots_q, stride_dots_k,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TD: tl.constexpr, TV: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, ENTERING: tl.constexpr, BEHIND: tl.constexpr, FIRST: tl.constexpr, DOTS: tl.constexpr,
    SEQUENCES: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """dq (DIRECT), or dk, dv and the gradient of the initial state.

    `entering` is the state before each segment, `behind` its gradient after each. A program owns TD of the D columns
    of dq or dk, or TV of those of dv, padded to BD and BV, for GROUP query heads: all that share a state for dk and
    dv, which are written for every state.
    """
    blocks_d, blocks_v = tl.cdiv(D, TD), tl.cdiv(V, TV)
    pid = tl.program_id(0)
    blocks = blocks_d if DIRECT else blocks_d + blocks_v
    programs = query_heads // GROUP if DIRECT else heads
    block, first, item = pid % blocks, pid // blocks % programs * GROUP, pid // (blocks * programs)
    head = first // (query_heads // heads)
    sequence, row, start, stop, part, end = locate(item, cu_seqlens, length, segment, segments, sequences, SEQUENCES)
    if sequence >= sequences:
        return
    row, own_head, pair_head = row.to(tl.int64), first.to(tl.int64), (first // (query_heads // shared)).to(tl.int64)
    here = item.to(tl.int64) * heads + head
    final = (sequence.to(tl.int64) * heads + head) * D
    token, own = row * length * query_heads + first, row * length * heads + head
    states_k = (row * heads + head) * length  # of dots_k
    q += row * stride_q_row + own_head * stride_q_head
    k += row * stride_k_row + pair_head * stride_k_head
    v += row * stride_v_row + pair_head * stride_v_head
    do += row * stride_do_row + own_head * stride_do_head
    log_decay += own if PER_TOKEN else head
    mask += row * length
    factor += own_head * tokens + row * length
    delta += own_head * tokens + row * length
    if DIRECT:
        column_q = block * TD
        dims_q, columns_q = tl.arange(0, BV), column_q + tl.arange(0, TD)
        state_q, extra_q = start_state(
            entering, entering_sum, here, dims_q, columns_q, V, D, BV, TD, 1, V, ENTERING, NORMALIZE
        )  # fmt: skip
        sweep(
            rows_of(do, end, stride_do, steps_do, V, C, BV, GROUP, BULK),
            rows_of(v, end, stride_v, steps_do, V, C, BV, 1, BULK),
            rows_of(k, end, stride_k, steps_do, D, C, TD, 1, BULK),
            dq + token * D, steps_do, steps_q, log_decay, mask, factor, delta, factor, q,
            dots_q + block.to(tl.int64) * stride_dots_q + (row * query_heads + first) * length,
            state_q, extra_q, start, stop, column_q, scale,
            stride_do, stride_v, stride_k, query_heads * D, heads, tokens, stride_q, length, stop,
            stride_do_head, stride_q_head, D,
            GRAD_Q, V, D, BV, TD, C, GROUP, PER_TOKEN, MASKED, NORMALIZE, DOTS, PRECISION, BULK, False,
        )  # fmt: skip
    elif D == V and not NORMALIZE:  # one loop for both: branches would not share their memory
        is_k = block < blocks_d
        stride_a = tl.where(is_k, stride_v, stride_k)
        stride_b = tl.where(is_k, stride_do, stride_q)
        stride_c = tl.where(is_k, stride_q, stride_do)
        steps_in = (tl.where(is_k, steps_do[0], steps_q[0]), tl.where(is_k, steps_do[1], steps_q[1]))
        steps_other = (tl.where(is_k, steps_q[0], steps_do[0]), tl.where(is_k, steps_q[1], steps_do[1]))
        column = block % blocks_d * TD
        dims, columns = tl.arange(0, BD), column + tl.arange(0, TD)
        state = tl.zeros([BD, TD], tl.float32)
        keep = (dims < D)[:, None] & (columns < D)[None, :]
        if BEHIND:
            place = here * D * D + dims[:, None] * tl.where(is_k, 1, D) + columns[None, :] * tl.where(is_k, D, 1)
            state = tl.load(behind + place, mask=keep, other=0.0)
        state, _ = sweep(
            rows_of(tl.where(is_k, v, k), end, stride_a, steps_in, D, C, BD, 1, BULK),
            rows_of(tl.where(is_k, do, q), end, stride_b, steps_in, D, C, BD, GROUP, BULK),
            rows_of(tl.where(is_k, q, do), end, stride_c, steps_other, D, C, TD, GROUP, BULK),
            tl.where(is_k, dk, dv) + own * D, steps_in, steps_other,
            log_decay, mask, factor, delta, factor, k, dots_k + block.to(tl.int64) * stride_dots_k + states_k,
            state, 0.0, start, stop, column, scale,
            stride_a, stride_b, stride_c, heads * D, heads, tokens, stride_k, 0,
            tl.where(is_k, stop, start),
            tl.where(is_k, stride_do_head, stride_q_head), tl.where(is_k, stride_q_head, stride_do_head), 0,
            GRAD_V, D, D, BD, TD, C, GROUP, PER_TOKEN, MASKED, False, DOTS, PRECISION, BULK, False,
        )  # fmt: skip
        if FIRST:
            if (part == 0) & (block >= blocks_d):
                tl.store(first_state + (final + dims[:, None]) * D + columns[None, :], state, mask=keep)
    elif block < blocks_d:  # dk
        column_k = block * TD
        dims_k, columns_k = tl.arange(0, BV), column_k + tl.arange(0, TD)
        state_k, extra_k = start_state(
            behind, behind_sum, here, dims_k, columns_k, V, D, BV, TD, 1, V, BEHIND, NORMALIZE
        )
        state_k, extra_k = sweep(
            rows_of(v, end, stride_v, steps_do, V, C, BV, 1, BULK),
            rows_of(do, end, stride_do, steps_do, V, C, BV, GROUP, BULK),
            rows_of(q, end, stride_q, steps_q, D, C, TD, GROUP, BULK),
            dk + own * D, steps_do, steps_q,
            log_decay, mask, factor, delta, factor, k, dots_k + block.to(tl.int64) * stride_dots_k + states_k,
            state_k, extra_k, start, stop, column_k, scale,
            stride_v, stride_do, stride_q, heads * D, heads, tokens, stride_k, 0, stop,
            stride_do_head, stride_q_head, 0,
            GRAD_K, V, D, BV, TD, C, GROUP, PER_TOKEN, MASKED, NORMALIZE, DOTS, PRECISION, BULK, False,
        )  # fmt: skip
        if FIRST and NORMALIZE:
            if part == 0:
                tl.store(first_sum + final + columns_k, extra_k, mask=columns_k < D)
    else:  # dv
        column_v = (block - blocks_d) * TV
        dims_v, columns_v = tl.arange(0, BD), column_v + tl.arange(0, TV)
        state_v, extra_v = start_state(behind, behind_sum, here, dims_v, columns_v, D, V, BD, TV, V, 1, BEHIND, False)
        state_v, extra_v = sweep(
            rows_of(k, end, stride_k, steps_q, D, C, BD, 1, BULK),
            rows_of(q, end, stride_q, steps_q, D, C, BD, GROUP, BULK),
            rows_of(do, end, stride_do, steps_do, V, C, TV, GROUP, BULK),
            dv + own * V, steps_q, steps_do, log_decay, mask, factor, delta, factor, k, dots_k,
            state_v, extra_v, start, stop, column_v, scale,
            stride_k, stride_q, stride_do, heads * V, heads, tokens, 0, 0, start,
            stride_q_head, stride_do_head, 0,
            GRAD_V, D, V, BD, TV, C, GROUP, PER_TOKEN, MASKED, NORMALIZE, False, PRECISION, BULK, False,
        )  # fmt: skip
        if FIRST:
            if part == 0:
                place = (final + dims_v[:, None]) * V + columns_v[None, :]
                tl.store(first_state + place, state_v, mask=(dims_v < D)[:, None] & (columns_v < V)[None, :])


class Gradients(NamedTuple):
    """Gradients of a call; those of k, v and the decay for every state head."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    sums: Tensor | None
    decay: Tensor | None  # of the log decay of every token, fp32 [B, T, Hs]


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor, shape: Shape, *, scale: float,
    entering: tuple[Tensor | None, Tensor | None] = (None, None),
    behind: tuple[Tensor | None, Tensor | None] = (None, None),
    output: tuple[Tensor, Tensor] | None = None, d_inverse: Tensor | None = None,
    first: bool = False, decay: bool = False, at_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None, mask: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Launch the backward pass; arguments as `forward`.

    Args:
        do: gradient of o, any strides with a contiguous last dimension.
        entering: the states entering each segment, as `forward` returned them.
        behind: gradients of the final state and sum state, fp32, contiguous.
        output: o and 1/z if the output was normalised.
        d_inverse: fp32 `[Hq, B, T]`, contiguous, what reaches 1/z other than through o.
        first: compute the gradient of the initial state.
        decay: compute that of the decay.
        at_end: what reaches the sum of all log decays of a sequence besides, `[N, Hs]` contiguous.
    """
    config = sweep_config("dkv", shape.dim, shape.value_dim, q.dtype, shape.normalize)
    width = padded(max(shape.dim, shape.value_dim)) + config.columns
    config = in_memory(config, shape.group, width, q.element_size(), q.device)
    hopper = fits_hopper(shape, q, k, v, do)
    delta = factor = None
    if output is not None:
        o, factor = output
        delta = torch.empty_like(factor)
        tokens, tile = shape.rows * shape.length, padded(shape.value_dim)
        delta_kernel[(triton.cdiv(tokens, 32) * shape.query_heads,)](
            o, do, delta, factor, factor if d_inverse is None else d_inverse,
            shape.length, shape.query_heads, tokens, do.stride(0), do.stride(1), do.stride(2),
            V=shape.value_dim, BV=tile, C=32, SUM=d_inverse is not None,
        )  # fmt: skip
    reversed_entering = entering_states(
        q, do, log_decay, mask, cu_seqlens, behind, shape, config,
        scale=scale, reverse=True, factor=factor, delta=delta,
    )  # fmt: skip
    dim, value_dim, heads = shape.dim, shape.value_dim, shape.heads
    # dk and dv, which have no place there for the gradient of the initial state; dq
    on_hopper = [hopper and not first, hopper]
    # A gradient shared by several states is summed afterwards, so it is kept in fp32 until then; not by bulk copies.
    kept = torch.float32 if heads != shape.shared and not on_hopper[0] else k.dtype
    dq = torch.empty(shape.rows, shape.length, shape.query_heads, dim, dtype=q.dtype, device=q.device)
    dk = torch.empty(shape.rows, shape.length, heads, dim, dtype=kept, device=q.device)
    dv = torch.empty(shape.rows, shape.length, heads, value_dim, dtype=kept, device=q.device)
    state = torch.empty(shape.sequences, heads, dim, value_dim, dtype=torch.float32, device=q.device) if first else None
    sums = (
        torch.empty(shape.sequences, heads, dim, dtype=torch.float32, device=q.device)
        if first and shape.normalize
        else None
    )
    configs = [config, sweep_config("dq", dim, value_dim, q.dtype, shape.normalize, shape.narrow)]
    dots_k, dots_q = (
        torch.empty(
            triton.cdiv(dim, CHUNK if taken else c.columns), shape.rows, x.shape[2], shape.length,
            dtype=torch.float32, device=q.device,
        )
        if decay
        else None
        for c, x, taken in zip(configs, (dk, dq), on_hopper, strict=True)
    )  # fmt: skip
    there = partial(
        hopper_sweep, log_decay=log_decay, scale=scale, shape=shape, cu_seqlens=cu_seqlens, given=(factor, delta),
        sums=chunk_sums(log_decay) if hopper else None,
    )  # fmt: skip
    if on_hopper[1]:
        there((do, v, k, dq), None, entering=entering, into="k", other=q, dots=dots_q)
    if on_hopper[0]:
        back = partial(there, entering=reversed_entering, reverse=True)
        for_v, together = (k, q, do, dv), dim == value_dim and output is None
        back((v, do, q, dk), for_v if together else None, into="k", other=k, dots=dots_k)
        if not together:
            back(for_v, None, into="v")
    group = outputs_per_program(shape)

    def given(tensor: Tensor | None) -> Tensor:  # a pointer that is not read still has to be one
        return dq if tensor is None else tensor

    for part, config in enumerate(configs):
        if on_hopper[part]:
            continue
        tile_d, tile_v = min(config.columns, padded(dim)), min(config.columns, padded(value_dim))
        blocks_d, blocks_v = triton.cdiv(dim, tile_d), triton.cdiv(value_dim, tile_v)
        programs = shape.query_heads // group * blocks_d if part else heads * (blocks_d + blocks_v)
        bulk = bulk_copies(shape, config, group if part else shape.group, (q, k, v, do))
        backward_kernel[(shape.items * programs,)](
            q, k, v, do, head_steps(q), head_steps(do), dq, dk, dv,
            log_decay, given(mask), given(cu_seqlens), given(factor), given(delta),
            given(dots_q), given(dots_k), given(entering[0]), given(entering[1]),
            given(reversed_entering[0]), given(reversed_entering[1]), given(state), given(sums),
            scale, shape.length, shape.segment, shape.segments, shape.sequences, shape.rows * shape.length,
            shape.query_heads, shape.shared, heads,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2), do.stride(0), do.stride(1), do.stride(2),
            dq.shape[:3].numel(), dk.shape[:3].numel(),
            D=dim, V=value_dim, BD=padded(dim), BV=padded(value_dim), TD=tile_d, TV=tile_v, C=config.chunk,
            GROUP=group if part else shape.group, PER_TOKEN=shape.per_token, MASKED=shape.masked,
            NORMALIZE=shape.normalize, ENTERING=entering[0] is not None, BEHIND=reversed_entering[0] is not None,
            FIRST=first, DOTS=decay, SEQUENCES=shape.block_sequences, PRECISION=precision(q.dtype),
            DIRECT=bool(part), BULK=bulk,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    total = None
    if dots_q is not None and dots_k is not None:
        total = decay_gradient(dots_q, dots_k, at_end, cu_seqlens, mask, shape)
    if heads != shape.shared:
        dk, dv = (torch.unflatten(x, 2, (shape.shared, -1)).sum(3).to(k.dtype) for x in (dk, dv))
    return Gradients(dq, dk, dv, state, sums, total)
