"""One sequence over several processes: each holds a run of its tokens, and their states meet in one all-gather.

Source: LASP-2, arXiv 2502.07563, algorithm 2. Dimensions: W processes, B rows, Hs heads of the decay and of the state,
D features of q and k, Dv of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .reference import State, scan_states


class _Gather(torch.autograd.Function):
    """`[...]` of every process, stacked `[W, ...]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        distributed.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


def total_decay(log_decay: Tensor, mask: Tensor | None, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Log decay over all tokens of a row that are not hidden, `[B, Hs]`."""
    rate = log_decay.to(dtype)
    if rate.dim() == 3:
        return (rate if mask is None else rate.masked_fill(~mask[..., None], 0)).sum(1)
    count = rate.new_full((rows,), length) if mask is None else mask.sum(1)
    return count[:, None] * rate


def across(own: State, total: Tensor, initial: State | None, group: distributed.ProcessGroup) -> tuple[State, State]:
    """The state before the tokens of this process, and the one behind the last token of the last process.

    Args:
        own: what the tokens of this process make of an empty state, `[B, Hs, D, Dv]`, or a pair with `[B, Hs, D]`.
        total: their log decay `[B, Hs]`.
        initial: state before the first token of the first process.
        group: the processes, in the order of their tokens.
    """
    states = own if isinstance(own, tuple) else (own,)
    flat = torch.cat([*(x.flatten(2) for x in states), total[..., None]], 2)
    gathered: Tensor = _Gather.apply(flat, group).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]  # [B, Hs, W, ...]
    carry = None
    if initial is not None:
        firsts = initial if isinstance(initial, tuple) else (initial,)
        carry = torch.cat([x.to(flat.dtype).flatten(2) for x in firsts], 2)
    walked = scan_states(gathered[..., :-1], gathered[..., -1], carry)
    return _unpacked(walked[:, :, group.rank()], own), _unpacked(walked[:, :, group.size()], own)


def _unpacked(flat: Tensor, like: State) -> State:
    if not isinstance(like, tuple):
        return flat.reshape(like.shape)
    size = like[0][0, 0].numel()
    return flat[..., :size].reshape(like[0].shape), flat[..., size:].reshape(like[1].shape)
