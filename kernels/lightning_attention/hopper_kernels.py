"""The sweep of `sweep.py` for Hopper GPUs, in Gluon: one warp fetches, one or two warpgroups multiply.

    out_i = scale * sum_j exp(G_i - G_j) (a_i . b_j) c_j        j <= i, or j >= i in reversed time

A producer warp brings chunks of 64 tokens by bulk copies (TMA) into a ring; each consumer, a warpgroup, computes 64
columns of out and keeps the state of these columns in registers, transposed: S^T [64, A] = fade S^T + (c source)^T b,
so that c, read from shared memory and scaled, is an operand in registers and needs no memory of its own. All products
are asynchronous warpgroup products (wgmma). Both consumers of a program read the same tiles of a and b.

SUM is what a sweep has to do with the sum z of the weights by which the output is divided: nothing (NO_SUM); to make
it, beside the state (MAKE_SUM: o); to be given 1/z of each query (GIVEN_SUM: dv), and also -(do . o), which is added to
a . b before the weights are formed (GIVEN_BOTH: dq, dk). What this adds through the state is one more vector, `extra`:
the sum of b, A numbers, or of c, one for each column.

Dimensions: A features of a and b, V columns of c and out, GROUP query heads that share a key/value head and its state,
of which a program has HEADS: all in reversed time, where they add up, else as many as there are programs enough for.
READERS states read one key/value head where each query head has its own (GROUP is 1); dk and dv are then of each state.
Chunks have 64 tokens. Numbers as in `sweep.py`; a NaN in a packed sequence may reach the last chunk of its neighbour.

Source: Lightning Attention-2, arXiv 2401.04658; the division of labour is that of FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

from .hopper_parts import (
    GIVEN_BOTH,
    GIVEN_SUM,
    MAKE_SUM,
    barrier,
    bulk_load,
    chunk_start,
    fade_values,
    fetch,
    in_two_parts,
    locate,
    log2_rate,
    pair_decay,
    read_line,
    renew,
    rounded_off,
    send,
    state_decays,
    store_rows,
    write_lines,
)

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:
    raise ImportError("the kernels for Hopper need triton with Gluon") from error


@gluon.jit
def fill(descs, rings, full, stage, row, token, head_a, head, column, CONSUMERS: gl.constexpr, DOTS: gl.constexpr):
    """Send for the tiles of a chunk but that of a."""
    fetch(descs[1], row, token, head, 0, full, rings[1].index(stage))
    for i in gl.static_range(CONSUMERS):
        fetch(descs[2], row, token, head, column + i * 64, full, rings[2].index(stage * CONSUMERS + i))
        if DOTS:
            fetch(descs[4], row, token, head_a, column + i * 64, full, rings[3].index(stage * CONSUMERS + i))


@gluon.jit
def produce(
    first, second, sums, numbers, rings, bars, cu_seqlens, sizes,
    A: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, READERS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PAIR: gl.constexpr, REVERSED: gl.constexpr, PER_TOKEN: gl.constexpr,
    DOTS: gl.constexpr, PACKED: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: all work of the program, chunk after chunk, as far ahead as the ring allows.

    Of 256 features there is one tile of a; it is given back before the others, which the same consumers still read.
    """
    full, empty, full_a, empty_a = bars
    ALONE: gl.constexpr = A == 256
    inverses, biases = numbers
    _, _, length, tokens, _, _, first_stage = sizes
    columns: gl.constexpr = (1 if ALONE else 2) * A + CONSUMERS * (128 if DOTS else 64)  # of 64 tokens in bf16
    stage = first_stage
    phase = 1  # of a fresh barrier the phase before has passed: the first round does not wait
    phase_a = 1
    for work in range(gl.program_id(0), sizes[0], gl.num_programs(0)):
        which, _, row, head, start, stop, block = locate(work, cu_seqlens, sizes, PAIR, BLOCKS, PACKED)
        column = block * 64 * CONSUMERS
        if SUM >= GIVEN_SUM:
            inverse = read_line(inverses, row, head, length, tokens, start, stop, 0, HEADS, REVERSED, PER_TOKEN)
            if SUM == GIVEN_BOTH:
                bias = read_line(biases, row, head, length, tokens, start, stop, 0, HEADS, REVERSED, PER_TOKEN)
        for n in range(gl.cdiv(stop - start, 64)):
            token = chunk_start(n, start, stop, REVERSED, PER_TOKEN)
            for g in gl.static_range(HEADS):
                if REVERSED:
                    own, head_a, other = head, head // READERS, head * HEADS + g
                else:
                    own, head_a, other = head * HEADS // GROUP, head * HEADS + g, head * HEADS // GROUP // READERS
                mbarrier.wait(empty.index(stage), phase)
                here = full.index(stage)
                mbarrier.expect(here, columns * 64 * 2 + (64 * 4 if PER_TOKEN else 0))
                if PAIR:
                    if which == 0:
                        fill(first, rings, here, stage, row, token, head_a, other, column, CONSUMERS, DOTS)
                    else:
                        fill(second, rings, here, stage, row, token, head_a, other, column, CONSUMERS, DOTS)
                else:
                    fill(first, rings, here, stage, row, token, head_a, other, column, CONSUMERS, DOTS)
                if PER_TOKEN:
                    line = rings[4].index(stage).reshape([1, 1, 64])
                    bulk_load(sums, [row, own, token], here, line)
                slot = stage
                if ALONE:
                    mbarrier.wait(empty_a, phase_a)
                    phase_a ^= 1
                    slot, here = 0, full_a
                    mbarrier.expect(here, A * 64 * 2)
                if PAIR:
                    if which == 0:
                        fetch(first[0], row, token, head_a, 0, here, rings[0].index(slot))
                    else:
                        fetch(second[0], row, token, head_a, 0, here, rings[0].index(slot))
                else:
                    fetch(first[0], row, token, head_a, 0, here, rings[0].index(slot))
                if SUM >= GIVEN_SUM:  # those of the next step are sent for before these are waited for
                    rings[5].index(stage).store(inverse)
                    count = n * HEADS + g + 1
                    inverse = read_line(
                        inverses, row, head, length, tokens, start, stop, count, HEADS, REVERSED, PER_TOKEN
                    )
                    if SUM == GIVEN_BOTH:
                        rings[6].index(stage).store(bias)
                        bias = read_line(
                            biases, row, head, length, tokens, start, stop, count, HEADS, REVERSED, PER_TOKEN
                        )
                    barrier()
                    mbarrier.arrive(full.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def consume(
    first, second, pointers, rings, bars, memory, given, sizes, strides,
    HALF: gl.constexpr, A: gl.constexpr, V: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PAIR: gl.constexpr, REVERSED: gl.constexpr,
    ENTERING: gl.constexpr, LEAVING: gl.constexpr, PER_TOKEN: gl.constexpr, DOTS: gl.constexpr, PACKED: gl.constexpr,
    SUM: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: 64 columns of all work of the program."""
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    acc_line: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    transposed: gl.constexpr = gl.DotOperandLayout(0, acc_state, 2)
    by_rows: gl.constexpr = gl.SliceLayout(1, acc)
    by_columns: gl.constexpr = gl.SliceLayout(0, acc)
    by_steps: gl.constexpr = gl.SliceLayout(0, transposed)
    TIGHT: gl.constexpr = A == 256  # beside such a state there is no room for a table, nor for two tiles of a
    MADE: gl.constexpr = SUM == MAKE_SUM
    BOTH: gl.constexpr = SUM == GIVEN_BOTH
    # Heads that share a state: for dk and dv each adds to one output and to the state; else each has an output, and the
    # last one brings the state forward.
    READ_TO: gl.constexpr = 0 if REVERSED else HEADS - 1  # the last that reads the state
    ADD_FROM: gl.constexpr = 0 if REVERSED else HEADS - 1  # the first that adds to it
    EMIT_FROM: gl.constexpr = HEADS - 1 if REVERSED else 0  # the first whose output is complete
    OUTS: gl.constexpr = 1 if REVERSED else HEADS
    BEHIND: gl.constexpr = 2 if LEAVING else 1  # products after that of out
    a_ring, b_ring, c_ring, other_ring, sums_ring, inverse_ring, bias_ring = rings
    full, empty, full_a, empty_a = bars
    state_memory, out_memory = memory[0].index(HALF), memory[1].index(HALF)
    extra_memory, source_memory = memory[2].index(HALF), memory[3].index(HALF)
    made_lines, dots_lines = memory[4], memory[5]
    entering, entering_sum, leaving, leaving_sum, log_decay, made, dots, cu_seqlens, scale = given
    works, heads, length, tokens, _, segments, first_stage = sizes
    stride_a, stride_c, stride_dots = strides
    rows = gl.arange(0, 64, layout=by_rows)
    columns = gl.arange(0, 64, layout=by_columns)
    step = gl.arange(0, 64, layout=by_steps)
    zero = gl.zeros([64, 64], gl.float32, acc)
    zero_line = gl.zeros([64, 8], gl.float32, acc_line)
    stage = first_stage
    phase = 0
    phase_a = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        which, item, row, head, start, stop, block = locate(work, cu_seqlens, sizes, PAIR, BLOCKS, PACKED)
        column = (block * CONSUMERS + HALF) * 64
        if REVERSED:
            own, owners = head, heads  # of the state
        else:
            own, owners = head * HEADS // GROUP, heads * HEADS // GROUP
        place_state = item.to(gl.int64) * owners + own
        if not (PER_TOKEN or TIGHT):
            rate = log2_rate(log_decay + own)
            table = pair_decay(rate * (rows + 1), rate * (columns + 1), scale, acc, REVERSED)
            reach, source = state_decays(rate * (rows + 1), rate * (step + 1), rate * 64, scale, REVERSED)
            fade = gl.exp2(rate * 64)
        state = gl.zeros([64, A], gl.float32, acc_state)
        if MADE:
            extra = gl.zeros([A, 8], gl.float32, acc_line)  # of which the sum is four times that of b
        else:
            extra = gl.zeros([64], gl.float32, gl.SliceLayout(1, transposed))
        if ENTERING:
            step_a, step_c = stride_a, stride_c
            if PAIR:
                if which == 1:
                    step_a, step_c = stride_c, stride_a
            values = column + gl.arange(0, 64, layout=gl.SliceLayout(1, acc_state))
            dims = gl.arange(0, A, layout=gl.SliceLayout(0, acc_state))
            base = entering + place_state * (A * V)
            state += gl.load(base + gl.expand_dims(values * step_c, 1) + gl.expand_dims(dims * step_a, 0))
            if MADE:
                numbers = gl.arange(0, A, layout=gl.SliceLayout(1, acc_line))
                extra += gl.expand_dims(gl.load(entering_sum + place_state * A + numbers) / 2, 1)
            if BOTH:
                values = column + gl.arange(0, 64, layout=gl.SliceLayout(1, transposed))
                extra += gl.load(entering_sum + place_state * V + values)
        barrier()  # every warp is done with what these hold
        state_memory.store(state.to(gl.bfloat16))
        if MADE:
            extra_memory.permute((1, 0)).store(extra.to(gl.bfloat16))
            if not PER_TOKEN:
                to_end = 63 - gl.arange(0, 64, layout=gl.SliceLayout(1, acc_line))
                line = gl.exp2(log2_rate(log_decay + own) * to_end)
                source_memory.permute((1, 0)).store(in_two_parts(line, zero_line, acc_line))
        fence_async_shared()
        barrier()
        for n in range(gl.cdiv(stop - start, 64)):
            token = chunk_start(n, start, stop, REVERSED, PER_TOKEN)
            inside = (token + rows >= start) & (token + rows < stop)
            out = zero
            for g in gl.static_range(HEADS):
                inverse, bias = inverse_ring.index(stage), bias_ring.index(stage)
                mbarrier.wait(full.index(stage), phase)
                slot = stage
                if TIGHT:
                    mbarrier.wait(full_a, phase_a)
                    phase_a ^= 1
                    slot = 0
                a, b, c = a_ring.index(slot), b_ring.index(stage), c_ring.index(stage * CONSUMERS + HALF)
                weights = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
                if (PER_TOKEN or TIGHT) and g == 0:
                    if PER_TOKEN:
                        sums = sums_ring.index(stage)
                        by_row, by_column, by_step = sums.load(by_rows), sums.load(by_columns), sums.load(by_steps)
                        total = gl.min(by_column, 0)
                    else:  # read anew for every chunk, or the compiler would keep what follows from it
                        rate = log2_rate(log_decay + own)
                        by_row, by_column, by_step = rate * (rows + 1), rate * (columns + 1), rate * (step + 1)
                        total = rate * 64
                    reach, source = state_decays(by_row, by_step, total, scale, REVERSED)
                    fade = gl.exp2(total)
                    if not TIGHT:
                        table = pair_decay(by_row, by_column, scale, acc, REVERSED)
                if LEAVING and g >= ADD_FROM and not PER_TOKEN:  # the last chunk may be no whole one
                    rate = log2_rate(log_decay + own)
                    count = gl.minimum(stop - token, 64)
                    fade = gl.exp2(rate * count)
                    source = gl.where(step < count, gl.exp2(rate * (count - 1 - step)), 0.0)
                    if MADE:
                        if count < 64:
                            renew(source_memory, source, zero_line, acc_line)
                if MADE and PER_TOKEN and g >= ADD_FROM:
                    renew(source_memory, source, zero_line, acc_line)
                if g <= READ_TO:
                    out = warpgroup_mma(a, state_memory.permute((1, 0)), out, use_acc=False, is_async=True)
                if MADE:
                    reached = warpgroup_mma(a, extra_memory.permute((1, 0)), zero_line, use_acc=False, is_async=True)
                if MADE and g >= ADD_FROM:
                    extra = warpgroup_mma(b.permute((1, 0)), source_memory.permute((1, 0)), extra * fade, is_async=True)
                if g >= ADD_FROM and not TIGHT:
                    faded, added = fade_values(c, source, inverse, bias, transposed, REVERSED, SUM)
                weights = warpgroup_mma_wait(
                    num_outstanding=((3 if g >= ADD_FROM else 2) if MADE else 1) if g <= READ_TO else 0, deps=(weights,)
                )
                if BOTH:
                    if REVERSED:
                        weights += gl.expand_dims(bias.load(by_columns), 0)
                    else:
                        weights += gl.expand_dims(bias.load(by_rows), 1)
                if SUM >= GIVEN_SUM and REVERSED:
                    weights = weights * gl.expand_dims(inverse.load(by_columns), 0)
                if TIGHT:
                    table = pair_decay(by_row, by_column, scale, acc, REVERSED)
                weights = weights * table
                if MADE:
                    total_weight = gl.sum(weights, 1)
                near = gl.convert_layout(weights.to(gl.bfloat16), operand)
                if g >= ADD_FROM and TIGHT:
                    faded, added = fade_values(c, source, inverse, bias, transposed, REVERSED, SUM)
                if g <= READ_TO:
                    if MADE:
                        out, reached = warpgroup_mma_wait(
                            num_outstanding=1 if g >= ADD_FROM else 0, deps=(out, reached)
                        )
                        total_weight += gl.convert_layout(gl.sum(reached, 1), by_rows) * (reach / 4)
                    else:
                        out = warpgroup_mma_wait(num_outstanding=0, deps=(out,))
                    out = out * gl.expand_dims(reach, 1)
                    if BOTH:
                        across = gl.convert_layout(extra, by_columns)
                        if REVERSED:
                            out += gl.expand_dims(reach, 1) * gl.expand_dims(across, 0)
                        else:
                            out += gl.expand_dims(reach * bias.load(by_rows), 1) * gl.expand_dims(across, 0)
                if g == ADD_FROM:
                    state = state * fade
                    if BOTH:
                        extra = extra * fade
                if TIGHT:
                    barrier()  # every warp is done with a
                    mbarrier.arrive(empty_a, count=1)
                out = warpgroup_mma(near, c, out, is_async=True)
                if g >= ADD_FROM:
                    state = warpgroup_mma(faded, b, state, is_async=True)
                    if LEAVING:  # in two parts, so that whoever goes on from it has it as good as in fp32
                        state = warpgroup_mma(rounded_off(c, source, transposed), b, state, is_async=True)
                if MADE:
                    inverted = 1.0 / gl.where(total_weight == 0, 1.0, total_weight)
                if MADE and g >= ADD_FROM:
                    out, extra = warpgroup_mma_wait(num_outstanding=BEHIND if g >= ADD_FROM else 0, deps=(out, extra))
                else:
                    out = warpgroup_mma_wait(num_outstanding=BEHIND if g >= ADD_FROM else 0, deps=(out,))
                if MADE:
                    out = out * gl.expand_dims(inverted, 1)
                if g >= ADD_FROM:
                    state = warpgroup_mma_wait(num_outstanding=0, deps=(state,))
                if BOTH:
                    if g >= ADD_FROM:
                        extra += added
                    if not REVERSED:
                        out = out * gl.expand_dims(inverse.load(by_rows), 1)
                if DOTS and g >= EMIT_FROM:
                    other = other_ring.index(stage * CONSUMERS + HALF).load(acc)
                    dotted = gl.sum(out * other.to(gl.float32), 1)
                if g >= EMIT_FROM:
                    tma.store_wait(pendings=0)  # the store before this one has read out_memory
                barrier()  # every warp is done with the stage, and with the memory of state and out
                mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                if g == HEADS - 1:
                    state_memory.store(state.to(gl.bfloat16))
                    if MADE:
                        extra_memory.permute((1, 0)).store(extra.to(gl.bfloat16))
                if g >= EMIT_FROM:
                    head_out = head * OUTS + (0 if REVERSED else g)
                    if MADE and HALF == 0:
                        made_lines.index(g * 8 + n % 8).store(inverted)
                    if DOTS:
                        dots_lines.index(((0 if REVERSED else g) * CONSUMERS + HALF) * 8 + n % 8).store(dotted)
                    if (token >= start) & (token + 64 <= stop):
                        out_memory.store(out.to(gl.bfloat16))
                    fence_async_shared()
                    barrier()
                    pointer = pointers[0]
                    if PAIR:
                        if which == 1:
                            pointer = pointers[1]
                    if (token >= start) & (token + 64 <= stop):
                        if PAIR:
                            if which == 0:
                                send(first[3], row, token, head_out, column, out_memory)
                            else:
                                send(second[3], row, token, head_out, column, out_memory)
                        else:
                            send(first[3], row, token, head_out, column, out_memory)
                    else:  # tokens of others on either side
                        store_rows(pointer, out, row, token, head_out, column, heads * OUTS, length, inside, V, acc)
            if (n % 8 == 7) | (n == gl.cdiv(stop - start, 64) - 1):
                for g in gl.static_range(OUTS):
                    head_out = head * OUTS + g
                    if MADE and HALF == 0:
                        if block == 0:
                            place = made + head_out.to(gl.int64) * tokens + row.to(gl.int64) * length
                            write_lines(place, made_lines, g * 8, n, token, start, stop, REVERSED)
                    if DOTS:
                        if which == 0:
                            place = dots + (column // 64).to(gl.int64) * stride_dots
                            place += (row.to(gl.int64) * (heads * OUTS) + head_out) * length
                            write_lines(place, dots_lines, (g * CONSUMERS + HALF) * 8, n, token, start, stop, REVERSED)
        if LEAVING:
            if (item % segments == segments - 1) & (head * HEADS % GROUP == 0):
                place_state = row.to(gl.int64) * owners + own
                values = column + gl.arange(0, 64, layout=gl.SliceLayout(1, acc_state))
                dims = gl.arange(0, A, layout=gl.SliceLayout(0, acc_state))
                base = leaving + place_state * (A * V)
                gl.store(base + gl.expand_dims(values * stride_c, 1) + gl.expand_dims(dims * stride_a, 0), state)
                if MADE and HALF == 0:
                    if block == 0:
                        numbers = gl.arange(0, A, layout=gl.SliceLayout(1, acc_line))
                        gl.store(leaving_sum + place_state * A + numbers, gl.sum(extra, 1) / 4)
    tma.store_wait(pendings=0)


@gluon.jit(
    do_not_specialize=["scale", "works", "length", "tokens", "segment", "segments", "first_stage", "stride_dots"]
)
def hopper_kernel(
    a, b, c, out, a_second, b_second, c_second, out_second, other, sums, out_pointer, second_pointer,
    entering, entering_sum, leaving, leaving_sum, log_decay, made, inverse, bias, dots, cu_seqlens, scale,
    works, heads, length, tokens, segment, segments, first_stage, stride_a, stride_c, stride_dots,
    A: gl.constexpr, V: gl.constexpr, GROUP: gl.constexpr, READERS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PAIR: gl.constexpr, REVERSED: gl.constexpr, ENTERING: gl.constexpr,
    LEAVING: gl.constexpr, PER_TOKEN: gl.constexpr, DOTS: gl.constexpr, PACKED: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """One sweep, or (PAIR) two that read two tensors in common, over `works` pieces of work.

    The operands are descriptors, None where there are none. sums (PER_TOKEN): of the log2 decays within chunks,
    `decay.running_sums`. leaving, leaving_sum (LEAVING, not PACKED): where the states behind the last tokens go. made:
    where 1/z goes; inverse and bias: 1/z and -(do . o), of each query, `[Hq, B, T]`. DOTS: the products of out and
    `other` of each token, of the first sweep and 64 columns, are stored at `dots` `[V / 64, B, heads, T]`. first_stage
    is 0: were it a constant, the compiler would know the stage of each head of a group whose number the stages divide,
    and keep in registers what follows from that, many more than there are.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    blocks: gl.constexpr = V // (64 * CONSUMERS)
    OUTS: gl.constexpr = 1 if REVERSED else HEADS
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [1 if A == 256 else STAGES, 64, A], tile)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, A], tile)
    c_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CONSUMERS, 64, 64], tile)
    if DOTS:
        other_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CONSUMERS, 64, 64], tile)
    else:
        other_ring = c_ring  # not read
    line: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    sums_ring, inverse_ring, bias_ring = c_ring, c_ring, c_ring  # what is not read
    if PER_TOKEN:
        sums_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    if SUM >= GIVEN_SUM:
        inverse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    if SUM == GIVEN_BOTH:
        bias_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    states = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, A], tile)
    outs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, 64], tile)
    extras, sources, made_lines, dots_lines = states, states, states, states  # what is not used
    if SUM == MAKE_SUM:
        extras = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 8, A], tile)
        sources = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 8, 64], tile)
        made_lines = gl.allocate_shared_memory(gl.float32, [OUTS * 8, 64], line)
    if DOTS:
        dots_lines = gl.allocate_shared_memory(gl.float32, [OUTS * CONSUMERS * 8, 64], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 if SUM < GIVEN_SUM else 2)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    full_a, empty_a = full.index(0), empty.index(0)  # not used
    # No barrier is made that is not used to the end: the compiler gives its memory to other things, into which the
    # hardware writes the barrier when the program is preempted, as where processes share a GPU.
    if A == 256:
        of_a = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        full_a, empty_a = of_a.index(0), of_a.index(1)
        mbarrier.init(full_a, count=1)
        mbarrier.init(empty_a, count=CONSUMERS)
    fence_async_shared()
    if not DOTS:  # what is not read is not given: the host takes long to make a descriptor
        other = a
    if not PER_TOKEN:
        sums = a
    first = (a, b, c, out, other)
    second = first
    if PAIR:
        second = (a_second, b_second, c_second, out_second, other)
    pointers, bars = (out_pointer, second_pointer), (full, empty, full_a, empty_a)
    rings = (a_ring, b_ring, c_ring, other_ring, sums_ring, inverse_ring, bias_ring)
    memory, numbers = (states, outs, extras, sources, made_lines, dots_lines), (inverse, bias)
    given = (entering, entering_sum, leaving, leaving_sum, log_decay, made, dots, cu_seqlens, scale)
    sizes = (works, heads, length, tokens, segment, segments, first_stage)
    strides = (stride_a, stride_c, stride_dots)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (first, second, pointers, rings, bars, memory, given, sizes, strides,
                           0, A, V, blocks, GROUP, HEADS, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, LEAVING,
                           PER_TOKEN, DOTS, PACKED, SUM)),
                (consume, (first, second, pointers, rings, bars, memory, given, sizes, strides,
                           1, A, V, blocks, GROUP, HEADS, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, LEAVING,
                           PER_TOKEN, DOTS, PACKED, SUM)),
                (produce, (first, second, sums, numbers, rings, bars, cu_seqlens, sizes,
                           A, blocks, GROUP, READERS, HEADS, STAGES, CONSUMERS, PAIR, REVERSED, PER_TOKEN, DOTS,
                           PACKED, SUM)),
            ],
            [4, 1],
            # Registers of a thread: the second consumer, the producer; the first has the rest.
            [240, 24] if SUM < GIVEN_SUM else [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (first, second, pointers, rings, bars, memory, given, sizes, strides,
                           0, A, V, blocks, GROUP, HEADS, STAGES, CONSUMERS, PAIR, REVERSED, ENTERING, LEAVING,
                           PER_TOKEN, DOTS, PACKED, SUM)),
                (produce, (first, second, sums, numbers, rings, bars, cu_seqlens, sizes,
                           A, blocks, GROUP, READERS, HEADS, STAGES, CONSUMERS, PAIR, REVERSED, PER_TOKEN, DOTS,
                           PACKED, SUM)),
            ],
            [1],
            [24 if SUM < GIVEN_SUM else 40],
        )  # fmt: skip
