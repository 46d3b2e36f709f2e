"""What has left the softmax window: the keys and values that the linear branch of a joint layer takes over.

A file of the checkpoint runtime: it imports torch and its neighbours only.

The token at position p (among the real tokens of its sequence) pushes the one at p − window out of the window. That
is when the linear branch takes it over, unless it is a sink, which the window never loses. So the two branches
share no token, and one denominator can stand under both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cache import LightningCacheLayer


class Leaving(NamedTuple):
    """What each token pushes out of the window.

    Attributes:
        k, v: `[B, T, Hkv, D]` and `[B, T, Hkv, Dv]`; anything where nothing is pushed out.
        some: bool `[B, T]`, where something is; from the first such token on there always is, until the sequence ends.
        tokens: bool `[B, T]`, False for tokens that neither change a state nor decay it; None where each row is one
            sequence from its start, for there is no state before the first that is pushed out: features of 0 do as
            well, and leave the fast path of the kernels open.
    """

    k: torch.Tensor
    v: torch.Tensor
    some: torch.Tensor
    tokens: torch.Tensor | None


def leaving(
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int,
    *,
    tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Leaving:
    """For whole sequences: k `[B, T, Hkv, D]`, v `[B, T, Hkv, Dv]`, real tokens bool `[B, T]`, boundaries `[N + 1]`."""
    batch, length = k.shape[:2]
    step = torch.arange(length, device=k.device)
    if tokens is None and cu_seqlens is None:
        back = min(window, length)
        k, v = (F.pad(x[:, : length - back], (0, 0, 0, 0, back, 0)) for x in (k, v))
        return Leaving(k, v, (step >= window + sinks).expand(batch, length), None)
    real = tokens if tokens is not None else torch.ones(batch, length, dtype=torch.bool, device=k.device)
    number = real.long().cumsum(1) - 1  # of each real token in its row
    first = torch.zeros_like(number)
    if cu_seqlens is not None:
        before = F.pad(number + 1, (1, 0))[0]  # real tokens before each token, and all of them at the end
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), step, right=True).clamp(max=cu_seqlens.shape[0] - 2)
        first = before[cu_seqlens.long()][owner][None]
    place = torch.zeros(batch, length + 1, dtype=torch.long, device=k.device)
    place = place.scatter(1, torch.where(real, number, length), step.expand(batch, length))
    source = place.gather(1, (number - window).clamp(min=0))
    rows = torch.arange(batch, device=k.device)[:, None]
    some = real & (number - first >= window + sinks)
    return Leaving(k[rows, source], v[rows, source], some, some)


def leaving_cache(
    cache: LightningCacheLayer,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    sinks: int,
) -> Leaving:
    """For new tokens at `positions` `[B, T]` (−1 for padding) that go on from a cache which holds some.

    k are the keys as the linear branch takes them over, as those of the ring that go before them.
    """
    keys = cache.leaving_keys
    assert keys is not None
    some = positions >= window + sinks
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    if k.shape[1] <= window:  # all of them come from the ring, each from the slot that its successor will take
        slot = sinks + (positions - sinks) % window
        assert cache.ring_v is not None
        return Leaving(keys[rows, slot], cache.ring_v[rows, slot], some, some)
    past_k, past_v, position = cache.in_order(keys)
    past = position.shape[1]
    tokens = torch.cat((position >= 0, positions >= 0), 1)
    found = leaving(torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), window, sinks, tokens=tokens)
    return Leaving(found.k[:, past:], found.v[:, past:], some, some)
