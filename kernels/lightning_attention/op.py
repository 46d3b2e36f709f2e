"""The public operations: argument checks, then the Triton kernels on a GPU and the plain PyTorch forms elsewhere.

Source: Lightning Attention-2, arXiv 2401.04658. Dimensions: B rows, T tokens, Hq query heads, Hkv key/value heads,
Hs heads of the decay and of the state (Hkv or Hq), D features of q and k, Dv of v, N sequences, P states in a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import (
    State,
    accumulation_dtype,
    check_boundaries,
    check_mask,
    chunked_attention,
    expect_integer,
    recurrent_attention,
)
from .switch import on_kernels

# MKL's vector functions find out the processor in their first call, without a lock: where several threads share it, one
# may work at low accuracy (exp off by 1e-4 in float32, 3e-9 in float64). So: one on one thread. pytorch/pytorch#188792
torch.zeros(1, dtype=torch.float32, device="cpu").exp()


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = False,
    return_log_sum: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Any, ...]:
    """Causal linear attention with one exponential decay per head, at a cost linear in T.

    o_t = scale * sum_{s <= t} exp(sum_{r = s+1..t} log_decay_r) (q_t . k_s) v_s. Differentiable in q, k, v, log_decay
    and the initial state. Source: Lightning Attention-2, arXiv 2401.04658.

    Args:
        q: queries `[B, T, Hq, D]`, any feature map already applied; any strides with a contiguous last dimension,
            float64, float32, bfloat16 or float16, as k and v.
        k: keys `[B, T, Hkv, D]`; query head h reads key/value head h // (Hq // Hkv).
        v: values `[B, T, Hkv, Dv]`.
        log_decay: ln of the decay, <= 0 (not checked, its values stay on the device), -inf to forget all that came
            before, float32 or float64:
            `[Hkv]` or `[Hq]` fixed, `[B, T, Hkv]` or `[B, T, Hq]` for every token. One decay per key/value head lets
            a whole group of query heads share one state.
        scale: factor of the output, None for D ** -0.5; cancels if `normalize`.
        initial_state: state before the first token, `[N, Hs, D, Dv]`; if `normalize` a pair with `[N, Hs, D]`. N is B,
            or the number of packed sequences.
        output_final_state: return the state after the last token of each sequence.
        cu_seqlens: `[N + 1]` integer boundaries of sequences packed in one row (B = 1), from 0 to T, not decreasing
            (checked on the CPU only, and not under torch.compile); the state is reset between them, empty sequences
            are allowed.
        mask: `[B, T]` bool; a False token neither writes to the state nor decays it, and its output is 0.
        normalize: divide by the sum of the weights (q_t . k_s) times decay; meant for features >= 0. A token whose
            sum is exactly 0 is not divided.
        return_log_sum: with `normalize`, return ln of that sum, too, differentiable: what another attention, such as
            `local_attention` with its `lse`, needs to share one denominator with this one.
        group: processes of torch.distributed that hold one sequence, in the order of its tokens; q, k, v, the mask and
            a decay for every token are those of this process, whose number of tokens (at least 1) may be its own.
            The initial state is that before the first process's tokens and the final state that behind the last
            process's, on every process. Gradients of what all processes hold (these two and a fixed decay) are each
            process's share: their sum over the group is the whole. Not together with `cu_seqlens`.

    Returns:
        The output `[B, T, Hq, Dv]` in the dtype of v, and the final state or None. States are float32 (float64 for
        float64 inputs). With `return_log_sum` also ln Σ_s decay · (q_t . k_s), without the scale, `[B, T, Hq]` in the
        dtype of the states; 0 where the sum is 0.

    Raises:
        ValueError: naming the argument that does not fit, what was expected and what was found.
    """
    _check_tokens(q, k, v, log_decay)
    _check_log_sum(return_log_sum, normalize)
    _check_devices(q, initial_state, k=k, v=v, log_decay=log_decay, mask=mask, cu_seqlens=cu_seqlens)
    rows, length = q.shape[:2]
    if group is not None:
        _check_group(group, cu_seqlens)
    if mask is not None:
        check_mask(mask, rows, length)
    sequences = rows
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, rows, length)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, sequences, k, v, log_decay, normalize)
    attention: Callable[..., tuple[Any, ...]] = chunked_attention
    if q.numel() > 0 and on_kernels(q, k, v):
        from .linear_op import lightning_attention_kernel

        attention = lightning_attention_kernel
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "mask": mask, "normalize": normalize}
    behind = None
    if group is not None:
        from .group import across, total_decay

        # No output is wanted of this call: fewer heads, and zeros, for what they are multiplied with stays finite.
        idle = torch.zeros_like(k if log_decay.shape[-1] == k.shape[2] else q)
        own = attention(idle, k, v, log_decay, output_final_state=True, **options)[1]
        total = total_decay(log_decay, mask, rows, length, accumulation_dtype(q, k, v))
        assert own is not None
        initial_state, behind = across(own, total, initial_state, group)
    final = output_final_state and group is None
    out, state, *log_sum = attention(
        q, k, v, log_decay, initial_state=initial_state, output_final_state=final, return_log_sum=return_log_sum,
        **options,
    )  # fmt: skip
    return out, behind if output_final_state and group is not None else state, *log_sum


@torch.no_grad()
def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    *,
    scale: float | None = None,
    slots: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = False,
    return_log_sum: bool = False,
) -> Any:
    """`lightning_attention` for one or a few new tokens, in place on a pool of states. Not differentiable.

    Args:
        q: queries `[B, T, Hq, D]`.
        k: keys `[B, T, Hkv, D]`.
        v: values `[B, T, Hkv, Dv]`.
        log_decay: as in `lightning_attention`.
        state: pool `[P, Hs, D, Dv]`, float32 (float64 for float64 inputs), changed in place; if `normalize` a pair
            with `[P, Hs, D]`.
        scale: factor of the output, None for D ** -0.5; cancels if `normalize`.
        slots: `[B]` integer, the state of each row; -1 marks a padding row: its output is 0, nothing is written. No
            other slot may occur twice. None: row b has state b, and P is B.
        mask: `[B, T]` bool, as in `lightning_attention`.
        normalize, return_log_sum: as in `lightning_attention`.

    Returns:
        The output `[B, T, Hq, Dv]` in the dtype of v, with `return_log_sum` a pair with ln of the sum of weights
        `[B, T, Hq]`. Nothing is read on the host.

    Raises:
        ValueError: naming the argument that does not fit, what was expected and what was found.
    """
    _check_tokens(q, k, v, log_decay)
    _check_log_sum(return_log_sum, normalize)
    _check_devices(q, state, k=k, v=v, log_decay=log_decay, mask=mask, slots=slots)
    rows, length = q.shape[:2]
    if mask is not None:
        check_mask(mask, rows, length)
    if slots is not None:
        _expect("slots", slots, (rows,))
        expect_integer("slots", slots)
    _check_state("state", state, rows if slots is None else None, k, v, log_decay, normalize)
    pools = state if isinstance(state, tuple) else (state,)
    for pool in pools:
        expected = accumulation_dtype(q, k, v)
        if pool.dtype != expected:
            raise ValueError(f"state: expected {expected}, found {pool.dtype}")
    if q.numel() > 0 and on_kernels(q, k, v):
        from .decode import lightning_attention_step_kernel, step_possible

        if step_possible(*pools):
            o, log_sum = lightning_attention_step_kernel(
                q, k, v, log_decay, *pools, scale=scale, slots=slots, mask=mask, log_sum=return_log_sum
            )
            return (o, log_sum) if return_log_sum else o
    own: Tensor | None = None
    if slots is not None:
        own = slots.long()
        real = (own >= 0)[:, None].expand(rows, length)
        mask = real if mask is None else mask & real
    held = tuple(pool if own is None else pool[own.clamp(min=0)] for pool in pools)
    out, new, *rest = recurrent_attention(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=(held[0], held[1]) if normalize else held[0],
        output_final_state=True,
        mask=mask,
        normalize=normalize,
        return_log_sum=return_log_sum,
    )
    assert new is not None
    for pool, rows_of_pool in zip(pools, new if isinstance(new, tuple) else (new,), strict=True):
        _write(pool, rows_of_pool, own)
    return (out, *rest) if return_log_sum else out


def _write(pool: Tensor, new: Tensor, slots: Tensor | None) -> None:
    if slots is None:
        pool.copy_(new)
        return
    if slots.shape[0] == 0:
        return
    # Padding rows repeat the write of the first real row. Without a real row all of them write back what they read
    # from slot 0. So the shapes never depend on the values of the slots, and nothing waits for the device.
    real = slots >= 0
    source = torch.where(real, torch.arange(slots.shape[0], device=slots.device), real.long().argmax())
    pool.index_copy_(0, slots[source].clamp(min=0), new[source])


def _expect(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(x.shape)}")


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, H, D], found shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, found {x.dtype}")
    rows, length, heads, dim = q.shape
    shared = k.shape[2]
    _expect("k", k, (rows, length, shared, dim))
    _expect("v", v, (rows, length, shared, v.shape[3]))
    if shared == 0 or heads % shared:
        raise ValueError(f"q: expected a number of heads that is a multiple of the {shared} of k, found {heads}")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_decay: expected float32 or float64, found {log_decay.dtype}")
    found = tuple(log_decay.shape)
    if found not in ((shared,), (heads,), (rows, length, shared), (rows, length, heads)):
        raise ValueError(
            f"log_decay: expected shape [{shared}] or [{heads}], alone or after [{rows}, {length}], found {list(found)}"
        )


def _check_log_sum(wanted: bool, normalize: bool) -> None:
    if wanted and not normalize:
        raise ValueError("return_log_sum: expected normalize=True beside it, found normalize=False")


def _check_devices(q: Tensor, state: State | None, **others: Tensor | None) -> None:
    states = state if isinstance(state, tuple) else (state,)
    for name, x in (*others.items(), *(("state", x) for x in states)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, found {x.device}")


def _check_group(group: object, cu_seqlens: Tensor | None) -> None:
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"group: expected a process group of torch.distributed, found {type(group).__name__}")
    if cu_seqlens is not None:
        raise ValueError("group: packed sequences (cu_seqlens) cannot be split over processes")


def _check_state(
    name: str, state: State, rows: int | None, k: Tensor, v: Tensor, log_decay: Tensor, normalize: bool
) -> None:
    if isinstance(state, tuple) != normalize:
        wanted, found = ("a pair", "a tensor") if normalize else ("a tensor", "a pair")
        raise ValueError(f"{name}: expected {wanted} with normalize={normalize}, found {found}")
    matrix = state[0] if isinstance(state, tuple) else state
    if isinstance(state, tuple) and len(state) != 2:
        raise ValueError(f"{name}: expected a pair, found {len(state)} tensors")
    count = matrix.shape[0] if rows is None and matrix.dim() else rows or 0
    shape = (count, log_decay.shape[-1], k.shape[3])
    _expect(name, matrix, (*shape, v.shape[3]))
    if isinstance(state, tuple):
        _expect(f"{name}[1]", state[1], shape)
