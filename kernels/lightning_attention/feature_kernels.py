"""Triton kernels of `hedgehog_features`: what lies between x and its features never leaves the chip.

Dimensions: N tokens (of all rows), H heads of the features, of which head h reads head h % Hx of x, D dimensions of x,
F hidden ones, BD and BF their tiles, BM tokens in a block. A program owns a head and every `parts`-th block, so that
matrices are read once for many tokens.

y = scale x W + silu(scale x A) B, features softmax([y, -y]). With g the gradient of the features, p+ and p- their
halves and c = sum(p+ g+) + sum(p- g-):

    dy = p+ (g+ - c) - p- (g- - c),  dh = silu'(h) (dy B^T),  dx = scale (dy W^T + dh A^T),
    dW = scale x^T dy,  dA = scale x^T dh,  dB = silu(h)^T dy,  h = scale x A

The backward pass computes y anew. One kernel makes dy and dx, another one the gradients of the matrices in pieces
of some columns of W or some hidden dimensions, each from every `parts`-th block; the sum over parts is the caller's.
"""

from __future__ import annotations

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of hedgehog_features need triton") from error

from .local_kernels import load_features, store_features


@triton.jit
def _matrix(pointer, rows, columns, R: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """A tile of a matrix `[R, C]`, 0 outside it."""
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    return tl.load(pointer + rows[:, None] * C + columns[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit
def _places(i, length, stride_row, stride):
    """Where tokens lie in a tensor `[B, T, ...]`."""
    return (i // length).to(tl.int64) * stride_row + (i % length).to(tl.int64) * stride


@triton.jit
def _silu(h):
    return h * tl.sigmoid(h)


@triton.jit
def _halves(y, dims, D: tl.constexpr, BD: tl.constexpr):
    """softmax([y, -y]) in its halves."""
    if D < BD:
        y = tl.where((dims < D)[None, :], y, 0.0)
    top = tl.max(tl.abs(y), 1)[:, None]
    plus, minus = tl.exp(y - top), tl.exp(-y - top)
    if D < BD:
        plus, minus = (tl.where((dims < D)[None, :], plus, 0.0), tl.where((dims < D)[None, :], minus, 0.0))
    total = tl.sum(plus + minus, 1)[:, None]
    return plus / total, minus / total


@triton.jit
def _held(weight, up, down, dims, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, dtype: tl.constexpr):
    """The matrices of a head that stay on the chip; a and b only where all hidden dimensions fit one tile (F <= BF)."""
    w = _matrix(weight, dims, dims, D, D, dtype)
    a, b = w, w  # not read
    if F > 0:
        if F <= BF:
            columns = tl.arange(0, BF)
            a, b = _matrix(up, dims, columns, D, F, dtype), _matrix(down, columns, dims, F, D, dtype)
    return w, a, b


@triton.jit
def _projected(
    tile, w, a, b, up, down, scale, dims,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a tile of x; w, a and b as from `_held`."""
    y = tl.dot(tile, w, input_precision=PRECISION) * scale
    if F > 0:
        if F <= BF:
            hidden = _silu(tl.dot(tile, a, input_precision=PRECISION) * scale).to(tile.dtype)
            y = tl.dot(hidden, b, y, input_precision=PRECISION)
        else:
            for f in range(0, F, BF):
                columns = f + tl.arange(0, BF)
                some_a = _matrix(up, dims, columns, D, F, tile.dtype)
                hidden = _silu(tl.dot(tile, some_a, input_precision=PRECISION) * scale).to(tile.dtype)
                some_b = _matrix(down, columns, dims, F, D, tile.dtype)
                y = tl.dot(hidden, some_b, y, input_precision=PRECISION)
    return y


@triton.jit(do_not_specialize=["scale", "tokens", "length"])
def features_kernel(
    x, weight, up, down, o, scale, tokens, length, heads, heads_x, strides,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The features `[N, H, 2 D]`."""
    head, part = tl.program_id(0) % heads, tl.program_id(0) // heads
    dims = tl.arange(0, BD)
    dtype: tl.constexpr = x.dtype.element_ty
    x += (head % heads_x).to(tl.int64) * strides[2]
    up, down = up + head * D * F, down + head * D * F
    w, a, b = _held(weight + head * D * D, up, down, dims, D, F, BF, dtype)
    for block in range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // heads):
        i = block * BM + tl.arange(0, BM)
        valid = i < tokens
        tile = load_features(x, _places(i, length, strides[0], strides[1]), valid, dims, D, BD)
        y = _projected(tile, w, a, b, up, down, scale, dims, D, F, BF, PRECISION)
        plus, minus = _halves(y, dims, D, BD)
        there = (i.to(tl.int64) * heads + head) * (2 * D)
        store_features(o, there, plus, valid, dims, D, BD)
        store_features(o + D, there, minus, valid, dims, D, BD)


@triton.jit(do_not_specialize=["scale", "tokens", "length"])
def input_kernel(
    x, do, weight, up, down, dx, dy, scale, tokens, length, heads, heads_x, strides, strides_do,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and dy `[N, H, D]`; the former of each head, also where several read the same one of x."""
    head, part = tl.program_id(0) % heads, tl.program_id(0) // heads
    dims = tl.arange(0, BD)
    dtype: tl.constexpr = x.dtype.element_ty
    x += (head % heads_x).to(tl.int64) * strides[2]
    do += head.to(tl.int64) * strides_do[2]
    up, down = up + head * D * F, down + head * D * F
    w, a, b = _held(weight + head * D * D, up, down, dims, D, F, BF, dtype)
    for block in range(part, tl.cdiv(tokens, BM), tl.num_programs(0) // heads):
        i = block * BM + tl.arange(0, BM)
        valid = i < tokens
        tile = load_features(x, _places(i, length, strides[0], strides[1]), valid, dims, D, BD)
        there = _places(i, length, strides_do[0], strides_do[1])
        of_plus = load_features(do, there, valid, dims, D, BD).to(tl.float32)
        of_minus = load_features(do + D, there, valid, dims, D, BD).to(tl.float32)
        y = _projected(tile, w, a, b, up, down, scale, dims, D, F, BF, PRECISION)
        plus, minus = _halves(y, dims, D, BD)
        mean = tl.sum(plus * of_plus + minus * of_minus, 1)[:, None]
        slope = (plus * (of_plus - mean) - minus * (of_minus - mean)).to(dtype)
        acc = tl.dot(slope, tl.trans(w), input_precision=PRECISION)
        if F > 0:
            if F <= BF:
                acc = _through_hidden(acc, tile, slope, a, b, scale, PRECISION)
            else:
                for f in range(0, F, BF):
                    some = f + tl.arange(0, BF)
                    of_a, of_b = _matrix(up, dims, some, D, F, dtype), _matrix(down, some, dims, F, D, dtype)
                    acc = _through_hidden(acc, tile, slope, of_a, of_b, scale, PRECISION)
        there = (i.to(tl.int64) * heads + head) * D
        store_features(dx, there, acc * scale, valid, dims, D, BD)
        store_features(dy, there, slope, valid, dims, D, BD)


@triton.jit
def _through_hidden(acc, tile, slope, a, b, scale, PRECISION: tl.constexpr):
    """Adds dh A^T of some hidden dimensions."""
    h = tl.dot(tile, a, input_precision=PRECISION) * scale
    share = tl.sigmoid(h)
    dh = tl.dot(slope, tl.trans(b), input_precision=PRECISION) * (share * (1 + h * (1 - share)))
    return tl.dot(dh.to(tile.dtype), tl.trans(a), acc, input_precision=PRECISION)


@triton.jit
def _of_weight(
    x, dy, dw, first, part, parts, scale, tokens, length, heads, strides,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW of the columns from `first` on."""
    dims, columns = tl.arange(0, BD), first + tl.arange(0, BC)
    acc = tl.zeros([BD, BC], tl.float32)
    for block in range(part, tl.cdiv(tokens, BM), parts):
        i = block * BM + tl.arange(0, BM)
        valid = i < tokens
        tile = load_features(x, _places(i, length, strides[0], strides[1]), valid, dims, D, BD)
        inside = valid[:, None] & (columns < D)[None, :]
        slope = tl.load(dy + (i.to(tl.int64) * (heads * D))[:, None] + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(tile), slope, acc, input_precision=PRECISION)
    inside = (dims < D)[:, None] & (columns < D)[None, :]
    tl.store(dw + dims[:, None] * D + columns[None, :], acc * scale, mask=inside)


@triton.jit
def _of_hidden(
    x, dy, up, down, da, db, first, part, parts, scale, tokens, length, heads, strides,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA and dB of the hidden dimensions from `first` on."""
    dims, hidden = tl.arange(0, BD), first + tl.arange(0, BC)
    dtype: tl.constexpr = x.dtype.element_ty
    a, b = _matrix(up, dims, hidden, D, F, dtype), _matrix(down, hidden, dims, F, D, dtype)
    of_a, of_b = tl.zeros([BC, BD], tl.float32), tl.zeros([BC, BD], tl.float32)
    for block in range(part, tl.cdiv(tokens, BM), parts):
        i = block * BM + tl.arange(0, BM)
        valid = i < tokens
        tile = load_features(x, _places(i, length, strides[0], strides[1]), valid, dims, D, BD)
        slope = load_features(dy, i.to(tl.int64) * (heads * D), valid, dims, D, BD)
        h = tl.dot(tl.trans(a), tl.trans(tile), input_precision=PRECISION) * scale
        share = tl.sigmoid(h)
        of_b = tl.dot((h * share).to(dtype), slope, of_b, input_precision=PRECISION)
        dh = tl.dot(b, tl.trans(slope), input_precision=PRECISION) * (share * (1 + h * (1 - share)))
        of_a = tl.dot(dh.to(dtype), tile, of_a, input_precision=PRECISION)
    inside = (hidden < F)[:, None] & (dims < D)[None, :]
    tl.store(da + dims[None, :] * F + hidden[:, None], of_a * scale, mask=inside)
    tl.store(db + hidden[:, None] * D + dims[None, :], of_b, mask=inside)


@triton.jit(do_not_specialize=["scale", "tokens", "length"])
def matrices_kernel(
    x, dy, up, down, sums, scale, tokens, length, heads, heads_x, strides,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the matrices, of each part alone, fp32: of each dW `[H, D, D]`, dA `[H, D, F]`, dB `[H, F, D]`.

    Products that have tokens along their sum take x and dy as they lie in memory, and hidden dimensions transposed
    from the start: a transposed accumulator as operand is miscompiled on sm_90.
    """
    of_w: tl.constexpr = (D + BC - 1) // BC
    pieces: tl.constexpr = of_w + (F + BC - 1) // BC
    pid = tl.program_id(0)
    piece, head, part = pid % pieces, pid // pieces % heads, pid // (pieces * heads)
    parts = tl.num_programs(0) // (pieces * heads)
    x += (head % heads_x).to(tl.int64) * strides[2]
    dy += head * D
    dw = sums + part.to(tl.int64) * (heads * D * (D + 2 * F)) + head * (D * D)
    if piece < of_w:
        _of_weight(
            x, dy, dw, piece * BC, part, parts, scale, tokens, length, heads, strides,
            D, BD, BC, BM, PRECISION,
        )  # fmt: skip
    else:
        da = dw + (heads - head) * (D * D) + head * (D * F)
        _of_hidden(
            x, dy, up + head * D * F, down + head * D * F, da, da + heads * (D * F),
            (piece - of_w) * BC, part, parts, scale, tokens, length, heads, strides, D, F, BD, BC, BM, PRECISION,
        )  # fmt: skip
