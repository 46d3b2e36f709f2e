"""Triton kernels of `local_attention`, forward and backward.

Tokens are numbered along a stream: each row alone where nothing is hidden or packed; else one stream of all real
tokens, sequence after sequence, so that window and sinks are plain differences of numbers whatever the mask. `begin`
gives the first number of a token's sequence, `place` where the token lies among the B * T. A block of queries may
span several sequences: only those of its first token can have sinks before the keys it loops over.

Dimensions: B rows, T tokens, N sequences, Hq query heads, Hkv key/value heads, D features of q and k, V of v, BM
tokens in a block, BN in an inner step, BS places for sinks. Scores are in base 2: `scale` times log2(e).

`lse` `[Hq, B * T]`, the logarithm of each query's sum of weights, is in base 2 and in the order of the stream; with LSE
it is the caller's too, natural and in the order of the B * T. With DLSE it has a gradient.

With MERGE a second attention over other keys, `other` times `other_scale`, comes under the same denominator; `log_sum`
`[Hq, B * T]`, natural and in the order of the B * T, is the logarithm of its weight, -inf where it has none. o and
`lse` are then those of one softmax over all keys, and the backward pass over those of the window is as without.
"""

from __future__ import annotations

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of local_attention need triton") from error

from .sweep import LOG2E, load_rows, store_rows

NOWHERE = tl.constexpr(2147483647)  # `begin` of a number that no token has: no key is seen from there
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _starts(index, begin, total, STREAM: tl.constexpr):
    """First number of the sequence of each token, NOWHERE beyond the last one."""
    if STREAM:
        return tl.load(begin + index, mask=index < total, other=NOWHERE)
    else:
        return tl.where(index < total, 0, NOWHERE)


@triton.jit
def _offsets(index, valid, place, row, length, stride_row, stride, PLACED: tl.constexpr):
    """Where tokens lie in a tensor `[B, T, ...]`."""
    if PLACED:
        spot = tl.load(place + index, mask=valid, other=0)
        return (spot // length).to(tl.int64) * stride_row + (spot % length).to(tl.int64) * stride
    else:
        return row * stride_row + index.to(tl.int64) * stride


@triton.jit
def load_features(pointer, offsets, valid, dims, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D features at `offsets`, 0 where they are not valid."""
    if D == BD:
        return tl.load(pointer + offsets[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
    else:
        keep = valid[:, None] & (dims < D)[None, :]
        return tl.load(pointer + offsets[:, None] + dims[None, :], mask=keep, other=0.0)


@triton.jit
def _tile(
    pointer, begin, index, valid, place, row, head, length, strides, dims,
    D: tl.constexpr, BD: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Tokens `index` (from `begin` on) of one head, 0 where not valid; offsets between them fit 32 bits."""
    if PLACED:
        there = _offsets(index, valid, place, row, length, strides[0], strides[1], PLACED)
        tile = load_features(pointer + head * strides[2], there, valid, dims, D, BD)
    else:
        pointer += row * strides[0] + head * strides[2]
        tile = load_rows(pointer, tl.cast(begin, tl.int64), strides[1], index - begin, dims, valid, D, BD)
    return tile


@triton.jit
def _step(
    source, begin, index, valid, place, row, head, length, strides, dims,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PLACED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """As `_tile`, for a loop. BULK: `source` is a descriptor, whose tiles read 0 beyond the last token and D.

    The loop keeps its copies in flight; outside one a bulk copy would be waited for before the next begins.
    """
    if BULK:
        tile = source.load([row.to(tl.int32), head.to(tl.int32), begin, 0]).reshape(BN, BD)
    else:
        tile = _tile(source, begin, index, valid, place, row, head, length, strides, dims, D, BD, PLACED)
    return tile


@triton.jit
def store_features(pointer, offsets, x, valid, dims, D: tl.constexpr, BD: tl.constexpr):
    """The valid rows of x to `offsets`."""
    store_rows(pointer + offsets[:, None] + dims[None, :], x, valid, dims, D, BD)


@triton.jit
def _reach(j, begin, total, window, sinks, BM: tl.constexpr, STREAM: tl.constexpr, SINKS: tl.constexpr):
    """First query that no longer sees each key among those that its block of BM loops over.

    The last block that loops over a sink, for the window of its first query, sees it to its end.
    """
    reach = j + window
    if SINKS:
        sink = j - _starts(j, begin, total, STREAM) < sinks
        reach = tl.where(sink, ((reach - 1) // BM + 1) * BM, reach)
    return reach


@triton.jit
def _near(i, start, j, reach, STREAM: tl.constexpr):
    """Whether query i sees key j among the keys that its block loops over; shapes broadcast."""
    seen = (i >= j) & (i < reach)
    if STREAM:
        seen = seen & (j >= start)
    return seen


@triton.jit
def _sinks_below(
    k, v, first, low, sinks, place, row, head, length, strides_k, strides_v, places, dims, columns,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Numbers of the sinks from `first` on, which of them lie below the keys from `low` on, their keys and values."""
    sink = first + places
    present = (places < sinks) & (sink < low)
    keys = _tile(k, first, sink, present, place, row, head, length, strides_k, dims, D, BD, PLACED)
    values = _tile(v, first, sink, present, place, row, head, length, strides_v, columns, V, BV, PLACED)
    return sink, present, keys, values


@triton.jit
def _work(blocks, kinds):
    """Kind (head), block and row of a program; neighbours share a block."""
    pid = tl.program_id(0)
    return (pid % kinds).to(tl.int64), pid // kinds % blocks, (pid // (kinds * blocks)).to(tl.int64)


@triton.jit
def _at(index, valid, place, row, length, LSE: tl.constexpr, PLACED: tl.constexpr):
    """Where in the `lse` of a head that of its tokens lies, or its gradient."""
    if LSE and PLACED:
        index = tl.load(place + index, mask=valid, other=0)
    return row * length + index


@triton.jit
def _log_weight(log_sum, i, real, place, head, row, length, tokens, PLACED: tl.constexpr):
    """Logarithm of the other attention's weight, in base 2; where it has none its output may be anything."""
    there = head * tokens + _at(i, real, place, row, length, True, PLACED)
    return tl.load(log_sum + there, mask=real, other=float("-inf")) * LOG2E


@triton.jit
def _scale_of(other_scale, head, columns, V: tl.constexpr):
    return tl.load(other_scale + head * V + columns, mask=columns < V, other=0.0)


@triton.jit
def softmax_step(acc, top, total, q, k, v, seen, factor, PRECISION: tl.constexpr):
    """One block of keys into the running output, maximum and sum."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a query may have seen no key yet
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["scale", "length", "total", "tokens", "window", "sinks"])
def forward_kernel(
    q, k, v, k_steps, v_steps, other, log_sum, other_scale, o, lse, begin, place,
    scale, length, total, tokens, window, sinks, query_heads, group, strides_q, strides_k, strides_v, strides_other,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, STREAM: tl.constexpr, PLACED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    BULK: tl.constexpr, LSE: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """o and `lse`, by one program per block of queries and head."""
    head, block, row = _work(tl.cdiv(total, BM), query_heads)
    first_token = block * BM
    count, first = total, block * 0
    if STREAM:
        count, first = tl.load(begin + total), tl.load(begin + first_token)
        if first > first_token:  # only hidden tokens are left
            return
    i = first_token + tl.arange(0, BM)
    start = _starts(i, begin, total, STREAM)
    real = start <= i
    dims, columns, places = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BS)
    shared = head // group
    low, high = tl.maximum(first_token - window + 1, first), tl.minimum(first_token + BM, count)
    queries = _tile(q, first_token, i, real, place, row, head, length, strides_q, dims, D, BD, PLACED)
    factor = scale * LOG2E
    acc = tl.zeros([BM, BV], tl.float32)
    top, weight = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    if MERGE:  # ahead of the loop, so that the tile behind it need not wait for two reads
        further_weight = _log_weight(log_sum, i, real, place, head, row, length, tokens, PLACED)
    if SINKS:  # read ahead of the loop, seen after it, so that none waits for another
        sink, present, sink_keys, sink_values = _sinks_below(
            k, v, first, low, sinks, place, row, shared, length, strides_k, strides_v, places, dims, columns,
            D, V, BD, BV, PLACED,
        )  # fmt: skip
    for key in range(low // BN * BN, high, BN):
        j = key + tl.arange(0, BN)
        valid = j < high
        keys = _step(k_steps, key, j, valid, place, row, shared, length, strides_k, dims, D, BD, BN, PLACED, BULK)
        values = _step(v_steps, key, j, valid, place, row, shared, length, strides_v, columns, V, BV, BN, PLACED, BULK)
        reach = _reach(j, begin, total, window, sinks, BM, STREAM, SINKS)
        seen = _near(i[:, None], start[:, None], j[None, :], reach[None, :], STREAM)
        acc, top, weight = softmax_step(acc, top, weight, queries, keys, values, seen, factor, PRECISION)
    if SINKS:
        if low > first:
            seen = present[None, :] & (sink[None, :] >= start[:, None])
            acc, top, weight = softmax_step(acc, top, weight, queries, sink_keys, sink_values, seen, factor, PRECISION)
    weight = tl.where(real, weight, 1.0)
    acc = acc / weight[:, None]
    logarithm = top + tl.log2(weight)
    if MERGE:
        some = further_weight > float("-inf")
        further = _tile(other, first_token, i, some, place, row, head, length, strides_other, columns, V, BV, PLACED)
        further = further.to(tl.float32) * _scale_of(other_scale, head, columns, V)[None, :]
        own = tl.where(real, logarithm, 0.0)
        higher = tl.maximum(own, further_weight)
        logarithm = higher + tl.log2(tl.exp2(own - higher) + tl.exp2(further_weight - higher))
        acc = acc * tl.exp2(own - logarithm)[:, None] + further * tl.exp2(further_weight - logarithm)[:, None]
    there = _offsets(i, real, place, row, length, length.to(tl.int64) * query_heads * V, query_heads * V, PLACED)
    store_features(o + head * V, there, acc, real, columns, V, BV)
    if LSE:
        logarithm *= LN_2
    tl.store(lse + head * tokens + _at(i, real, place, row, length, LSE, PLACED), logarithm, mask=real)


@triton.jit(do_not_specialize=["length", "total", "tokens"])
def row_kernel(
    o, do, lse, dlse, sums, other, log_sum, other_scale, d_other, d_log_sum, d_scale, begin, place,
    length, total, tokens, heads, strides_o, strides_do, strides_other,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, STREAM: tl.constexpr, PLACED: tl.constexpr,
    LSE: tl.constexpr, DLSE: tl.constexpr, MERGE: tl.constexpr, D_SCALE: tl.constexpr,
):  # fmt: skip
    """`sums` `[2, Hq, B * T]` in the order of the stream: `lse` in base 2, and what the softmax subtracts from the
    gradient of its weights, sum(o * do) - dlse. With MERGE also the gradients of the other attention; with D_SCALE
    those of its scale, of each block of tokens alone: `[blocks, Hq, V]`.
    """
    head, block, row = _work(tl.cdiv(total, BM), heads)
    i = block * BM + tl.arange(0, BM)
    real = _starts(i, begin, total, STREAM) <= i
    columns = tl.arange(0, BV)
    output = _tile(o, block * BM, i, real, place, row, head, length, strides_o, columns, V, BV, PLACED)
    gradient = _tile(do, block * BM, i, real, place, row, head, length, strides_do, columns, V, BV, PLACED)
    if MERGE:  # read with the others, so that none waits for another
        further_weight = _log_weight(log_sum, i, real, place, head, row, length, tokens, PLACED)
        some = further_weight > float("-inf")
        further = _tile(other, block * BM, i, some, place, row, head, length, strides_other, columns, V, BV, PLACED)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    there = head * tokens + _at(i, real, place, row, length, LSE, PLACED)
    weight = tl.load(lse + there, mask=real, other=0.0)
    if LSE:
        weight *= LOG2E
    if DLSE:
        delta -= tl.load(dlse + there, mask=real, other=0.0)
    here = sums + head * tokens + row * length + i
    tl.store(here, weight, mask=real)
    tl.store(here + tl.cast(heads, tl.int64) * tokens, delta, mask=real)
    if MERGE:
        further = further.to(tl.float32)
        scaled = gradient.to(tl.float32) * _scale_of(other_scale, head, columns, V)[None, :]
        share = tl.exp2(further_weight - weight)
        there = head * tokens + _at(i, real, place, row, length, True, PLACED)
        tl.store(d_log_sum + there, share * (tl.sum(scaled * further, 1) - delta), mask=real)
        there = _offsets(i, real, place, row, length, length.to(tl.int64) * heads * V, heads * V, PLACED)
        store_features(d_other + head * V, there, scaled * share[:, None], real, columns, V, BV)
        if D_SCALE:
            part = tl.sum(gradient.to(tl.float32) * further * share[:, None], 0)
            slot = (row * tl.cdiv(total, BM) + block) * heads + head
            tl.store(d_scale + slot * V + columns, part, mask=columns < V)


@triton.jit
def _key_side(
    k, v, q_steps, do_steps, sums, dk, dv, near, begin, owner, place,
    head, first_token, row, count, scale, length, total, tokens, window, sinks, query_heads, shared,
    strides_q, strides_k, strides_v, strides_do,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STREAM: tl.constexpr, PLACED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys from the queries that loop over it; those of sinks go to `near`."""
    j = first_token + tl.arange(0, BM)
    start_j = _starts(j, begin, total, STREAM)
    real = start_j <= j
    dims, columns = tl.arange(0, BD), tl.arange(0, BV)
    keys = _tile(k, first_token, j, real, place, row, head, length, strides_k, dims, D, BD, PLACED)
    values = _tile(v, first_token, j, real, place, row, head, length, strides_v, columns, V, BV, PLACED)
    reach = _reach(j, begin, total, window, sinks, BM, STREAM, SINKS)
    high = tl.minimum(tl.max(tl.where(real, reach, 0), 0), count)
    acc_k, acc_v = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BV], tl.float32)
    factor = scale * LOG2E
    group, steps = query_heads // shared, tl.cdiv(high - first_token, BN)
    for n in range(0, group * steps):
        query_head, query = head * group + n // steps, first_token + n % steps * BN
        i = query + tl.arange(0, BN)
        start = _starts(i, begin, total, STREAM)
        valid = start <= i
        queries = _step(
            q_steps, query, i, valid, place, row, query_head, length, strides_q, dims, D, BD, BN, PLACED, BULK
        )
        gradient = _step(
            do_steps, query, i, valid, place, row, query_head, length, strides_do, columns, V, BV, BN, PLACED, BULK
        )
        there = sums + query_head * tokens + row * length + i
        weight = tl.load(there, mask=valid, other=0.0)
        delta = tl.load(there + tl.cast(query_heads, tl.int64) * tokens, mask=valid, other=0.0)
        # Transposed scores by a dot of their own: a transposed accumulator as operand is miscompiled on sm_90.
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * factor - weight[None, :]
        seen = _near(i[None, :], start[None, :], j[:, None], reach[:, None], STREAM)
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v, input_precision=PRECISION)
        slope = tl.dot(values, tl.trans(gradient), input_precision=PRECISION) - delta[None, :]
        acc_k = tl.dot((p * slope).to(queries.dtype), queries, acc_k, input_precision=PRECISION)
    acc_k *= scale
    plain = real
    if SINKS:
        sink = real & (j - start_j < sinks)
        plain = real & (sink == 0)
        if tl.max(sink.to(tl.int32), 0) > 0:
            sequence = row + tl.zeros([BM], tl.int64)
            if STREAM:
                sequence = tl.load(owner + j, mask=sink, other=0).to(tl.int64)
            there = ((sequence * shared + head) * sinks + tl.where(sink, j - start_j, 0)) * (D + V)
            store_features(near, there, acc_k, sink, dims, D, BD)
            store_features(near + D, there, acc_v, sink, columns, V, BV)
    there = _offsets(j, real, place, row, length, length.to(tl.int64) * shared * D, shared * D, PLACED)
    store_features(dk + head * D, there, acc_k, plain, dims, D, BD)
    there = _offsets(j, real, place, row, length, length.to(tl.int64) * shared * V, shared * V, PLACED)
    store_features(dv + head * V, there, acc_v, plain, columns, V, BV)


@triton.jit
def _query_side(
    q, k, v, do, k_steps, v_steps, sums, dq, far, begin, place,
    head, first_token, first, slot, row, count, scale, length, total, tokens, window, sinks, query_heads, group,
    strides_q, strides_k, strides_v, strides_do,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, STREAM: tl.constexpr, PLACED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and its part of the dk and dv of sinks before the keys it loops over, to `far`."""
    i = first_token + tl.arange(0, BM)
    start = _starts(i, begin, total, STREAM)
    real = start <= i
    dims, columns, places = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BS)
    shared = head // group
    queries = _tile(q, first_token, i, real, place, row, head, length, strides_q, dims, D, BD, PLACED)
    gradient = _tile(do, first_token, i, real, place, row, head, length, strides_do, columns, V, BV, PLACED)
    own = sums + head * tokens + row * length + i
    weight = tl.load(own, mask=real, other=0.0)
    delta = tl.load(own + tl.cast(query_heads, tl.int64) * tokens, mask=real, other=0.0)
    factor = scale * LOG2E
    acc = tl.zeros([BM, BD], tl.float32)
    low, high = tl.maximum(first_token - window + 1, first), tl.minimum(first_token + BM, count)
    if SINKS:  # read ahead of the loop, seen after it, so that none waits for another
        sink, present, sink_keys, sink_values = _sinks_below(
            k, v, first, low, sinks, place, row, shared, length, strides_k, strides_v, places, dims, columns,
            D, V, BD, BV, PLACED,
        )  # fmt: skip
    for key in range(low // BN * BN, high, BN):
        j = key + tl.arange(0, BN)
        valid = j < high
        keys = _step(k_steps, key, j, valid, place, row, shared, length, strides_k, dims, D, BD, BN, PLACED, BULK)
        values = _step(v_steps, key, j, valid, place, row, shared, length, strides_v, columns, V, BV, BN, PLACED, BULK)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor - weight[:, None]
        reach = _reach(j, begin, total, window, sinks, BM, STREAM, SINKS)
        seen = _near(i[:, None], start[:, None], j[None, :], reach[None, :], STREAM)
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        slope = tl.dot(gradient, tl.trans(values), input_precision=PRECISION) - delta[:, None]
        acc = tl.dot((p * slope).to(keys.dtype), keys, acc, input_precision=PRECISION)
    if SINKS:
        if low > first:
            scores = tl.dot(queries, tl.trans(sink_keys), input_precision=PRECISION) * factor - weight[:, None]
            seen = present[None, :] & (sink[None, :] >= start[:, None])
            p = tl.exp2(tl.where(seen, scores, float("-inf")))
            slope = tl.dot(gradient, tl.trans(sink_values), input_precision=PRECISION) - delta[:, None]
            acc = tl.dot((p * slope).to(sink_keys.dtype), sink_keys, acc, input_precision=PRECISION)
            # The same transposed, by dots of their own: transposed q and do as operands are miscompiled on sm_90.
            scores = tl.dot(sink_keys, tl.trans(queries), input_precision=PRECISION) * factor - weight[None, :]
            seen = present[:, None] & (sink[:, None] >= start[None, :])
            p = tl.exp2(tl.where(seen, scores, float("-inf")))
            slope = tl.dot(sink_values, tl.trans(gradient), input_precision=PRECISION) - delta[None, :]
            part_v = tl.dot(p.to(gradient.dtype), gradient, input_precision=PRECISION)
            part_k = tl.dot((p * slope).to(queries.dtype), queries, input_precision=PRECISION) * scale
            there = ((slot * query_heads + head) * sinks + places) * (D + V)
            store_features(far, there, part_k, places < sinks, dims, D, BD)
            store_features(far + D, there, part_v, places < sinks, columns, V, BV)
    there = _offsets(i, real, place, row, length, length.to(tl.int64) * query_heads * D, query_heads * D, PLACED)
    store_features(dq + head * D, there, acc * scale, real, dims, D, BD)


@triton.jit(do_not_specialize=["scale", "length", "total", "tokens", "window", "sinks"])
def backward_kernel(
    q, k, v, do, q_steps, k_steps, v_steps, do_steps, sums, dq, dk, dv, near, far, begin, owner, place,
    scale, length, total, tokens, window, sinks, query_heads, shared,
    strides_q, strides_k, strides_v, strides_do,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, STREAM: tl.constexpr, PLACED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """All gradients: programs of a block of keys and of a block of queries side by side, so that both find in the
    L2 cache what the other has read. BN divides BM.
    """
    blocks, group = tl.cdiv(total, BM), query_heads // shared
    kind, block, row = _work(blocks, query_heads + shared)
    first_token = block * BM
    count, first = total, block * 0
    if STREAM:
        count, first = tl.load(begin + total), tl.load(begin + first_token)
        if first > first_token:
            return
    if kind < shared:
        _key_side(
            k, v, q_steps, do_steps, sums, dk, dv, near, begin, owner, place,
            kind, first_token, row, count, scale, length, total, tokens, window, sinks, query_heads, shared,
            strides_q, strides_k, strides_v, strides_do,
            D, V, BD, BV, BM, BN, STREAM, PLACED, SINKS, PRECISION, BULK,
        )  # fmt: skip
    else:
        _query_side(
            q, k, v, do, k_steps, v_steps, sums, dq, far, begin, place,
            kind - shared, first_token, first, row * blocks + block, row, count,
            scale, length, total, tokens, window, sinks, query_heads, group,
            strides_q, strides_k, strides_v, strides_do,
            D, V, BD, BV, BM, BN, BS, STREAM, PLACED, SINKS, PRECISION, BULK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "blocks", "window", "sinks"])
def sink_kernel(
    near, far, dk, dv, starts, place,
    length, blocks, window, sinks, query_heads, shared,
    D: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    STREAM: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """dk and dv of the sinks: `near` and the sum of `far` over a sequence's blocks and a group's heads, in order."""
    pieces = tl.cdiv(sinks * (D + V), COLUMNS)
    pid = tl.program_id(0)
    piece, head, sequence = pid % pieces, pid // pieces % shared, (pid // (pieces * shared)).to(tl.int64)
    group = query_heads // shared
    first, last, slots, row = 0, length, sequence * blocks, sequence
    if STREAM:
        first, last = tl.load(starts + sequence), tl.load(starts + sequence + 1)
        slots, row = sequence * 0, sequence * 0
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    token, dim = first + column // (D + V), column % (D + V)
    valid = (column < sinks * (D + V)) & (token < last)
    here = (sequence * shared + head) * sinks * (D + V)
    total = tl.load(near + here + column, mask=valid, other=0.0)
    begin, end = tl.cdiv(first + window, BM), tl.cdiv(last, BM)
    for step in range(0, (end - begin) * group, PARTS):
        part = step + tl.arange(0, PARTS)
        slot = (slots + begin + part // group) * query_heads + head * group + part % group
        keep = (part < (end - begin) * group)[:, None] & valid[None, :]
        there = (slot * sinks * (D + V))[:, None] + column[None, :]
        total += tl.sum(tl.load(far + there, mask=keep, other=0.0), 0)
    there = _offsets(token, valid, place, row, length, length.to(tl.int64) * shared * D, shared * D, PLACED)
    tl.store(dk + there + head * D + dim, total.to(dk.dtype.element_ty), mask=valid & (dim < D))
    there = _offsets(token, valid, place, row, length, length.to(tl.int64) * shared * V, shared * V, PLACED)
    tl.store(dv + there + head * V + dim - D, total.to(dv.dtype.element_ty), mask=valid & (dim >= D))
