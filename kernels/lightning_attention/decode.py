"""One or a few new tokens on a pool of states: the traffic of the state, read and written once, is all there is to it.

A program holds a tile of one state in registers, all D rows by some of the Dv columns, so that no sum crosses
programs. The query heads of a group that share the state share the program, which reads their queries before it
computes: a store keeps later reads from being moved in front of it, and each would wait for memory anew.

Where the device can (Hopper and later), a launch begins while its predecessor ends (programmatic dependent launch).

Dimensions: B rows, T new tokens, Hq query heads, Hkv key/value heads, Hs heads of the decay and of the state, P states
in the pool, D features of q and k, V of v, BD and BV their tiles.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import dependent_launch, processors
from .shape import padded

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error

FITS_CACHE = 2**25  # bytes of states that may stay in the L2 cache of a Hopper GPU
_Maybe = Tensor | None
# Of this copy of the file: the one that travels with a checkpoint may be loaded beside the installed one.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class StepConfig(NamedTuple):
    """How a state is cut."""

    columns: int
    warps: int
    leaves: bool = False  # the cache first, so that what is written soonest makes room


def step_config(states: int, dim: int, value_dim: int, group: int, normalize: bool, device: torch.device) -> StepConfig:
    """Launch parameters for so many states, each of `group` query heads: tiles small enough to fill the device.

    Measured on an H100 with 128, 512 and 2,048 states of 128 x 128 (README.md).
    """
    wide = padded(value_dim)
    few = states * padded(dim) * wide * 4 <= FITS_CACHE
    if normalize:  # every program would need the sum state that one of them changes
        return StepConfig(wide, 8 if padded(dim) * wide > 8192 else 4)
    if states * wide // 32 < 2 * processors(device):
        return StepConfig(min(16, wide), 4)
    if group == 1:
        return StepConfig(min(64, wide), 4, leaves=few)
    if padded(dim) > 128:  # of more columns, or in fewer warps, these would spill
        return StepConfig(min(32, wide), 2)
    if states <= 2 * processors(device):
        return StepConfig(min(16, wide), 1, leaves=few)
    return StepConfig(min(32, wide), 1, leaves=True) if few else StepConfig(min(64, wide), 2)


_SIZES = ["scale", "length", "heads", "shared", "states", "stride_decay_row", "stride_decay"]


@triton.jit(do_not_specialize=_SIZES)
def step_kernel(
    q, k, v, o, log_sum, log_decay, state, sums, slots, mask, scale, length, heads, shared, states,
    stride_q_row, stride_q, stride_q_head, stride_k_row, stride_k, stride_k_head, stride_v_row, stride_v, stride_v_head,
    stride_decay_row, stride_decay, stride_slot, stride_head,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr,
    SLOTS: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, LOG_SUM: tl.constexpr, EARLY: tl.constexpr,
    LEAVES: tl.constexpr,
):  # fmt: skip
    """o `[B, T, Hq, V]` and (LOG_SUM) ln z `[B, T, Hq]`, contiguous; the states of the named slots change in place."""
    if EARLY:  # let the next launch begin, and wait for the end of the one before
        gdc_launch_dependents()
        gdc_wait()
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    block, head, row = pid % blocks, pid // blocks % states, (pid // (blocks * states)).to(tl.int64)
    pair = (head * GROUP // (heads // shared)).to(tl.int64)
    head = head.to(tl.int64)
    first = head * GROUP
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    used = slot >= 0
    slot = tl.maximum(slot, 0)
    dims, columns = tl.arange(0, BD), block * BV + tl.arange(0, BV)
    known = dims < tl.where(used, D, 0)
    keep = known[:, None] & (columns < V)[None, :]
    place = state + slot * stride_slot + head * stride_head + dims[:, None] * V + columns[None, :]
    policy: tl.constexpr = "evict_first" if LEAVES else ""
    tile = tl.load(place, mask=keep, other=0.0, eviction_policy=policy)
    if NORMALIZE:
        norms = sums + (slot * states + head) * D + dims
        norm = tl.load(norms, mask=known, other=0.0)
    for step in range(0, length):
        t = tl.cast(step, tl.int64)
        real = used
        if MASKED:
            real = real & (tl.load(mask + row * length + t) != 0)
        fade = tl.exp(tl.load(log_decay + row * stride_decay_row + t * stride_decay + head).to(tl.float32))
        fade = tl.where(real, fade, 1.0)
        some = dims < tl.where(real, D, 0)
        here = k + row * stride_k_row + t * stride_k + pair * stride_k_head + dims
        key = tl.load(here, mask=some, other=0.0).to(tl.float32)
        here = v + row * stride_v_row + t * stride_v + pair * stride_v_head + columns
        value = tl.load(here, mask=columns < tl.where(real, V, 0), other=0.0).to(tl.float32)
        queries = ()
        for g in tl.static_range(GROUP):
            here = q + row * stride_q_row + t * stride_q + (first + g) * stride_q_head + dims
            queries = queries + (tl.load(here, mask=some, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        tile = tile * fade + key[:, None] * value[None, :]
        if NORMALIZE:
            norm = norm * fade + key
        for g in tl.static_range(GROUP):
            query = queries[g].to(tl.float32)  # type: ignore[var-annotated]
            out = tl.sum(query[:, None] * tile, 0)
            if NORMALIZE:
                total = tl.sum(query * norm, 0)
                total = tl.where(total == 0, 1.0, total)
                out = out / total
                if LOG_SUM:
                    tl.store(log_sum + (row * length + t) * heads + first + g, tl.log(total))
            else:
                out = out * scale
            target = o + ((row * length + t) * heads + first + g) * V + columns
            tl.store(target, out.to(o.dtype.element_ty), mask=columns < V)
    tl.store(place, tile, mask=keep, eviction_policy=policy)
    if NORMALIZE:
        tl.store(norms, norm, mask=known)


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args=("state", "sums"))
def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, sums: _Maybe, scale: float,
    slots: _Maybe, mask: _Maybe, wants_log_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and ln z where it is wanted, else an empty tensor."""
    rows, length, heads, dim = q.shape
    value_dim, states = v.shape[3], log_decay.shape[-1]
    o = torch.empty(rows, length, heads, value_dim, dtype=v.dtype, device=v.device)
    log_sum = torch.empty(o.shape[:3] if wants_log_sum else (0,), dtype=torch.float32, device=v.device)
    group = heads // states
    config = step_config(rows * states, dim, value_dim, group, sums is not None, q.device)
    early = {"EARLY": True, "launch_pdl": True} if dependent_launch(q.device) else {"EARLY": False}
    per_token = log_decay.stride()[:2] if log_decay.dim() == 3 else (0, 0)
    step_kernel[(-(-value_dim // config.columns) * states * rows,)](
        q, k, v, o, log_sum, log_decay, state, *(state if x is None else x for x in (sums, slots, mask)),
        scale, length, heads, k.shape[2], states,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *per_token, state.stride(0), state.stride(1),
        D=dim, V=value_dim, BD=padded(dim), BV=config.columns, GROUP=group,
        SLOTS=slots is not None, MASKED=mask is not None, NORMALIZE=sums is not None, LOG_SUM=wants_log_sum,
        LEAVES=config.leaves, num_warps=config.warps, **early,
    )  # fmt: skip
    return o, log_sum


@_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, sums: _Maybe, scale: float,
    slots: _Maybe, mask: _Maybe, wants_log_sum: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o = v.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(o.shape[:3] if wants_log_sum else (0,), dtype=torch.float32)


def step_possible(*pools: Tensor) -> bool:
    """Whether the kernel can change these states in place."""
    wide = pools[0]
    inner = wide.stride(3) == 1 and wide.stride(2) == wide.shape[3]
    return inner and all(pool.dtype == torch.float32 for pool in pools) and all(x.is_contiguous() for x in pools[1:])


def lightning_attention_step_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    sums: _Maybe = None,
    *,
    scale: float | None = None,
    slots: _Maybe = None,
    mask: _Maybe = None,
    log_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """`lightning_attention_step` by one kernel, o and ln z or nothing; arguments checked, `step_possible`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = None if mask is None else mask.contiguous().to(torch.uint8)
    held = log_decay if log_decay.stride(-1) == 1 else log_decay.contiguous()
    slots = None if slots is None else slots.contiguous()
    results: tuple[Tensor, Tensor] = _step(q, k, v, held, state, sums, scale, slots, mask, log_sum)
    return results
