"""Launchers of the kernels of `local_attention`, as operators of torch.library; nothing is read on the host.

Dimensions: B rows, T tokens, N sequences, Hq query heads, Hkv key/value heads, D features of q and k, Dv of v.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bulk import TensorDescriptor, bulk_tensors
from .launch import has_bulk_copies
from .local_kernels import NOWHERE, backward_kernel, forward_kernel, row_kernel, sink_kernel
from .shape import addressable, padded, precision

ROW_BLOCK = 32  # tokens of a program of `row_kernel`
SMALLEST_BULK = 2**25  # elements; of less the host takes longer for descriptors than a kernel runs
_Maybe = Tensor | None
# Of this copy of the file: the one that travels with a checkpoint may be loaded beside the installed one.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class Other(NamedTuple):
    """Attention over other keys, to be merged with the window's."""

    values: Tensor  # [B, T, Hq, Dv]
    log_sum: Tensor  # [Hq, B * T] fp32, natural
    scale: Tensor  # [Hq, Dv] fp32


class LocalConfig(NamedTuple):
    """How a kernel is cut."""

    block: int  # tokens of a program
    step: int  # tokens of an inner step
    warps: int
    stages: int


def local_config(kind: str, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> LocalConfig:
    """Launch parameters of the forward ("forward") and backward ("backward") kernels.

    Up to 128 features chosen in bf16 on an H200 among blocks of 64 and 128, steps of 32 and 64, 4 and 8 warps and 1 to
    4 stages, each checked against fp64 (see README.md). Older GPUs, on which these would spill registers, take those
    that spill least.
    """
    size = max(dim, value_dim)
    if dtype == torch.float32:
        return LocalConfig(32, 32, 8, 1) if size <= 128 else LocalConfig(16, 16, 8, 1)
    if size > 128:
        return LocalConfig(64, 64, 8, 1) if kind == "forward" else LocalConfig(64, 32, 8, 1)
    if not has_bulk_copies(device):
        return LocalConfig(64, 64, 8, 2) if kind == "forward" else LocalConfig(32, 32, 4, 1)
    if kind == "forward":
        return LocalConfig(64, 32, 4, 3)
    return LocalConfig(64, 64, 4, 1) if size <= 64 else LocalConfig(64, 32, 4, 2)  # larger steps spill registers


class Stream(NamedTuple):
    """Real tokens of packed or masked sequences, numbered one sequence after the other; int32."""

    begin: Tensor  # [B * T + 1] first number of the sequence of each token, and their count at the end
    owner: Tensor  # [B * T] sequence of each token
    starts: Tensor  # [N + 1] first number of each sequence
    place: Tensor | None  # [B * T] where a token lies among the B * T; None where none is hidden


def stream_of(rows: int, length: int, cu_seqlens: _Maybe, mask: _Maybe, device: torch.device) -> Stream:
    """Number the real tokens."""
    tokens = rows * length
    token = torch.arange(tokens, device=device)
    starts = torch.arange(rows + 1, device=device) * length if cu_seqlens is None else cu_seqlens.long()
    place = None
    if mask is not None:
        real = mask.flatten()
        before = F.pad(real.cumsum(0), (1, 0))
        starts = before[starts]
        number = torch.where(real, before[:-1], tokens)
        place = (
            torch.zeros(tokens + 1, dtype=torch.int32, device=device).scatter(0, number, token.int())[:-1].clone()
        )  # inductor cannot hand a view on
    # Of all boundaries: inductor cannot search in a part of them.
    owner = torch.searchsorted(starts, token, right=True).sub(1).clamp(max=starts.shape[0] - 2)
    begin = torch.where(token < starts[-1], starts[owner], NOWHERE.value)
    return Stream(torch.cat((begin, starts[-1:])).int(), owner.int(), starts.int(), place)


def _constants(q: Tensor, v: Tensor, config: LocalConfig, begin: _Maybe, place: _Maybe, sinks: int) -> dict[str, Any]:
    return {
        **sizes(q, v),
        "BM": config.block,
        "BN": config.step,
        "BS": padded(sinks),
        "STREAM": begin is not None,
        "PLACED": place is not None,
        "SINKS": sinks > 0,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Constants of every kernel."""
    dim, value_dim = q.shape[3], v.shape[3]
    widths = {"BD": padded(dim), "BV": padded(value_dim)}
    return {"D": dim, "V": value_dim, **widths, "PRECISION": precision(q.dtype)}


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [x.stride()[:3] for x in tensors]


def _bulk(place: _Maybe, *tensors: Tensor) -> bool:
    """Whether the loops read by bulk copies: hidden tokens may hold NaN, dots of fp32 would spill registers, and
    descriptors take the host longer than a small kernel runs.
    """
    large = max(x.numel() for x in tensors) >= SMALLEST_BULK
    return place is None and large and tensors[0].element_size() == 2 and bulk_tensors(tensors)


def _steps(bulk: bool, step: int, *tensors: Tensor) -> list[Any]:
    """What the loops read tiles of `step` tokens of one head from: tensors, or descriptors for bulk copies.

    A program is over too soon to pay for descriptors that it makes itself.
    """
    if not bulk:
        return list(tensors)
    heads_first = [x.transpose(1, 2) for x in tensors]
    return [TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, step, padded(x.shape[3])]) for x in heads_first]


def _extent(q: Tensor, begin: _Maybe, block: int) -> tuple[int, int, int]:
    """Tokens of a stream, blocks of them, and streams."""
    total, streams = (q.shape[1], q.shape[0]) if begin is None else (q.shape[0] * q.shape[1], 1)
    return total, -(-total // block), streams


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, begin: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, return_lse: bool = False, other: Other | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `_forward` and `_merged`."""
    q, k, v = addressable(q), addressable(k), addressable(v)  # the compiler may lay tensors out anew
    rows, length, heads = q.shape[:3]
    config = local_config("forward", q.shape[3], v.shape[3], q.dtype, q.device)
    fill = v.new_empty if place is None else v.new_zeros
    o = fill(rows, length, heads, v.shape[3])
    lse = (fill if return_lse else v.new_empty)(heads, rows * length, dtype=torch.float32)
    total, blocks, streams = _extent(q, begin, config.block)
    bulk = _bulk(place, k, v)
    further = (o, lse, lse) if other is None else (addressable(other.values), *_contiguous(other.log_sum, other.scale))
    forward_kernel[(heads * blocks * streams,)](
        q, k, v, *_steps(bulk, config.step, k, v), *further, o, lse,
        o if begin is None else begin, o if place is None else place,
        scale, length, total, rows * length, window, sinks, heads, heads // k.shape[2], *_strides(q, k, v, further[0]),
        **_constants(q, v, config, begin, place, sinks), BULK=bulk, LSE=return_lse, MERGE=other is not None,
    )  # fmt: skip
    return o, lse


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o `[B, T, Hq, Dv]` and the logarithm of the sum of weights, fp32 `[Hq, B * T]`.

    The latter is to base 2 and in the order of the stream, for the backward pass only; with `return_lse` natural and
    in the order of the tokens, 0 for hidden ones.
    """
    return _launch_forward(q, k, v, begin, place, scale, window, sinks, return_lse)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, length, heads = q.shape[:3]
    o = v.new_empty(rows, length, heads, v.shape[3])
    return o, v.new_empty(heads, rows * length, dtype=torch.float32)


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, table: Sequence[_Maybe],
    scale: float, window: int, sinks: int, return_lse: bool = False, dlse: _Maybe = None,
    other: Other | None = None, d_scale: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, and with `other` its gradients: those of its scale empty but for `d_scale`."""
    q, k, v, do, (o, lse) = addressable(q), addressable(k), addressable(v), addressable(do), _contiguous(o, lse)
    rows, length, heads, dim = q.shape
    shared, value_dim = k.shape[2], v.shape[3]
    config = local_config("backward", dim, value_dim, q.dtype, q.device)
    begin, _, starts, place = table
    fill = torch.empty if place is None else torch.zeros
    dq, dk, dv = (fill(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    total, blocks, streams = _extent(q, begin, config.block)
    sequences = rows if starts is None else starts.shape[0] - 1
    near = q.new_empty((sequences, shared, sinks, dim + value_dim), dtype=torch.float32)
    far = q.new_empty((streams * blocks, heads, sinks, dim + value_dim), dtype=torch.float32)
    # What is not read still has to be a pointer.
    table = [o if x is None else x for x in table]
    given = lse if dlse is None else dlse.contiguous()
    sums = lse.new_empty(2, *lse.shape)
    stream = {"STREAM": begin is not None, "PLACED": place is not None}
    row_blocks = -(-total // ROW_BLOCK) * streams
    further: tuple[Tensor, ...] = (o, lse, lse)
    gradients: tuple[Tensor, ...] = further
    if other is not None:
        further = addressable(other.values), *_contiguous(other.log_sum, other.scale)
        d_other, d_log_sum = (fill(x.shape, dtype=x.dtype, device=x.device) for x in further[:2])
        gradients = d_other, d_log_sum, other.scale.new_empty(row_blocks if d_scale else 0, heads, value_dim)
    row_kernel[(heads * row_blocks,)](
        o, do, lse, given, sums, *further, *gradients, table[0], table[3], length, total, rows * length, heads,
        *_strides(o, do, further[0]), V=value_dim, BV=padded(value_dim), BM=ROW_BLOCK, **stream,
        LSE=return_lse, DLSE=dlse is not None, MERGE=other is not None, D_SCALE=d_scale, num_warps=4,
    )  # fmt: skip
    bulk = _bulk(place, q, k, v, do)
    backward_kernel[((heads + shared) * blocks * streams,)](
        q, k, v, do, *_steps(bulk, config.step, q, k, v, do), sums, dq, dk, dv, near, far,
        table[0], table[1], table[3],
        scale, length, total, rows * length, window, sinks, heads, shared, *_strides(q, k, v, do),
        **_constants(q, v, config, begin, place, sinks), BULK=bulk,
    )  # fmt: skip
    if sinks:
        columns = 128
        sink_kernel[(-(-sinks * (dim + value_dim) // columns) * shared * sequences,)](
            near, far, dk, dv, table[2], table[3], length, blocks, window, sinks, heads, shared,
            D=dim, V=value_dim, BM=config.block, PARTS=16, COLUMNS=columns,
            **stream, num_warps=4,
        )  # fmt: skip
    if other is None:
        return dq, dk, dv
    *rest, parts = gradients
    return dq, dk, dv, *rest, parts.sum(0) if d_scale else parts


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, dlse: _Maybe,
    begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; `lse` as `_forward` made it, `dlse` its gradient where it was returned and has one."""
    table = begin, owner, starts, place
    dq, dk, dv = _launch_backward(q, k, v, o, do, lse, table, scale, window, sinks, return_lse, dlse)
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, dlse: _Maybe,
    begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *table, scale, window, sinks, return_lse = inputs
    ctx.save_for_backward(q, k, v, *output, *table)
    ctx.sizes = scale, window, sinks, return_lse
    ctx.set_materialize_grads(False)  # an lse without a gradient is not read


def _differentiate(ctx: Any, do: _Maybe, dlse: _Maybe) -> tuple[Any, ...]:
    q, k, v, o, lse, *table = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    return *_backward(q, k, v, o, do, lse, dlse, *table, *ctx.sizes), *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(f"{_NAMESPACE}::merged", mutates_args=())
def _merged(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, log_sum: Tensor, other_scale: Tensor,
    begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe, scale: float, window: int, sinks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `_forward`, of the window and the other attention under one denominator."""
    further = Other(other, log_sum, other_scale)
    return _launch_forward(q, k, v, begin, place, scale, window, sinks, other=further)


@_merged.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, log_sum: Tensor, other_scale: Tensor,
    begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe, scale: float, window: int, sinks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty(other.shape), log_sum.new_empty(log_sum.shape)


@torch.library.custom_op(f"{_NAMESPACE}::merged_backward", mutates_args=())
def _merged_backward(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, log_sum: Tensor, other_scale: Tensor,
    o: Tensor, do: Tensor, lse: Tensor, begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, d_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first six; that of `other_scale` is empty but for `d_scale`."""
    table, further = (begin, owner, starts, place), Other(other, log_sum, other_scale)
    dq, dk, dv, d_other, d_log_sum, of_scale = _launch_backward(
        q, k, v, o, do, lse, table, scale, window, sinks, other=further, d_scale=d_scale
    )
    return dq, dk, dv, d_other, d_log_sum, of_scale


@_merged_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, log_sum: Tensor, other_scale: Tensor,
    o: Tensor, do: Tensor, lse: Tensor, begin: _Maybe, owner: _Maybe, starts: _Maybe, place: _Maybe,
    scale: float, window: int, sinks: int, d_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, d_other, d_log_sum = (x.new_empty(x.shape) for x in (q, k, v, other, log_sum))
    of_scale = other_scale.new_empty(other_scale.shape if d_scale else (0, *other_scale.shape))
    return dq, dk, dv, d_other, d_log_sum, of_scale


def _keep_merged(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, window, sinks = inputs
    ctx.save_for_backward(*tensors[:6], *output, *tensors[6:])
    ctx.sizes = scale, window, sinks
    ctx.set_materialize_grads(False)  # of the two outputs o alone is handed on


def _differentiate_merged(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    *operands, o, lse, begin, owner, starts, place = ctx.saved_tensors
    d_scale = ctx.needs_input_grad[5]
    *found, of_scale = _merged_backward(*operands, o, do, lse, begin, owner, starts, place, *ctx.sizes, d_scale)
    return *found, of_scale if d_scale else None, *[None] * 7


_merged.register_autograd(_differentiate_merged, setup_context=_keep_merged)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def promoted(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """All in the dtype that can hold each of them."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return [x.to(dtype) for x in (q, k, v)]


def local_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`local_attention` by the kernels; arguments checked by the caller, T > 0."""
    arguments = _arguments(q, window, sinks, scale, cu_seqlens, mask)
    o, lse = _forward(*promoted(q, k, v), *arguments, return_lse)
    o = o.to(v.dtype)
    return (o, torch.unflatten(lse, 1, q.shape[:2]).permute(1, 2, 0)) if return_lse else o


def merged_local_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Tensor,
    other_log_sum: Tensor,
    other_scale: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`merged_local_attention` by the kernels; arguments checked by the caller, T > 0."""
    arguments = _arguments(q, window, sinks, scale, cu_seqlens, mask)
    log_sum = other_log_sum.float().permute(2, 0, 1).flatten(1)
    o: Tensor = _merged(*promoted(q, k, v), other, log_sum, other_scale.float(), *arguments)[0]
    return o.to(v.dtype)


def _arguments(
    q: Tensor, window: int, sinks: int, scale: float | None, cu_seqlens: _Maybe, mask: _Maybe
) -> tuple[Any, ...]:
    """What the operators take beside tensors `[B, T, H, D]`: the stream, scale, window and sinks."""
    rows, length = q.shape[:2]
    table: tuple[_Maybe, ...] = (None, None, None, None)
    if cu_seqlens is not None or mask is not None:
        table = tuple(stream_of(rows, length, cu_seqlens, mask, q.device))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return *table, scale, min(window, rows * length), min(sinks, length)
