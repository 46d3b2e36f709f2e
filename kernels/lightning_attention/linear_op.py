"""The Triton kernels as operators of torch.library: traceable by torch.compile, differentiable, without a host sync."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .backward import backward
from .forward import forward
from .shape import addressable, shape_of

Maybe = Tensor | None
# Of this copy of the file: the one that travels with a checkpoint may be loaded beside the installed one.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Maybe,
    sums: Maybe,
    final: bool,
    cu_seqlens: Maybe,
    mask: Maybe,
    normalize: bool,
    segment: int,
) -> list[Tensor]:
    """o, 1/z `[Hq, B, T]`, final state and sum state, entering states and sums; an empty tensor where there is none."""
    shape = shape_of(q, k, v, log_decay, cu_seqlens, mask is not None, normalize, segment or None)
    o, inverse, leaving, entering = forward(
        q, k, v, log_decay, shape,
        scale=scale, initial=(state, sums), final=final, cu_seqlens=cu_seqlens, mask=mask,
    )  # fmt: skip
    kept = entering if shape.split else (None, None)  # else they are the initial state, an input
    return [o, *(o.new_empty(0, dtype=torch.float32) if x is None else x for x in (inverse, *leaving, *kept))]


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Maybe,
    sums: Maybe,
    final: bool,
    cu_seqlens: Maybe,
    mask: Maybe,
    normalize: bool,
    segment: int,
) -> list[Tensor]:
    shape = shape_of(q, k, v, log_decay, cu_seqlens, mask is not None, normalize, segment or None)
    o = v.new_empty(shape.rows, shape.length, shape.query_heads, shape.value_dim)
    wide = (shape.heads, shape.dim, shape.value_dim)
    sizes: list[tuple[int, ...]] = [
        (shape.query_heads, shape.rows, shape.length) if normalize else (0,),
        (shape.sequences, *wide) if final else (0,),
        (shape.sequences, *wide[:2]) if final and normalize else (0,),
        (shape.items, *wide) if shape.split else (0,),
        (shape.items, *wide[:2]) if shape.split and normalize else (0,),
    ]
    return [o, *(o.new_empty(size, dtype=torch.float32) for size in sizes)]


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor,
    scale: float,
    entering: Maybe,
    entering_sum: Maybe,
    behind: Maybe,
    behind_sum: Maybe,
    o: Maybe,
    inverse: Maybe,
    cu_seqlens: Maybe,
    mask: Maybe,
    segment: int,
    first: bool,
    decay: bool,
    at_end: Maybe,
    d_inverse: Maybe,
) -> list[Tensor]:
    """dq, dk, dv, gradients of the initial state and sum state, and that of the log decay of every token."""
    shape = shape_of(q, k, v, log_decay, cu_seqlens, mask is not None, inverse is not None, segment or None)
    dq, dk, dv, *others = backward(
        q, k, v, do, log_decay, shape,
        scale=scale, entering=(entering, entering_sum), behind=(behind, behind_sum),
        output=(o, inverse) if o is not None and inverse is not None else None, d_inverse=d_inverse,
        first=first, decay=decay, at_end=at_end, cu_seqlens=cu_seqlens, mask=mask,
    )  # fmt: skip
    return [dq, dk, dv, *(q.new_empty(0, dtype=torch.float32) if x is None else x for x in others)]


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor,
    scale: float,
    entering: Maybe,
    entering_sum: Maybe,
    behind: Maybe,
    behind_sum: Maybe,
    o: Maybe,
    inverse: Maybe,
    cu_seqlens: Maybe,
    mask: Maybe,
    segment: int,
    first: bool,
    decay: bool,
    at_end: Maybe,
    d_inverse: Maybe,
) -> list[Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = log_decay.shape[-1]
    state = (sequences, heads, q.shape[3], v.shape[3])
    return [
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(state if first else (0,), dtype=torch.float32),
        q.new_empty(state[:3] if first and inverse is not None else (0,), dtype=torch.float32),
        q.new_empty((*q.shape[:2], heads) if decay else (0,), dtype=torch.float32),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, log_decay, scale, state, sums, final, cu_seqlens, mask, normalize, segment = inputs
    o, inverse, leaving, leaving_sum, entering, entering_sum = output
    split = entering.numel() > 0
    ctx.save_for_backward(
        q, k, v, log_decay, cu_seqlens, mask,
        entering if split else state, (entering_sum if split else sums) if normalize else None,
        o if normalize else None, inverse if normalize else None, leaving, leaving_sum,
    )  # fmt: skip
    ctx.set_materialize_grads(False)  # a sum without a gradient is not read
    ctx.scale, ctx.segment, ctx.final, ctx.normalize = scale, segment, final, normalize
    ctx.started = state is not None


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, log_decay, cu_seqlens, mask, entering, entering_sum, o, inverse, final, final_sum = ctx.saved_tensors
    do, d_inverse, behind, behind_sum = grads[:4]
    if do is None:
        do = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    if not ctx.final:
        behind = behind_sum = None
    if not ctx.normalize:
        d_inverse = behind_sum = None
    behind, behind_sum = (None if x is None else x.contiguous() for x in (behind, behind_sum))
    if behind is not None and ctx.normalize and behind_sum is None:
        behind_sum = torch.zeros_like(final_sum)
    if behind_sum is not None and behind is None:
        behind = torch.zeros_like(final)
    at_end = None
    if ctx.needs_input_grad[3] and behind is not None:
        at_end = (final * behind).sum((2, 3))
        if behind_sum is not None:
            at_end = at_end + (final_sum * behind_sum).sum(2)
    dq, dk, dv, state, sums, decay = _backward(
        q, k, v, addressable(do.to(v.dtype)), log_decay, ctx.scale, entering, entering_sum, behind, behind_sum, o,
        inverse, cu_seqlens, mask, ctx.segment, ctx.started, ctx.needs_input_grad[3], at_end,
        None if d_inverse is None else d_inverse.contiguous(),
    )  # fmt: skip
    if not ctx.needs_input_grad[3]:
        decay = None
    elif log_decay.dim() == 1:
        decay = decay.sum((0, 1), dtype=torch.float64).float()
    return (
        dq, dk, dv, decay, None, state if ctx.started else None, sums if ctx.started and ctx.normalize else None,
        None, None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_setup)


def lightning_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = False,
    return_log_sum: bool = False,
    segment: int | None = None,
) -> tuple[Any, ...]:
    """`lightning_attention` by the Triton kernels; arguments checked by the caller.

    `segment`: tokens handled by one program, None for what suits the device; the result differs in rounding only.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    # A scale of a normalised output cancels; 1 keeps it out of the rounding.
    factor = 1.0 if normalize else q.shape[-1] ** -0.5 if scale is None else float(scale)
    state, sums = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    kept = [None if x is None else x.float().contiguous() for x in (state, sums)]
    q, k, w = (addressable(x.to(dtype)) for x in (q, k, v))
    results = _forward(
        q, k, w, log_decay.float().contiguous(), factor, kept[0], kept[1], output_final_state,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if mask is None else mask.contiguous().to(torch.uint8), normalize, segment or 0,
    )  # fmt: skip
    final = None
    if output_final_state:
        final = (results[2], results[3]) if normalize else results[2]
    return results[0].to(v.dtype), final, *([-results[1].log().permute(1, 2, 0)] if return_log_sum else [])
