"""A decay for every token: its running sums within chunks, and its gradient, a sum over the tokens behind it.

The running sum G of the log decays enters o_t as exp(G_t - G_s), so its gradient at a token is q . dq - k . dk, and
that of the log decay of token t is the sum of those from t to the end of its sequence. A scan along a dimension that is
not the last one takes PyTorch a step after another, 8,192 for 8 x 8,192 tokens. Here one program walks a sequence and
head from its end, 1,024 tokens at a time, whose products lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shape import Shape
from .sweep import log2_decay

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


@triton.jit(do_not_specialize=["length", "stride_q", "stride_k"])
def decay_kernel(
    dots_q, dots_k, at_end, mask, cu_seqlens, total, length, heads, stride_q, stride_k,
    PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, GROUP: tl.constexpr, ENDED: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """total fp32 `[B, T, Hs]`, from dots_q `[PARTS_Q, B, Hs * GROUP, T]`, dots_k `[PARTS_K, B, Hs, T]` and what reaches
    the running sum of the last token besides, at_end `[N, Hs]`.
    """
    pid = tl.program_id(0)
    head, sequence = pid % heads, pid // heads
    row, first, end = sequence.to(tl.int64), 0, length
    if PACKED:
        first = tl.load(cu_seqlens + sequence).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        row = row * 0
    dots_q += (row * heads + head) * GROUP * length
    dots_k += (row * heads + head) * length
    behind = tl.zeros([], tl.float64)  # a small difference of large sums where the sequence is long
    if ENDED:
        behind += tl.load(at_end + pid).to(tl.float64)
    step = tl.arange(0, TOKENS)
    blocks = tl.cdiv(end - first, TOKENS)
    for n in range(0, blocks):
        token = first + (blocks - 1 - n) * TOKENS + step
        ok = token < end
        given = tl.zeros([TOKENS], tl.float64)
        for part in tl.static_range(PARTS_Q):
            for g in tl.static_range(GROUP):
                place = dots_q + part * stride_q + g * length + token
                given += tl.load(place, mask=ok, other=0.0).to(tl.float64)
        for part in tl.static_range(PARTS_K):
            given -= tl.load(dots_k + part * stride_k + token, mask=ok, other=0.0).to(tl.float64)
        found = tl.cumsum(given, 0, reverse=True) + behind
        behind += tl.sum(given, 0)
        if MASKED:
            found = tl.where(tl.load(mask + row * length + token, mask=ok, other=0) != 0, found, 0.0)
        tl.store(total + (row * length + token) * heads + head, found.to(tl.float32), mask=ok)


def decay_gradient(
    dots_q: Tensor, dots_k: Tensor, at_end: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None, shape: Shape
) -> Tensor:
    """Gradient of the log decay of every token, fp32 `[B, T, Hs]`.

    Args:
        dots_q: parts of q . dq, fp32 `[parts, B, Hq, T]`.
        dots_k: parts of k . dk, fp32 `[parts, B, Hs, T]`.
        at_end: gradient of the sum of all log decays besides, `[N, Hs]`.
        cu_seqlens, mask: as `forward`.
        shape: sizes of the call.
    """
    total = torch.empty(shape.rows, shape.length, shape.heads, dtype=torch.float32, device=dots_q.device)
    decay_kernel[(shape.sequences * shape.heads,)](
        dots_q, dots_k, *(dots_q if x is None else x for x in (at_end, mask, cu_seqlens)), total,
        shape.length, shape.heads, dots_q.stride(0), dots_k.stride(0),
        PARTS_Q=dots_q.shape[0], PARTS_K=dots_k.shape[0], GROUP=shape.group,
        ENDED=at_end is not None, MASKED=shape.masked, PACKED=shape.packed, TOKENS=1024, num_warps=4,
    )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["length", "chunks"])
def sums_kernel(log_decay, sums, length, chunks, heads, C: tl.constexpr, BH: tl.constexpr):
    """Running sums of a chunk for BH heads."""
    pid, block = tl.program_id(0), tl.program_id(1)
    row, padded = (pid // chunks).to(tl.int64), chunks * C
    token = pid % chunks * C + tl.arange(0, C)
    head = block * BH + tl.arange(0, BH)
    given = log_decay + (row * length + token[:, None]) * heads + head[None, :]
    known = (head < heads)[None, :]
    rate = tl.load(given, mask=known & (token < length)[:, None], other=0.0)
    found = sums + (row * heads + head[None, :]) * padded + token[:, None]
    tl.store(found, tl.cumsum(log2_decay(rate), 0), mask=known)


def running_sums(log_decay: Tensor, chunk: int) -> Tensor:
    """Of log2 decays from the start of each chunk, token by token, fp32 `[B, H, T up to a whole chunk]`.

    Args:
        log_decay: natural logarithms, fp32 `[B, T, H]`, contiguous.
        chunk: tokens.
    """
    rows, length, heads = log_decay.shape
    chunks = triton.cdiv(length, chunk)
    sums = log_decay.new_empty(rows, heads, chunks * chunk)
    sums_kernel[(rows * chunks, triton.cdiv(heads, 16))](
        log_decay, sums, length, chunks, heads, C=chunk, BH=16, num_warps=4
    )
    return sums
