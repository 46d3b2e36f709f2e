"""What the roles of the sweep for Hopper are made of, in Gluon: pieces of work, tiles, numbers of tokens, decays.

Names as in `hopper_kernels.py`.
"""

from __future__ import annotations

import re

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
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
NO_SUM, MAKE_SUM, GIVEN_SUM, GIVEN_BOTH = (gl.constexpr(i) for i in range(4))


@gluon.jit
def fetch(desc, row, token, head, column, full, tile):
    """Send for a tile; what lies behind the last token reads 0."""
    bulk_load(desc, [row, token, head, column], full, tile.reshape(desc.block_shape))


@gluon.jit
def send(desc, row, token, head, column, tile):
    """Write a whole tile."""
    bulk_store(desc, [row, token, head, column], tile.reshape(desc.block_shape))


@gluon.jit
def locate(work, cu_seqlens, sizes, PAIR: gl.constexpr, BLOCKS: gl.constexpr, PACKED: gl.constexpr):
    """Which operands, item, row, head, first token, end and block of columns a piece of work has."""
    _, heads, length, _, segment, segments, _ = sizes
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
    """First token of the n-th chunk of a walk. What is no whole chunk comes last, and its state matters to the caller
    alone.

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
def read_line(
    numbers, row, head, length, tokens, start, stop, count, HEADS: gl.constexpr, REVERSED: gl.constexpr,
    PER_TOKEN: gl.constexpr,
):  # fmt: skip
    """Of `[heads * HEADS, B, T]` the numbers of the tokens and query head of a walk's step; 0 where there is no token.

    From any token on: a bulk copy could not fetch them.
    """
    step = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
    token = chunk_start(count // HEADS, start, stop, REVERSED, PER_TOKEN) + step
    place = (head.to(gl.int64) * HEADS + count % HEADS) * tokens + row.to(gl.int64) * length + token
    return gl.load(numbers + place, mask=(token >= start) & (token < stop), other=0.0)


@gluon.jit
def write_lines(pointer, lines, first: gl.constexpr, n, token, start, stop, REVERSED: gl.constexpr):
    """The numbers of the tokens of the last n % 8 + 1 chunks, one for each, to `pointer` + token.

    A fence waits for all stores before it, so the fewer steps of a walk store anything the better.
    """
    step = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for i in gl.static_range(8):
        back = n % 8 - i
        if REVERSED:
            there = token + back * 64 + step
        else:
            there = token - back * 64 + step
        known = (there >= start) & (there < stop) & (back >= 0)
        found = lines.index(first + i).load(gl.BlockedLayout([1], [32], [4], [0]))
        gl.store(pointer + there, found, mask=known)


@gluon.jit
def store_rows(pointer, out, row, token, head, column, heads, length, inside, V: gl.constexpr, acc: gl.constexpr):
    """Write those rows of a tile that are `inside`."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, acc))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, acc))
    place = ((row.to(gl.int64) * length + token + rows) * heads + head) * V + column
    place = gl.expand_dims(place, 1) + gl.expand_dims(columns, 0)
    gl.store(pointer + place, out.to(gl.bfloat16), mask=gl.expand_dims(inside, 1))


@gluon.jit
def log2_rate(log_decay):
    """As `sweep.log2_decay`, of a head with one decay."""
    return gl.maximum(gl.load(log_decay) * 1.4426950408889634, -160.0)


@gluon.jit
def pair_decay(by_row, by_column, scale, acc: gl.constexpr, REVERSED: gl.constexpr):
    """Decay between the tokens of a chunk, given running sums of log2 decays, times the scale; 0 where none reaches."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, acc))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, acc))
    apart = gl.expand_dims(rows, 1) - gl.expand_dims(columns, 0)
    distance = gl.expand_dims(by_row, 1) - gl.expand_dims(by_column, 0)
    if REVERSED:
        table = gl.exp2(gl.where(apart <= 0, -distance, -10000.0)) * scale
    else:
        table = gl.exp2(gl.where(apart >= 0, distance, -10000.0)) * scale
    return table


@gluon.jit
def state_decays(by_row, by_step, total, scale, REVERSED: gl.constexpr):
    """Decay from the state to the tokens of a chunk, and from them into the state.

    The scale is in that of the reader, as in `sweep.sweep`: a state that comes from behind has it.
    """
    if REVERSED:
        reach = gl.exp2(gl.minimum(total - by_row, 0.0))
        source = gl.exp2(by_step) * scale
    else:
        reach = gl.exp2(by_row) * scale
        source = gl.exp2(gl.minimum(total - by_step, 0.0))
    return reach, source


@gluon.jit
def fade_values(c, source, inverse, bias, transposed: gl.constexpr, REVERSED: gl.constexpr, SUM: gl.constexpr):
    """c^T as it enters the state, and (GIVEN_BOTH) the sum over the tokens that enters the vector beside the state: of
    c^T, for dk of c^T times the bias of each.
    """
    by_steps: gl.constexpr = gl.SliceLayout(0, transposed)
    if SUM >= GIVEN_SUM and REVERSED:
        source = source * inverse.load(by_steps)
    faded = c.permute((1, 0)).load(transposed).to(gl.float32) * gl.expand_dims(source, 0)
    added = source
    if SUM == GIVEN_BOTH:
        if REVERSED:
            added = gl.sum(faded * gl.expand_dims(bias.load(by_steps), 0), 1)
        else:
            added = gl.sum(faded, 1)
    return faded.to(gl.bfloat16), added


@gluon.jit
def rounded_off(c, source, transposed: gl.constexpr):
    """What rounding takes from c^T as it enters the state; read anew, for there are no registers to keep it."""
    faded = c.permute((1, 0)).load(transposed).to(gl.float32) * gl.expand_dims(source, 0)
    return (faded - faded.to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def in_two_parts(line, zero_line, acc_line: gl.constexpr):
    """`[n, 8]` bf16 whose rows have `line` as their sum over four: rounded, and what that takes from it."""
    rounded = line.to(gl.bfloat16).to(gl.float32)
    which = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, acc_line)), 0)
    whole, rounded = gl.expand_dims(line, 1), gl.expand_dims(rounded, 1)
    return (zero_line + gl.where(which < 4, rounded, whole - rounded)).to(gl.bfloat16)


@gluon.jit
def renew(source_memory, source, zero_line, acc_line: gl.constexpr):
    """Let the weights of the tokens in the sum of b be other ones."""
    line = gl.convert_layout(source, gl.SliceLayout(1, acc_line))
    source_memory.permute((1, 0)).store(in_two_parts(line, zero_line, acc_line))
    fence_async_shared()
    barrier()
