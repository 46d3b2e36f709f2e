"""The one recurrence behind the forward and the backward pass, as a Triton function.

Forward and the three gradients of lightning attention are the same operator on other operands, two of them in
reversed time (Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2):

    out_i = sum_j exp(G_i - G_j) (a_i . b_j) c_j        G: running sum of the log decays

    KIND        a   b   c   out   time                  state: sum of decayed b c^T
    FORWARD     q   k   v   o     j <= i                k v^T
    GRAD_Q      do  v   k   dq    j <= i                v k^T
    GRAD_K      v   do  q   dk    j >= i, decay G_j-G_i do q^T
    GRAD_V      k   q   do  dv    j >= i, decay G_j-G_i q do^T

Dimensions: C tokens in a chunk, A features of a and b, V of c and out, BA and BV their tiles (BA >= A; one program
computes BV of the V columns), GROUP query heads that share the state of one program.

Numbers: products in the dtype of the inputs with fp32 accumulation, decays and state in fp32; every exponent is
<= 0. Exponents are base 2.
"""

from __future__ import annotations

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


FORWARD = tl.constexpr(0)
GRAD_Q = tl.constexpr(1)
GRAD_K = tl.constexpr(2)
GRAD_V = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-160.0)  # 2 to this is 0; a lower exponent would drown those that are added to it


@triton.jit
def locate(item, cu_seqlens, length, segment, segments, sequences, SEQUENCES: tl.constexpr):
    """Sequence, row, first token, end and number within its sequence of a work item; sequence == sequences: none.

    Work items are segments of at most `segment` tokens. SEQUENCES is 0 for rows of equal length (`segments` items
    each), else a power of 2 >= the number of packed sequences, each of which has at least one item.
    """
    if SEQUENCES == 0:
        sequence = item // segments
        row, part = sequence, item % segments
        first, end = 0, length
    else:
        index = tl.arange(0, SEQUENCES)
        known = index < sequences
        low = tl.load(cu_seqlens + index, mask=known, other=0).to(tl.int32)
        high = tl.load(cu_seqlens + index + 1, mask=known, other=0).to(tl.int32)
        count = tl.where(known, tl.maximum((high - low + segment - 1) // segment, 1), 0)
        last = tl.cumsum(count, 0)
        sequence = tl.sum((known & (last <= item)).to(tl.int32), 0)
        own = index == sequence
        row, part = sequence * 0, item - tl.sum(tl.where(own, last - count, 0), 0)
        first, end = tl.sum(tl.where(own, low, 0), 0), tl.sum(tl.where(own, high, 0), 0)
    start = first + part * segment
    return sequence, row, start, tl.maximum(tl.minimum(start + segment, end), start), part, end


@triton.jit
def rows_of(pointer, end, stride, steps, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
            BULK: tl.constexpr):  # fmt: skip
    """What `load_tile` reads from: the pointer, or (BULK) a descriptor for tiles `[C, BD]` of the tokens before `end`.

    Bulk copies (TMA) need fewer instructions and registers than loads of 16 bytes. Those of one head read 0 beyond
    `end` and D. With GROUP heads, each `steps` (rows, columns) from the one before, every tile must be whole.
    """
    if BULK:
        last = GROUP - 1
        shape = [end + last * steps[0], D + last * steps[1]]
        source = tl.make_tensor_descriptor(pointer, shape, [stride.to(tl.int64), 1], [C, BD])
    else:
        source = pointer
    return source


@triton.jit
def load_tile(
    source, steps, head, begin, stride, stride_head, rows, columns, column, ok,
    D: tl.constexpr, BD: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Tile `[rows, columns]` of tokens from `begin` on, for the `head`-th head, from `rows_of`.

    Hidden tokens and columns beyond D read 0.
    """
    if BULK:
        tile = source.load([begin + head * steps[0], column + head * steps[1]])
    else:
        tile = load_rows(source + tl.cast(head, tl.int64) * stride_head, begin, stride, rows, columns, ok, D, BD)
    return tile


@triton.jit
def load_rows(pointer, begin, stride, rows, columns, ok, D: tl.constexpr, BD: tl.constexpr):
    """Tile `[rows, columns]` of tokens from `begin` on; hidden tokens and columns beyond D read 0."""
    place = (pointer + begin.to(tl.int64) * stride) + (rows[:, None] * stride + columns[None, :])
    if BD == D:
        return tl.load(place, mask=ok[:, None], other=0.0)
    return tl.load(place, mask=ok[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(place, tile, ok, columns, D: tl.constexpr, BD: tl.constexpr):
    """Write a tile in the dtype of its destination, where there are tokens and columns."""
    tile = tile.to(place.dtype.element_ty)
    if BD == D:
        tl.store(place, tile, mask=ok[:, None])
    else:
        tl.store(place, tile, mask=ok[:, None] & (columns < D)[None, :])


@triton.jit
def log2_decay(log_decay):
    """Natural logarithms to base 2, kept to what makes a difference."""
    return tl.maximum(log_decay.to(tl.float32) * LOG2E, LOWEST)


@triton.jit
def decays_of(log_decay, begin, step, ok, stride):
    """Log decays of a chunk whose every token has one, 0 where there is no token."""
    return tl.load((log_decay + begin.to(tl.int64) * stride) + step * stride, mask=ok, other=0.0)


@triton.jit
def running_decay(log_decay, mask, begin, step, ok, stride, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    """Running sum of log2 decays over a chunk, its total, and which tokens are real.

    `log_decay` points at a number for the head, or at that of the row's first token; `mask` at the row's, not 0 for
    real tokens.
    """
    if PER_TOKEN:
        given = decays_of(log_decay, begin, step, ok, stride)
    else:
        given = tl.load(log_decay)
    return summed_decay(given, mask, begin, step, ok, MASKED)


@triton.jit
def summed_decay(given, mask, begin, step, ok, MASKED: tl.constexpr):
    """As `running_decay`, of log decays that have been read: one for each token or for all."""
    if MASKED:
        ok = ok & (tl.load(mask + begin + step, mask=ok, other=0) != 0)
    rate = tl.where(ok, log2_decay(given), 0.0)
    return tl.cumsum(rate, 0), tl.sum(rate, 0), ok


@triton.jit
def pair_decay(inclusive, step, REVERSED: tl.constexpr):
    """Decay `[C, C]` from the tokens of one chunk (columns) to each of them (rows), 0 where they do not reach."""
    rows, columns = step[:, None], step[None, :]
    if REVERSED:
        distance = tl.where(rows <= columns, inclusive[None, :] - inclusive[:, None], float("-inf"))
    else:
        distance = tl.where(rows >= columns, inclusive[:, None] - inclusive[None, :], float("-inf"))
    return tl.exp2(distance)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr):
    """`acc + x y`, fp32."""
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def through_state(x, state, PRECISION: tl.constexpr):
    """`x state`: in bf16 for bf16, else in (t)fp32, since a sum over many tokens may pass the range of fp16."""
    if x.dtype == tl.bfloat16:
        return tl.dot(x, state.to(tl.bfloat16))
    return tl.dot(x.to(tl.float32), state, input_precision=PRECISION)


@triton.jit
def sweep(
    a, b, c, out,  # at the first token of the row and at their first head; a, b, c from rows_of
    steps_in, steps_other,  # as group_in and group_other, in rows and columns
    log_decay, mask, factor, delta, sums, other, dots,
    state, extra, start, stop, column, scale,
    stride_a, stride_b, stride_c, stride_out, stride_decay, stride_vectors, stride_other, stride_dots, counted,
    group_in, group_other, group_out,  # from one query head to the next: operand(s), second operand, out
    KIND: tl.constexpr, A: tl.constexpr, V: tl.constexpr, BA: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr,
    DOTS: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk the tokens start .. stop in chunks and return the state behind them.

    state `[BA, BV]` and extra (the sum state, `[BA, 16]` forward, `[BV]` for the gradients) are those before the
    first chunk. factor and delta (NORMALIZE): 1/z and -(do . o) of each token, of query heads `stride_vectors` apart;
    sums: where 1/z goes.
    EXACT (forward): the state is kept to fp32, for whoever goes on from it: values times decay enter it in two parts.
    DOTS: the products of out and `other` of each token before `counted` are stored at `dots` (`[GROUP, T]`, heads
    `stride_dots` apart), for the gradient of the decay.
    """
    step = tl.arange(0, C)
    dims = tl.arange(0, BA)
    columns = column + tl.arange(0, BV)
    chunks = tl.cdiv(stop - start, C)
    if PER_TOKEN:  # a chunk ahead: the sums of a chunk are what all of its work waits for
        early = start
        if KIND >= GRAD_K:
            early = start + (chunks - 1) * C
        coming = decays_of(log_decay, early, step, (early + step >= start) & (early + step < stop), stride_decay)
    elif MASKED:
        coming = tl.load(log_decay)
    else:
        rate = log2_decay(tl.load(log_decay))
        inclusive = rate * (step + 1)
    for n in range(0, chunks):
        if KIND >= GRAD_K:
            begin = start + (chunks - 1 - n) * C
        else:
            begin = start + n * C
        ok = begin + step < stop
        real = ok
        if PER_TOKEN or MASKED:
            given_decay = coming
            if PER_TOKEN:
                if KIND >= GRAD_K:
                    early = begin - C
                else:
                    early = begin + C
                known = (early + step >= start) & (early + step < stop)
                coming = decays_of(log_decay, early, step, known, stride_decay)
            inclusive, total, real = summed_decay(given_decay, mask, begin, step, ok, MASKED)
        else:
            total = rate * tl.minimum(stop - begin, C)
        if KIND >= GRAD_K:
            reach = tl.exp2(tl.minimum(total - inclusive, 0.0))
            source = tl.exp2(inclusive) * scale
        else:
            reach = tl.exp2(inclusive) * scale
            source = tl.exp2(tl.minimum(total - inclusive, 0.0))
        fade = tl.exp2(total)
        vectors = begin.to(tl.int64) + step

        if KIND >= GRAD_K:  # one output, GROUP sources
            tile_a = load_tile(a, steps_in, 0, begin, stride_a, 0, step, dims, 0, real, A, BA, BULK)
            acc = through_state(tile_a, state, PRECISION) * reach[:, None]
            if KIND == GRAD_K and NORMALIZE:
                acc += reach[:, None] * extra[None, :]
                extra = extra * fade
            state = state * fade
            for g in tl.static_range(GROUP):
                own = vectors + tl.cast(g, tl.int64) * stride_vectors
                tile_b = load_tile(b, steps_in, g, begin, stride_b, group_in, step, dims, 0, real, A, BA, BULK)
                tile_c = load_tile(
                    c, steps_other, g, begin, stride_c, group_other, step, columns, column, real, V, BV, BULK
                )
                weights = tl.dot(tile_a, tl.trans(tile_b), input_precision=PRECISION)
                given = source
                if NORMALIZE:
                    inverse = tl.load(factor + own, mask=real, other=0.0)
                    given = given * inverse
                    if KIND == GRAD_K:
                        bias = tl.load(delta + own, mask=real, other=0.0)
                        weights += bias[None, :]
                    weights = weights * inverse[None, :]
                weights = weights * (pair_decay(inclusive, step, KIND >= GRAD_K) * scale)
                acc = product(weights.to(tile_c.dtype), tile_c, acc, PRECISION)
                faded = tile_c.to(tl.float32) * given[:, None]
                if KIND == GRAD_K and NORMALIZE:
                    extra += tl.sum(faded * bias[:, None], 0)
                state = product(tl.trans(tile_b), faded.to(tile_b.dtype), state, PRECISION)
            if MASKED:
                acc = tl.where(real[:, None], acc, 0.0)
            if DOTS:
                tile = load_rows(other, begin, stride_other, step, columns, real & (begin + step < counted), V, BV)
                tl.store(dots + begin + step, tl.sum(acc * tile.to(tl.float32), 1), mask=ok & (begin + step < counted))
            place = out + begin.to(tl.int64) * stride_out + step[:, None] * stride_out + columns[None, :]
            store_rows(place, acc, ok, columns, V, BV)
        else:  # GROUP outputs, one source
            tile_b = load_tile(b, steps_in, 0, begin, stride_b, 0, step, dims, 0, real, A, BA, BULK)
            tile_c = load_tile(c, steps_other, 0, begin, stride_c, 0, step, columns, column, real, V, BV, BULK)
            for g in tl.static_range(GROUP):
                own = vectors + tl.cast(g, tl.int64) * stride_vectors
                tile_a = load_tile(a, steps_in, g, begin, stride_a, group_in, step, dims, 0, real, A, BA, BULK)
                if DOTS:
                    place = other + tl.cast(g, tl.int64) * group_other
                    tile = load_rows(place, begin, stride_other, step, columns, real & (begin + step < counted), V, BV)
                weights = tl.dot(tile_a, tl.trans(tile_b), input_precision=PRECISION)
                if KIND == GRAD_Q and NORMALIZE:
                    bias = tl.load(delta + own, mask=real, other=0.0)
                    weights += bias[:, None]
                weights = weights * (pair_decay(inclusive, step, KIND >= GRAD_K) * scale)
                acc = through_state(tile_a, state, PRECISION) * reach[:, None]
                acc = product(weights.to(tile_c.dtype), tile_c, acc, PRECISION)
                if KIND == FORWARD and NORMALIZE:
                    z = tl.sum(through_state(tile_a, extra, PRECISION), 1) * (reach / 16) + tl.sum(weights, 1)
                    inverse = 1.0 / tl.where(z == 0, 1.0, z)
                    acc = acc * inverse[:, None]
                    if column == 0:
                        tl.store(sums + own, inverse, mask=ok)
                if KIND == GRAD_Q and NORMALIZE:
                    inverse = tl.load(factor + own, mask=real, other=0.0)
                    acc = (acc + (bias * reach)[:, None] * extra[None, :]) * inverse[:, None]
                if DOTS:
                    place = dots + g * stride_dots + begin + step
                    tl.store(place, tl.sum(acc * tile.to(tl.float32), 1), mask=ok & (begin + step < counted))
                place = out + g * group_out + begin.to(tl.int64) * stride_out + step[:, None] * stride_out
                store_rows(place + columns[None, :], acc, ok, columns, V, BV)
            faded = tile_c.to(tl.float32) * source[:, None]
            if NORMALIZE and KIND == FORWARD:
                ones = tl.zeros([C, 16], tl.float32) + source[:, None]
                part = ones.to(tile_b.dtype)
                extra = product(tl.trans(tile_b), part, extra * fade, PRECISION)
                if EXACT:
                    extra = product(tl.trans(tile_b), (ones - part.to(tl.float32)).to(tile_b.dtype), extra, PRECISION)
            if NORMALIZE and KIND == GRAD_Q:
                extra = extra * fade + tl.sum(faded, 0)
            rounded = faded.to(tile_b.dtype)
            state = product(tl.trans(tile_b), rounded, state * fade, PRECISION)
            if EXACT:
                state = product(tl.trans(tile_b), (faded - rounded.to(tl.float32)).to(tile_b.dtype), state, PRECISION)
    return state, extra
