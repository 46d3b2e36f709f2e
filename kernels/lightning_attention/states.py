"""States between the segments of a sequence, so that few long sequences fill a GPU too.

A sequence is cut into segments, and those into parts; `segment_kernel` computes what each part adds to the state, all
at once, and `scan_kernel` turns that into the state entering each segment (forward: the state before its first token,
reverse: after its last). The last segment in the order of the walk adds to no state that is wanted. Nor do tokens that
have decayed to nothing where their segment ends: with a fixed decay they are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bulk import bulk_copies, head_steps
from .launch import SweepConfig, share_of, state_config
from .shape import Shape, padded, precision
from .sweep import load_tile, locate, log2_decay, product, rows_of, running_decay

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


NOTHING = tl.constexpr(126.0)  # 2 to minus this is the smallest normal number of fp32


@triton.jit
def reach_of(rate):
    """How many tokens at the end of a segment have not decayed to nothing there; `rate` is a token's log2 decay."""
    return tl.minimum(NOTHING / tl.maximum(-rate, 1e-7), 1e9).to(tl.int32) + 1


@triton.jit(do_not_specialize=["scale", "length", "segment", "segments", "parts", "share", "sequences", "tokens"])
def segment_kernel(
    x, y, steps_x, steps_y, log_decay, mask, cu_seqlens, factor, delta, states, extras, totals,
    scale, length, segment, segments, parts, share, sequences, tokens, heads, shared,
    stride_x_row, stride_x, stride_x_head, stride_y_row, stride_y, stride_y_head,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr,
    SEQUENCES: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What a part of a segment adds to the state: sum of decayed x y^T, with (k, v) forward and (q, do) in reverse.

    Its sum goes into states `[items, Hs, D, Dv]`, that of x alone into extras `[items, Hs, D]` (NORMALIZE), the log2
    decay in all into totals `[items, Hs]`. Items are the parts, of `share` tokens, of all segments but the last one in
    the order of the walk; of packed sequences all segments.
    """
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    block, head, item = pid % blocks, (pid // blocks) % heads, pid // (blocks * heads)
    FIXED: tl.constexpr = not (PER_TOKEN or MASKED)
    wanted = (segments - 1) * parts  # of a row
    sequence, row, start, stop, part, end = locate(item, cu_seqlens, length, segment, wanted, sequences, SEQUENCES)
    if sequence >= sequences:
        return
    first_token, last_token = start, stop  # of the segment
    if SEQUENCES == 0:
        first_token = (part // parts + (1 if REVERSE else 0)) * segment
        last_token = tl.minimum(first_token + segment, end)
        start = first_token + part % parts * share
        stop = tl.maximum(tl.minimum(start + share, last_token), start)
    step = tl.arange(0, C)
    dims = tl.arange(0, BD)
    columns = block * BV + tl.arange(0, BV)
    first = head * GROUP if REVERSE else head // (heads // shared)  # query head, or key/value head
    wide_row, wide_first = row.to(tl.int64), first.to(tl.int64)
    x += wide_row * stride_x_row + wide_first * stride_x_head
    y += wide_row * stride_y_row + wide_first * stride_y_head
    rows_x = rows_of(x, end, stride_x, steps_x, D, C, BD, GROUP, BULK)
    rows_y = rows_of(y, end, stride_y, steps_y, V, C, BV, GROUP, BULK)
    log_decay += wide_row * length * heads * PER_TOKEN + head
    mask += wide_row * length
    state = tl.zeros([BD, BV], tl.float32)
    extra = tl.zeros([BD], tl.float32)
    running = 0.0
    chunks, here = tl.cdiv(stop - start, C), item.to(tl.int64) * heads + head
    faded = 0
    if FIXED:
        rate = log2_decay(tl.load(log_decay))
        running = rate * (stop - start)
        if block == 0:
            tl.store(totals + here, running)
        left = reach_of(rate) - (start - first_token if REVERSE else last_token - stop)
        if left <= 0:  # nor does `scan_kernel` read what this part adds
            return
        # One chunk more than that fills: the last one may hold a single token.
        faded = tl.maximum(chunks - tl.cdiv(left, C) - 1, 0)
    for n in range(faded, chunks):
        begin = start + (chunks - 1 - n) * C if REVERSE else start + n * C
        inclusive, total, real = running_decay(
            log_decay, mask, begin, step, begin + step < stop, heads, PER_TOKEN, MASKED
        )
        weight = tl.exp2(inclusive) * scale if REVERSE else tl.exp2(tl.minimum(total - inclusive, 0.0))
        state = state * tl.exp2(total)
        extra = extra * tl.exp2(total)
        running += total
        for g in tl.static_range(GROUP):
            tile_x = load_tile(rows_x, steps_x, g, begin, stride_x, stride_x_head, step, dims, 0, real, D, BD, BULK)
            tile_y = load_tile(
                rows_y, steps_y, g, begin, stride_y, stride_y_head, step, columns, block * BV, real, V, BV, BULK
            )
            given = weight
            if NORMALIZE and REVERSE:
                vectors = (wide_first + g) * tokens + wide_row * length + begin + step
                given = given * tl.load(factor + vectors, mask=real, other=0.0)
            shares = tile_y.to(tl.float32) * given[:, None]
            rounded = shares.to(tile_x.dtype)
            state = product(tl.trans(tile_x), rounded, state, PRECISION)
            if EXACT:
                state = product(tl.trans(tile_x), (shares - rounded.to(tl.float32)).to(tile_x.dtype), state, PRECISION)
            if NORMALIZE:
                if REVERSE:
                    given = given * tl.load(delta + vectors, mask=real, other=0.0)
                extra += tl.sum(tile_x.to(tl.float32) * given[:, None], 0)
    keep = (dims < D)[:, None] & (columns < V)[None, :]
    tl.store(states + here * D * V + dims[:, None] * V + columns[None, :], state, mask=keep)
    if block == 0:
        if not FIXED:
            tl.store(totals + here, running)
        if NORMALIZE:
            tl.store(extras + here * D + dims, extra, mask=dims < D)


@triton.jit
def load_part(states, totals, m, first, begin, end, heads, head, size, place, REVERSE: tl.constexpr):
    """What the m-th part of begin .. end in the order of the walk adds, and its log2 decay; 0 where there is none.

    Those before the `first` add nothing.
    """
    item = end - 1 - m if REVERSE else begin + m
    there = (item >= begin) & (item < end)
    here = item.to(tl.int64) * heads + head
    added = tl.load(states + here * size + place, mask=place < tl.where(there & (m >= first), size, 0), other=0.0)
    return added, tl.load(totals + here, mask=there, other=0.0)


@triton.jit(do_not_specialize=["segment", "segments", "parts", "share", "sequences"])
def scan_kernel(
    states, entering, initial, totals, log_decay, cu_seqlens, segment, segments, parts, share, sequences, heads, size,
    REVERSE: tl.constexpr, STARTED: tl.constexpr, FIXED: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state entering each segment, from what the parts of segments add, which lies as `segment_kernel` left it.

    entering `[row * segments + segment, Hs, size]` (packed: `[segment, ...]`), `initial` (STARTED) `[N, Hs, size]`: the
    state before the first segment in the order of the walk. `size` numbers a state and head. FIXED: a decay for all
    tokens, none of them hidden.
    """
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    block, head, sequence = pid % blocks, (pid // blocks) % heads, pid // (blocks * heads)
    if SEQUENCES == 0:
        first, count = sequence * segments, segments
        given = sequence * (segments - 1) - (1 if REVERSE else 0)  # where segment 0 would be among those with parts
    else:
        index = tl.arange(0, SEQUENCES)
        known = index < sequences
        low = tl.load(cu_seqlens + index, mask=known, other=0).to(tl.int32)
        high = tl.load(cu_seqlens + index + 1, mask=known, other=0).to(tl.int32)
        counts = tl.where(known, tl.maximum((high - low + segment - 1) // segment, 1), 0)
        first = tl.sum(tl.where(index < sequence, counts, 0), 0)
        count = tl.sum(tl.where(index == sequence, counts, 0), 0)
        given = first
    place = block * BLOCK + tl.arange(0, BLOCK)
    keep = place < size
    own = (sequence.to(tl.int64) * heads + head) * size
    state = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        state = tl.load(initial + own + place, mask=keep, other=0.0)
    near = 0  # the first part of a segment that adds anything
    if FIXED:
        reach = reach_of(log2_decay(tl.load(log_decay + head)))
        if REVERSE:
            near = parts - tl.cdiv(reach, share)
        else:  # the last part may be shorter
            near = tl.maximum(segment - reach, 0) // share
    for n in range(0, count):
        which = count - 1 - n if REVERSE else n
        there = (first + which).to(tl.int64) * heads + head
        tl.store(entering + there * size + place, state, mask=keep)
        if n < count - 1:
            begin = (given + which) * parts
            end = begin + parts
            for m in range(0, parts, 4):  # four are fetched before the first is waited for
                added, total = load_part(states, totals, m, near, begin, end, heads, head, size, place, REVERSE)
                added_1, total_1 = load_part(states, totals, m + 1, near, begin, end, heads, head, size, place, REVERSE)
                added_2, total_2 = load_part(states, totals, m + 2, near, begin, end, heads, head, size, place, REVERSE)
                added_3, total_3 = load_part(states, totals, m + 3, near, begin, end, heads, head, size, place, REVERSE)
                state = state * tl.exp2(total) + added
                state = state * tl.exp2(total_1) + added_1
                state = state * tl.exp2(total_2) + added_2
                state = state * tl.exp2(total_3) + added_3


def entering_states(
    x: Tensor,
    y: Tensor,
    log_decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    shape: Shape,
    config: SweepConfig,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    exact: bool = False,
    factor: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The state `[items, Hs, D, Dv]` and sum state `[items, Hs, D]` entering every segment, None where all is 0.

    Args:
        x, y: k and v, or with `reverse` q and do, `[B, T, H, D or Dv]`.
        config: launch parameters of the sweep that goes on from them.
        initial: state and sum state before the first segment, in the order of the walk.
        scale: factor of every token's share.
        exact: keep the states to fp32.
        factor, delta: fp32 `[Hq, B, T]`, with `reverse` and a normalised output.
    """
    if not shape.split:
        return initial
    group = shape.group if reverse else 1
    config = state_config(config, shape.dim, shape.value_dim, x.dtype, shape.normalize, group, x.device)
    heads, dim, value_dim = shape.heads, shape.dim, shape.value_dim
    items = shape.items if shape.packed else shape.rows * (shape.segments - 1) * shape.parts
    states = x.new_empty(items, heads, dim, value_dim, dtype=torch.float32)
    extras = x.new_empty(items, heads, dim, dtype=torch.float32) if shape.normalize else None
    totals = x.new_empty(items, heads, dtype=torch.float32)

    def given(tensor: Tensor | None) -> Tensor:  # a pointer that is not read still has to be one
        return totals if tensor is None else tensor

    share = share_of(shape.segment, shape.parts)
    block = min(config.columns, padded(value_dim))
    segment_kernel[(triton.cdiv(value_dim, block) * heads * items,)](
        x, y, head_steps(x), head_steps(y), log_decay, given(mask), given(cu_seqlens), given(factor), given(delta),
        states, given(extras), totals,
        scale, shape.length, shape.segment, shape.segments, shape.parts, share,
        shape.sequences, shape.rows * shape.length, heads, shape.shared,
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        D=dim, V=value_dim, BD=padded(dim), BV=block, C=config.chunk, GROUP=group,
        REVERSE=reverse, PER_TOKEN=shape.per_token, MASKED=shape.masked, NORMALIZE=shape.normalize,
        SEQUENCES=shape.block_sequences, PRECISION=precision(x.dtype),
        BULK=bulk_copies(shape, config, group, (x, y)), EXACT=exact,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    entering: list[Tensor | None] = []
    for tensor, start in ((states, initial[0]), (extras, initial[1])):
        if tensor is None:
            entering.append(None)
            continue
        out = tensor.new_empty(shape.items, *tensor.shape[1:])
        entering.append(out)
        size = out[0, 0].numel()
        block = min(1024, padded(size))
        scan_kernel[(triton.cdiv(size, block) * heads * shape.sequences,)](
            tensor, out, given(start), totals, log_decay, given(cu_seqlens),
            shape.segment, shape.segments, shape.parts, share, shape.sequences, heads, size,
            REVERSE=reverse, STARTED=start is not None, FIXED=not (shape.per_token or shape.masked),
            SEQUENCES=shape.block_sequences, BLOCK=block,
        )  # fmt: skip
    return entering[0], entering[1]
