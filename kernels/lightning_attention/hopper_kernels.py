"""The sweep of `sweep.py` for Hopper GPUs, in Gluon: one warp fetches, one or two warpgroups multiply.

    out_i = scale * sum_j exp(G_i - G_j) (a_i . b_j) c_j        j <= i, or j >= i in reversed time

A producer warp brings chunks of 64 tokens by bulk copies (TMA) into a ring; each consumer, a warpgroup, computes 64
columns of out and keeps the state of these columns in registers, transposed: S^T [64, A] = fade S^T + (c source)^T b,
so that c, read from shared memory and scaled, is an operand in registers and needs no memory of its own. All products
are asynchronous warpgroup products (wgmma). Both consumers of a program read the same tiles of a and b.

Dimensions: A features of a and b, V columns of c and out, GROUP query heads that share a key/value head and its state.
Chunks have 64 tokens. Numbers as in `sweep.py`; a NaN in a packed sequence may reach the last chunk of its neighbour.

Source: Lightning Attention-2, arXiv 2401.04658; the division of labour is that of FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

import re

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as TensorDescriptor
except ImportError as error:
    raise ImportError("the kernels for Hopper need triton with Gluon") from error

VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
if not (3, 6) <= VERSION <= (3, 9):  # Gluon changes its names from one version to the next
    raise ImportError(f"the kernels for Hopper were compiled by triton 3.6 to 3.9, found {triton.__version__}")
barrier = gl.thread_barrier if VERSION == (3, 6) else gl.barrier
if VERSION < (3, 8):
    bulk_load, bulk_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
else:
    bulk_load, bulk_store = tma.async_load, tma.async_store

TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # of [1, 64, 1, columns]
LINE = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)  # of [1, 1, 64]


@gluon.jit
def fetch(desc, row, token, head, column, full, tile):
    """Send for a tile; what lies behind the last token reads 0."""
    bulk_load(desc, [row, token, head, column], full, tile.reshape(desc.block_shape))


@gluon.jit
def send(desc, row, token, head, column, tile):
    """Write a whole tile."""
    bulk_store(desc, [row, token, head, column], tile.reshape(desc.block_shape))


@gluon.jit
def fill(descs, rings, full, stage, row, token, head_a, head, column, CONSUMERS: gl.constexpr, DOTS: gl.constexpr):
    """Send for the tiles of a chunk."""
    fetch(descs[0], row, token, head_a, 0, full, rings[0].index(stage))
    fetch(descs[1], row, token, head, 0, full, rings[1].index(stage))
    for i in gl.static_range(CONSUMERS):
        fetch(descs[2], row, token, head, column + i * 64, full, rings[2].index(stage * CONSUMERS + i))
        if DOTS:
            fetch(descs[4], row, token, head_a, column + i * 64, full, rings[3].index(stage * CONSUMERS + i))


@gluon.jit
def locate(work, cu_seqlens, sizes, PAIR: gl.constexpr, BLOCKS: gl.constexpr, PACKED: gl.constexpr):
    """Which operands, item, row, head, first token, end and block of columns a piece of work has."""
    _, heads, length, segment, segments = sizes
    which = 0
    if PAIR:  # beside each other: they read two tensors in common
        which = work % 2
        work = work // 2
    column = work % BLOCKS
    head = work // BLOCKS % heads
    item = work // (BLOCKS * heads)
    if PACKED:
        row = item * 0
        start, stop = gl.load(cu_seqlens + item).to(gl.int32), gl.load(cu_seqlens + item + 1).to(gl.int32)
    else:
        row = item // segments
        start = item % segments * segment
        stop = gl.minimum(start + segment, length)
    return which, item, row, head, start, stop, column


@gluon.jit
def chunk_start(n, start, stop, REVERSED: gl.constexpr, PER_TOKEN: gl.constexpr):
    """First token of the n-th chunk of a walk. What is no whole chunk comes last: its state matters to none.

    In reversed time it may begin before `start`. Running sums begin at multiples of 64.
    """
    token = start + n * 64
    if REVERSED:
        if PER_TOKEN:
            token = start + (gl.cdiv(stop - start, 64) - 1 - n) * 64
        else:
            token = stop - (n + 1) * 64
    return token


@gluon.jit
def produce(
    first, second, sums, rings, bars, cu_seqlens, sizes,
    A: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PAIR: gl.constexpr, REVERSED: gl.constexpr, PER_TOKEN: gl.constexpr, DOTS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: all work of the program, chunk after chunk, as far ahead as the ring allows."""
    full, empty = bars
    tiles: gl.constexpr = 2 * A + CONSUMERS * (128 if DOTS else 64)  # columns of 64 tokens in bf16
    stage = 0
    phase = 1  # of a fresh barrier the phase before has passed: the first round does not wait
    for work in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        which, _, row, head, start, stop, block = locate(work, cu_seqlens, sizes, PAIR, BLOCKS, PACKED)
        column = block * 64 * CONSUMERS
        for n in range(gl.cdiv(stop - start, 64)):
            token = chunk_start(n, start, stop, REVERSED, PER_TOKEN)
            for g in gl.static_range(GROUP if REVERSED else 1):
                if REVERSED:
                    other = head * GROUP + g
                else:
                    other = head // GROUP
                mbarrier.wait(empty.index(stage), phase)
                here = full.index(stage)
                mbarrier.expect(here, tiles * 64 * 2 + (64 * 4 if PER_TOKEN else 0))
                if PAIR:
                    if which == 0:
                        fill(first, rings, here, stage, row, token, head, other, column, CONSUMERS, DOTS)
                    else:
                        fill(second, rings, here, stage, row, token, head, other, column, CONSUMERS, DOTS)
                else:
                    fill(first, rings, here, stage, row, token, head, other, column, CONSUMERS, DOTS)
                if PER_TOKEN:
                    own = head if REVERSED else head // GROUP
                    line = rings[4].index(stage).reshape([1, 1, 64])
                    bulk_load(sums, [row, own, token], here, line)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def decays(by_row, by_column, by_step, total, scale, acc: gl.constexpr, REVERSED: gl.constexpr):
    """Of a chunk with these running sums of log2 decays, in three layouts: decay between its tokens, from the state to
    them, from them into the state. The scale is in the first and, as in `sweep.sweep`, in that of the reader: a state
    that comes from behind has it.
    """
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, acc))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, acc))
    apart = gl.expand_dims(rows, 1) - gl.expand_dims(columns, 0)
    distance = gl.expand_dims(by_row, 1) - gl.expand_dims(by_column, 0)
    if REVERSED:
        table = gl.exp2(gl.where(apart <= 0, -distance, -10000.0)) * scale
        reach = gl.exp2(gl.minimum(total - by_row, 0.0))
        source = gl.exp2(by_step) * scale
    else:
        table = gl.exp2(gl.where(apart >= 0, distance, -10000.0)) * scale
        reach = gl.exp2(by_row) * scale
        source = gl.exp2(gl.minimum(total - by_step, 0.0))
    return table, reach, source


@gluon.jit
def consume(
    first, second, pointers, rings, bars, state_memory, out_memory, given, sizes, strides,
    HALF: gl.constexpr, A: gl.constexpr, V: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PAIR: gl.constexpr, REVERSED: gl.constexpr,
    ENTERING: gl.constexpr, PER_TOKEN: gl.constexpr, DOTS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: 64 columns of all work of the program."""
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    transposed: gl.constexpr = gl.DotOperandLayout(0, acc_state, 2)
    a_ring, b_ring, c_ring, other_ring, sums_ring = rings
    full, empty = bars
    entering, log_decay, dots, cu_seqlens, scale = given
    works, heads, length, _, _ = sizes
    stride_a, stride_c, stride_dots = strides
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, acc))
    zero = gl.zeros([64, 64], gl.float32, acc)
    stage = 0
    phase = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        which, item, row, head, start, stop, block = locate(work, cu_seqlens, sizes, PAIR, BLOCKS, PACKED)
        column = (block * CONSUMERS + HALF) * 64
        if REVERSED:
            own, owners = head, heads  # of the state
        else:
            own, owners = head // GROUP, heads // GROUP
        if not PER_TOKEN:
            rate = gl.maximum(gl.load(log_decay + own) * 1.4426950408889634, -160.0)  # as sweep.log2_decay
            columns = gl.arange(0, 64, layout=gl.SliceLayout(0, acc))
            step = gl.arange(0, 64, layout=gl.SliceLayout(0, transposed))
            table, reach, source = decays(
                rate * (rows + 1), rate * (columns + 1), rate * (step + 1), rate * 64, scale, acc, REVERSED
            )
            fade = gl.exp2(rate * 64)
        state = gl.zeros([64, A], gl.float32, acc_state)
        if ENTERING:
            step_a, step_c = stride_a, stride_c
            if PAIR:
                if which == 1:
                    step_a, step_c = stride_c, stride_a
            values = column + gl.arange(0, 64, layout=gl.SliceLayout(1, acc_state))
            dims = gl.arange(0, A, layout=gl.SliceLayout(0, acc_state))
            base = entering + (item.to(gl.int64) * owners + own) * (A * V)
            state += gl.load(base + gl.expand_dims(values * step_c, 1) + gl.expand_dims(dims * step_a, 0))
        barrier()  # every warp is done with what these hold
        state_memory.store(state.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        for n in range(gl.cdiv(stop - start, 64)):
            token = chunk_start(n, start, stop, REVERSED, PER_TOKEN)
            inside = (token + rows >= start) & (token + rows < stop)
            out = zero
            for g in gl.static_range(GROUP if REVERSED else 1):
                mbarrier.wait(full.index(stage), phase)
                a, b, c = a_ring.index(stage), b_ring.index(stage), c_ring.index(stage * CONSUMERS + HALF)
                weights = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
                if PER_TOKEN and g == 0:
                    line = sums_ring.index(stage)
                    by_column = line.load(gl.SliceLayout(0, acc))
                    total = gl.min(by_column, 0)
                    table, reach, source = decays(
                        line.load(gl.SliceLayout(1, acc)), by_column, line.load(gl.SliceLayout(0, transposed)), total,
                        scale, acc, REVERSED,
                    )  # fmt: skip
                    fade = gl.exp2(total)
                if g == 0:
                    out = warpgroup_mma(a, state_memory.permute((1, 0)), out, use_acc=False, is_async=True)
                turned = c.permute((1, 0)).load(transposed)
                faded = (turned.to(gl.float32) * gl.expand_dims(source, 0)).to(gl.bfloat16)
                if g == 0:
                    weights = warpgroup_mma_wait(num_outstanding=1, deps=(weights,))
                else:
                    weights = warpgroup_mma_wait(num_outstanding=0, deps=(weights,))
                near = gl.convert_layout((weights * table).to(gl.bfloat16), operand)
                if g == 0:
                    out = warpgroup_mma_wait(num_outstanding=0, deps=(out,))
                    out = out * gl.expand_dims(reach, 1)
                    state = state * fade
                out = warpgroup_mma(near, c, out, is_async=True)
                state = warpgroup_mma(faded, b, state, is_async=True)
                out = warpgroup_mma_wait(num_outstanding=1, deps=(out,))
                state = warpgroup_mma_wait(num_outstanding=0, deps=(state,))
                if DOTS and g == (GROUP if REVERSED else 1) - 1:
                    if which == 0:
                        other = other_ring.index(stage * CONSUMERS + HALF).load(acc)
                        place = dots + (column // 64).to(gl.int64) * stride_dots
                        place += (row.to(gl.int64) * heads + head) * length + token
                        gl.store(place + rows, gl.sum(out * other.to(gl.float32), 1), mask=inside)
                fence_async_shared()
                if g == (GROUP if REVERSED else 1) - 1:
                    tma.store_wait(pendings=0)  # the store before this one has read out_memory
                barrier()  # every warp is done with the stage, and with the memory of state and out
                mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            state_memory.store(state.to(gl.bfloat16))
            if (token >= start) & (token + 64 <= stop):
                out_memory.store(out.to(gl.bfloat16))
                fence_async_shared()
                barrier()
                if PAIR:
                    if which == 0:
                        send(first[3], row, token, head, column, out_memory)
                    else:
                        send(second[3], row, token, head, column, out_memory)
                else:
                    send(first[3], row, token, head, column, out_memory)
            else:  # tokens of others on either side
                fence_async_shared()
                barrier()
                pointer = pointers[0]
                if PAIR:
                    if which == 1:
                        pointer = pointers[1]
                place = ((row.to(gl.int64) * length + token + rows) * heads + head) * V + column
                columns_out = gl.arange(0, 64, layout=gl.SliceLayout(0, acc))
                gl.store(
                    pointer + gl.expand_dims(place, 1) + gl.expand_dims(columns_out, 0), out.to(gl.bfloat16),
                    mask=gl.expand_dims(inside, 1),
                )  # fmt: skip
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["scale", "works", "length", "segment", "segments", "stride_dots"])
def hopper_kernel(
    a, b, c, out, a_second, b_second, c_second, out_second, other, sums, out_pointer, second_pointer,
    entering, log_decay, dots, cu_seqlens, scale,
    works, heads, length, segment, segments, stride_a, stride_c, stride_dots,
    A: gl.constexpr, V: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    PAIR: gl.constexpr, REVERSED: gl.constexpr, ENTERING: gl.constexpr, PER_TOKEN: gl.constexpr, DOTS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """One sweep, or (PAIR) two that read two tensors in common, over `works` pieces of work.

    The operands are descriptors. sums (PER_TOKEN): of the log2 decays within chunks, `decay.running_sums`. DOTS: the
    products of out and `other` of each token, of the first sweep and 64 columns, are stored at `dots`
    `[V / 64, B, heads, T]`.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    blocks: gl.constexpr = V // (64 * CONSUMERS)
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, A], tile)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, A], tile)
    c_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CONSUMERS, 64, 64], tile)
    if DOTS:
        other_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CONSUMERS, 64, 64], tile)
    else:
        other_ring = c_ring  # not read
    if PER_TOKEN:
        line: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
        sums_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    else:
        sums_ring = c_ring  # not read
    states = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, A], tile)
    outs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, 64], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    first, second = (a, b, c, out, other), (a_second, b_second, c_second, out_second, other)
    pointers = (out_pointer, second_pointer)
    rings, bars = (a_ring, b_ring, c_ring, other_ring, sums_ring), (full, empty)
    given, sizes = (entering, log_decay, dots, cu_seqlens, scale), (works, heads, length, segment, segments)
    strides = (stride_a, stride_c, stride_dots)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (first, second, pointers, rings, bars, states.index(0), outs.index(0), given, sizes, strides,
                           0, A, V, blocks, GROUP, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, PER_TOKEN, DOTS,
                           PACKED)),
                (consume, (first, second, pointers, rings, bars, states.index(1), outs.index(1), given, sizes, strides,
                           1, A, V, blocks, GROUP, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, PER_TOKEN, DOTS,
                           PACKED)),
                (produce, (first, second, sums, rings, bars, cu_seqlens, sizes,
                           A, blocks, GROUP, STAGES, CONSUMERS, PAIR, REVERSED, PER_TOKEN, DOTS, PACKED)),
            ],
            [4, 1],
            [240, 24],  # registers of a thread: the second consumer, the producer; the first has the rest
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (first, second, pointers, rings, bars, states.index(0), outs.index(0), given, sizes, strides,
                           0, A, V, blocks, GROUP, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, PER_TOKEN, DOTS,
                           PACKED)),
                (produce, (first, second, sums, rings, bars, cu_seqlens, sizes,
                           A, blocks, GROUP, STAGES, CONSUMERS, PAIR, REVERSED, PER_TOKEN, DOTS, PACKED)),
            ],
            [1],
            [24],
        )  # fmt: skip
