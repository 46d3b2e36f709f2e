"""One call of an attention layer: what the model hands over, in one layout, masks and packing read.

A file of the checkpoint runtime: it imports torch and its neighbours only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .masks import read_mask


class AttentionCall:
    """What the model hands to its attention function, in the layout `[B, T, H, D]`.

    Attributes:
        q, k, v: `[B, T, Hq, D]`, `[B, T, Hkv, D]`, `[B, T, Hkv, Dv]`, rotary embedding applied.
        linear_q, linear_k: those of the linear branch: q and k, or without their rotary embedding.
        scaling: softmax scale.
        rows: B, also of a packed call.
        last: bool `[B, T]`, the real tokens of the last sequence of each row: what a cache goes on from.
        tokens: bool `[B, T]`, False for padding, or None when every token is real.
        cu_seqlens: int64 `[N + 1]` when sequences are packed in the batch (then the batch is one row), else None.
        hidden: `[B, T, M]`, the input of the attention module, for layers with gates; else None.
        lift: fp32 `[B, T, Hq]`, what ALiBi adds to all scores of a query beyond slope · (key − query); else None.
        softcap, sliding_window: of the teacher's softmax; a swapped layer has neither.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float | None,
        mask: Any,
        seen: int | torch.Tensor,
        *,
        hidden: torch.Tensor | None = None,
        linear: tuple[torch.Tensor, torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
        alibi: tuple[torch.Tensor | Sequence[float], torch.Tensor | None] | None = None,
    ) -> None:
        dtype = _compute_dtype(v)
        self.q, self.k, self.v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        self.linear_q, self.linear_k = (
            (self.q, self.k) if linear is None else (x.to(dtype).transpose(1, 2) for x in linear)
        )
        self.scaling = scaling if scaling is not None else q.shape[-1] ** -0.5
        self.hidden = hidden
        first = not isinstance(seen, torch.Tensor) and seen == 0
        given = cu_seqlens if first else None
        self.lift: torch.Tensor | None = None
        self.tokens, starts = read_mask(mask, q.shape[-2], seen, may_be_packed=first and given is None)
        # Softmax broadcasts one mask for all rows.
        self.tokens, starts = (x if x is None else x.expand(q.shape[0], -1) for x in (self.tokens, starts))
        if alibi is not None:
            self._add_alibi(*alibi)
        self.cu_seqlens: torch.Tensor | None = None
        self.rows, self.last = q.shape[0], self.tokens
        if given is not None:
            self._pack(given.long())
        elif starts is not None:
            ends = starts.new_tensor([starts.numel()], dtype=torch.long)
            self._pack(torch.cat((starts.flatten().nonzero().flatten(), ends)))

    softcap: float | None = None
    sliding_window: int | None = None

    def _add_alibi(self, slopes: torch.Tensor | Sequence[float], count: torch.Tensor | None) -> None:
        """Give q and k two channels whose product is slope · position of the key: the bias, but for `lift`.

        Softmax does not see that constant of a query, only the logarithm of its denominator does. Multiples of 256 have
        a channel of their own, so that bf16 holds positions up to 65,535 exactly. The linear branch does without: its
        decay stands for the bias.
        """
        batch, length, heads, _ = self.q.shape
        if self.tokens is None:
            position = torch.arange(length, device=self.q.device).expand(batch, length)
        else:
            position = (self.tokens.long().cumsum(1) - 1).clamp(min=0)
        position = position if count is None else position + count[:, None]
        low = position % 256
        parts = torch.stack((position - low, low), -1)[:, :, None].expand(-1, -1, self.k.shape[2], -1)
        bias = (torch.as_tensor(slopes, device=self.q.device, dtype=torch.float64) / self.scaling).to(self.q)
        self.lift = position[..., None] * (bias.to(torch.promote_types(bias.dtype, torch.float32)) * self.scaling)
        bias = bias[:, None].expand(batch, length, heads, 2)
        self.q, self.k = torch.cat((self.q, bias), -1), torch.cat((self.k, parts.to(self.k)), -1)

    TENSORS = ("q", "k", "v", "linear_q", "linear_k", "tokens", "hidden", "lift")

    @property
    def length(self) -> int:
        """T, also of the rows that a packed call lays end to end."""
        return self.q.shape[1] if self.cu_seqlens is None else self.q.shape[1] // self.rows

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> AttentionCall:
        """The same call with `function` applied to every tensor; not for a packed one."""
        twin = copy.copy(self)
        for name in self.TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(twin, name, function(tensor))
        twin.rows, twin.last = twin.q.shape[0], twin.tokens
        return twin

    def narrow(self, start: int, stop: int) -> AttentionCall:
        """The tokens from `start` to `stop`, copied, so that the others can be freed."""
        return self.map(lambda x: x[:, start:stop].clone())

    def _pack(self, cu_seqlens: torch.Tensor) -> None:
        """Lay the rows end to end; a cache goes on from the last sequence of each row."""
        rows, length = self.q.shape[:2]
        # Where the last sequence of each row starts: the largest boundary below the row's end.
        ends = torch.arange(1, rows + 1, device=cu_seqlens.device) * length
        begin = cu_seqlens[torch.searchsorted(cu_seqlens, ends) - 1]
        of_last = torch.arange(rows * length, device=begin.device).view(rows, length) >= begin[:, None]
        self.last = of_last if self.tokens is None else of_last & self.tokens
        self.cu_seqlens = cu_seqlens
        self.q, self.k, self.v = (x.flatten(0, 1)[None] for x in (self.q, self.k, self.v))
        self.linear_q, self.linear_k = (x.flatten(0, 1)[None] for x in (self.linear_q, self.linear_k))
        self.tokens = self.tokens.flatten()[None] if self.tokens is not None else None
        self.hidden = self.hidden.flatten(0, 1)[None] if self.hidden is not None else None
        self.lift = self.lift.flatten(0, 1)[None] if self.lift is not None else None

    def last_states(self, final: Any) -> Any:
        """Of the final states of all packed sequences those of each row's last one."""
        if self.cu_seqlens is None:
            return final
        ends = torch.arange(1, self.rows + 1, device=self.cu_seqlens.device) * self.length
        index = torch.searchsorted(self.cu_seqlens, ends) - 1
        return tuple(x[index] for x in final) if isinstance(final, tuple) else final[index]

    def in_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, B·T, ...]` of a packed call back in rows `[B, T, ...]`."""
        return x if self.cu_seqlens is None else torch.unflatten(x[0], 0, (self.rows, -1))


def _compute_dtype(v: torch.Tensor) -> torch.dtype:
    """That of autocast where it is on, as for PyTorch's own attention: RoPE makes q and k fp32 again."""
    kind = v.device.type
    known = kind != "meta"  # on which models are audited; asking torch.amp would break a compiled graph in two
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else v.dtype
