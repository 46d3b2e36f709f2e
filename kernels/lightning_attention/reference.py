"""Plain PyTorch forms of causal linear attention with one exponential decay per head.

Source: Lightning Attention-2, arXiv 2401.04658. All three forms compute

    o_t = scale * sum_{s <= t} exp(sum_{r = s+1..t} log_decay_r) (q_t . k_s) v_s

`quadratic_attention` writes the sum down, `recurrent_attention` walks over the tokens, `chunked_attention` is the one
to train with. They take the same arguments and are each other's oracle.

Dimensions: B rows, T tokens, Hq query heads, Hkv key/value heads, Hs heads of the decay and of the state (Hkv or Hq),
G = Hq // Hs query heads that share one state, D features of q and k, Dv of v, C tokens in a chunk, NC chunks,
N sequences (B, or the number of packed ones).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = Tensor | tuple[Tensor, Tensor]

# Chunk states are scanned by one triangular matmul per block: quadratic within a block, linear over blocks.
_SCAN_BLOCK = 64
_LOWEST = {torch.float32: -105.0, torch.float64: -750.0}  # their exponentials are 0


class _Inputs(NamedTuple):
    q: Tensor  # [B, T, Hs, G, D]
    k: Tensor  # [B, T, Hs, D]
    v: Tensor  # [B, T, Hs, Dv]
    log_decay: Tensor  # [Hs] or [B, T, Hs]


class _ChunkDecay(NamedTuple):
    """Decay factors of the chunks; dimensions of size 1 broadcast."""

    pair: Tensor  # [B, Hs, NC, C, C] from token j (column) to token i (row), 0 above the diagonal
    from_start: Tensor  # [B, Hs, NC, C] from the entering state to token i
    to_end: Tensor  # [B, Hs, NC, C] from token j to the state that leaves
    total: Tensor  # [B, Hs, NC] logarithm of the decay over the whole chunk


class _Packing(NamedTuple):
    """Where packed sequences lie once each starts a chunk of its own; every size is known without reading values."""

    slot: Tensor  # [T] place of each token among the NC * C slots
    lengths: Tensor  # [NC] tokens in each chunk
    order: Tensor  # [N + NC] puts (initial states, chunks) into the order of the scan
    segment: Tensor  # [N + NC] sequence of each item of the scan
    entering: Tensor  # [NC] row of the scanned states that enters each chunk
    final: Tensor  # [N] row of the scanned states that leaves each sequence


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype of states, decays and sums."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep the dtypes chosen here: autocast would run the float32 state products in half precision."""
    kind = x.device.type
    # The meta device, where models are built without memory, knows none; asking torch.amp would break a compiled graph.
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def quadratic_attention(
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
) -> tuple[Any, ...]:
    """The definition, with all T x T weights: the oracle of the other forms. Arguments as `lightning_attention`."""
    dtype = accumulation_dtype(q, k, v)
    scale = _scale(q, scale, normalize)
    rows, length = q.shape[:2]
    with no_autocast(q):
        x = _inputs(q, k, v, log_decay, mask, dtype)
        queries, keys, values = x.q.to(dtype) * scale, x.k.to(dtype), x.v.to(dtype)
        decay = x.log_decay.expand(rows, length, -1)
        owner, sequences = _token_owner(cu_seqlens, rows, length, q.device)
        visible = (owner[:, :, None] == owner[:, None, :]).tril()
        before, after = visible.to(dtype) @ decay, visible.tril(-1).to(dtype).mT @ decay
        running = decay.cumsum(1)
        pair = (running[:, :, None] - running[:, None]).masked_fill(~visible[..., None], -torch.inf).exp()
        weights = torch.einsum("bihgd,bjhd,bijh->bijhg", queries, keys, pair)
        first, first_sum = _start_states(initial_state, sequences, x, dtype, normalize)
        carried = queries * before.exp()[..., None, None]
        out = torch.einsum("bijhg,bjhe->bihge", weights, values)
        out = out + torch.einsum("bihgd,bihde->bihge", carried, first[owner])
        log_sum = None
        if first_sum is not None:
            total = weights.sum(2) + torch.einsum("bihgd,bihd->bihg", carried, first_sum[owner])
            out, log_sum = _divide(out, total)
        member = (owner == torch.arange(sequences, device=q.device)[:, None, None]).to(dtype)
        kept = torch.einsum("nbt,bth->nh", member, decay).exp()
        keys = keys * after.exp()[..., None]
        state = kept[..., None, None] * first + torch.einsum("nbt,bthd,bthe->nhde", member, keys, values)
        state_sum = None
        if first_sum is not None:
            state_sum = kept[..., None] * first_sum + torch.einsum("nbt,bthd->nhd", member, keys)
    final = _pair(state, state_sum) if output_final_state else None
    return _results(out.flatten(2, 3).to(v.dtype), final, log_sum, return_log_sum)


def recurrent_attention(
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
) -> tuple[Any, ...]:
    """One state update a token: the form of decoding. Arguments as `lightning_attention`.

    With `cu_seqlens` the boundaries are read on the host, which waits for the device.
    """
    dtype = accumulation_dtype(q, k, v)
    scale = _scale(q, scale, normalize)
    with no_autocast(q):
        x = _inputs(q, k, v, log_decay, mask, dtype)
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        sequences = q.shape[0] if cu_seqlens is None else len(bounds) - 1
        states, sums = _start_states(initial_state, sequences, x, dtype, normalize)
        walked = []
        for i in range(len(bounds) - 1):
            own = slice(None) if cu_seqlens is None else slice(i, i + 1)
            first_sum = None if sums is None else sums[own]
            walked.append(_walk(x, bounds[i], bounds[i + 1], states[own], first_sum, scale))
    out = torch.cat([piece[0] for piece in walked], 1).flatten(2, 3).to(v.dtype)
    log_sum = torch.cat([piece[3] for piece in walked if piece[3] is not None], 1) if normalize else None
    final = None
    if output_final_state:
        state = torch.cat([piece[1] for piece in walked])
        state_sum = torch.cat([piece[2] for piece in walked if piece[2] is not None]) if normalize else None
        final = _pair(state, state_sum)
    return _results(out, final, log_sum, return_log_sum)


def chunked_attention(
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
    chunk_size: int = 64,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Quadratic within chunks of `chunk_size` tokens, a state between them: cost linear in T, no loop over tokens.

    Other arguments as `lightning_attention`. `matmul_dtype` is the dtype of the matmuls on q, k, v; None takes
    bfloat16 or float16 if q, k and v share it and a device multiplies in it, and float32 on the CPU, where half
    precision is no faster. Decays, sums and states are float32 (float64 for float64 inputs) in any case.
    """
    dtype = accumulation_dtype(q, k, v)
    matmul_dtype = _matmul_dtype(q, k, v) if matmul_dtype is None else matmul_dtype
    scale = _scale(q, scale, normalize)
    length = q.shape[1]
    # A short input is one short chunk rather than a padded one.
    chunk = max(1, min(chunk_size, length))
    with no_autocast(q):
        x = _inputs(q, k, v, log_decay, mask, dtype)
        packing = None if cu_seqlens is None else _pack(cu_seqlens, length, chunk)
        queries, keys, values, decay = _cut(x, length, chunk, packing)
        queries, heads = queries.to(matmul_dtype), (x.q.shape[3], chunk)

        scores = torch.unflatten(queries @ keys.to(matmul_dtype).mT, 3, heads)
        weights = scores * (decay.pair * scale).unsqueeze(3)
        out = torch.unflatten(weights.to(matmul_dtype).flatten(3, 4) @ values.to(matmul_dtype), 3, heads).to(dtype)

        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first, first_sum = (None, None) if initial_state is None else _start_states(initial_state, sequences, x, dtype)
        added = keys.to(dtype).mT @ (values.to(dtype) * decay.to_end[..., None])
        entering, state = _enter(added, decay.total, first, sequences, packing)
        reach = (decay.from_start * scale).unsqueeze(3)
        # A sum over many tokens may pass the range of float16, never that of bfloat16.
        state_dtype = dtype if matmul_dtype == torch.float16 else matmul_dtype
        carried = torch.unflatten(queries.to(state_dtype) @ entering.to(state_dtype), 3, heads)
        out = torch.addcmul(out, carried.to(dtype), reach[..., None])
        state_sum = log_sum = None
        if normalize:
            added = keys.to(dtype).mT @ decay.to_end[..., None].expand(*keys.shape[:-1], 1)
            first = None if first_sum is None else first_sum[..., None]
            entering, state_sum = _enter(added, decay.total, first, sequences, packing)
            carried = torch.unflatten((queries.to(dtype) @ entering).squeeze(-1), 3, heads)
            out, log_sum = _divide(out, torch.addcmul(weights.sum(-1), carried, reach))
            log_sum = _join(log_sum[..., None], length, packing).squeeze(-1)
            state_sum = state_sum.squeeze(-1)
    final = _pair(state, state_sum) if output_final_state else None
    return _results(_join(out.to(v.dtype), length, packing), final, log_sum, return_log_sum)


def _matmul_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    shared = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return torch.promote_types(shared, torch.float32) if q.device.type == "cpu" else shared


def _inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None, dtype: torch.dtype) -> _Inputs:
    """Group query heads by state, and make a masked token an empty one: no key, no value, no decay."""
    heads, shared = log_decay.shape[-1], k.shape[2]
    # Lower ones make a factor of 0 all the same, but would drown those that are added to them.
    log_decay = log_decay.to(dtype).clamp(min=_LOWEST[dtype])
    if mask is not None:
        # Filling, not multiplying: padding may hold NaN.
        hidden = ~mask[:, :, None]
        q, k, v = (x.masked_fill(hidden[..., None], 0) for x in (q, k, v))
        log_decay = log_decay.expand(*mask.shape, heads).masked_fill(hidden, 0)
    if heads != shared:
        # A state of its own for each query head: its neighbours in the group read the same keys and values.
        k, v = (x.repeat_interleave(heads // shared, dim=2) for x in (k, v))
    return _Inputs(torch.unflatten(q, 2, (heads, -1)), k, v, log_decay)


def _start_states(
    initial: State | None, sequences: int, x: _Inputs, dtype: torch.dtype, normalize: bool = False
) -> tuple[Tensor, Tensor | None]:
    if initial is None:
        heads, dim, value_dim = x.k.shape[2], x.k.shape[3], x.v.shape[3]
        state = torch.zeros(sequences, heads, dim, value_dim, dtype=dtype, device=x.k.device)
        return state, state.new_zeros(sequences, heads, dim) if normalize else None
    if isinstance(initial, tuple):
        return initial[0].to(dtype), initial[1].to(dtype)
    return initial.to(dtype), None


def _pair(state: Tensor, state_sum: Tensor | None) -> State:
    return state if state_sum is None else (state, state_sum)


def _scale(q: Tensor, scale: float | None, normalize: bool) -> float:
    """Of a normalised output it cancels, and the sum of weights is taken without."""
    return 1.0 if normalize else q.shape[-1] ** -0.5 if scale is None else scale


def _results(out: Tensor, final: State | None, log_sum: Tensor | None, wanted: bool) -> tuple[Any, ...]:
    if not wanted:
        return out, final
    if log_sum is None:
        raise ValueError("return_log_sum: needs normalize=True")
    return out, final, log_sum.flatten(2) if log_sum.dim() == 4 else log_sum


def _divide(out: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the sum of weights, and its logarithm.

    A token that saw nothing has sum, output and logarithm 0 and keeps gradients finite.
    """
    total = total.masked_fill(total == 0, 1)
    return out / total[..., None], total.log()


def _token_owner(cu_seqlens: Tensor | None, rows: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """Sequence of each token `[B, T]`, and the number of sequences."""
    if cu_seqlens is None:
        return torch.arange(rows, device=device)[:, None].expand(rows, length), rows
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length, device=device), right=True)
    return owner[None], cu_seqlens.shape[0] - 1


def _walk(
    x: _Inputs, start: int, stop: int, state: Tensor, state_sum: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = state.dtype
    fixed = x.log_decay.exp()[:, None, None] if x.log_decay.dim() == 1 else None
    outputs, logs = [], []
    for t in range(start, stop):
        query, key, value = x.q[:, t].to(dtype) * scale, x.k[:, t].to(dtype), x.v[:, t].to(dtype)
        decay = x.log_decay[:, t].exp()[..., None, None] if fixed is None else fixed
        state = torch.addcmul(state * decay, key[..., None], value[..., None, :])
        out = query @ state
        if state_sum is not None:
            state_sum = state_sum * decay[..., 0] + key
            out, log = _divide(out, (query @ state_sum[..., None]).squeeze(-1))
            logs.append(log)
        outputs.append(out)
    shape = (x.q.shape[0], 0, *x.q.shape[2:4], x.v.shape[-1])
    log_sum = None
    if state_sum is not None:
        log_sum = torch.stack(logs, 1) if logs else state.new_zeros(shape[:4])
    return torch.stack(outputs, 1) if outputs else state.new_zeros(shape), state, state_sum, log_sum


def _pack(cu_seqlens: Tensor, length: int, chunk: int) -> _Packing:
    """Give every sequence whole chunks, so that a boundary never lies inside one and no boundary is read on the host.

    At most (T + N (C - 1)) // C chunks are needed; those left over belong to no sequence and stay empty.
    """
    bounds, device = cu_seqlens.long(), cu_seqlens.device
    sequences = bounds.shape[0] - 1
    count = (length + sequences * (chunk - 1)) // chunk
    lengths = bounds[1:] - bounds[:-1]
    chunks = (lengths + chunk - 1) // chunk
    last = chunks.cumsum(0)
    first = last - chunks
    token = torch.arange(length, device=device)
    owner = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    slot = first[owner] * chunk + token - bounds[owner]

    index = torch.arange(count, device=device)
    holder = torch.searchsorted(last, index, right=True)
    known = holder.clamp(max=sequences - 1)
    filled = (lengths[known] - (index - first[known]) * chunk).clamp(0, chunk) * (holder < sequences)

    names = torch.arange(sequences, device=device)
    # Stable, so that an initial state comes right before the first chunk of its sequence.
    segment, order = torch.cat([names, holder]).sort(stable=True)
    entering = order.argsort()[sequences:]
    final = torch.searchsorted(segment, names, right=True)
    return _Packing(slot, filled, order, segment, entering, final)


def _cut(x: _Inputs, length: int, chunk: int, packing: _Packing | None) -> tuple[Tensor, Tensor, Tensor, _ChunkDecay]:
    """Queries `[B, Hs, NC, G * C, D]`, keys and values `[B, Hs, NC, C, D or Dv]`, and their decay.

    The query heads of a group are further rows of one matmul: keys, values and states are not repeated.
    """
    count = max(1, -(-length // chunk)) if packing is None else packing.lengths.shape[0]
    queries = _split(x.q, chunk, count, packing).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)
    # Contiguous once, for each is read by two matmuls.
    keys, values = (_split(y, chunk, count, packing).permute(0, 3, 1, 2, 4).contiguous() for y in (x.k, x.v))
    return queries, keys, values, _chunk_decay(x.log_decay, length, chunk, count, packing)


def _split(x: Tensor, chunk: int, count: int, packing: _Packing | None) -> Tensor:
    """`[B, T, ...]` to `[B, NC, C, ...]`, empty slots 0."""
    slots = chunk * count
    if packing is not None:
        x = x.new_zeros(1, slots, *x.shape[2:]).index_copy(1, packing.slot, x)
    elif slots > x.shape[1]:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, slots - x.shape[1]))
    return torch.unflatten(x, 1, (count, chunk))


def _join(out: Tensor, length: int, packing: _Packing | None) -> Tensor:
    """`[B, Hs, NC, G, C, Dv]` to `[B, T, Hq, Dv]`."""
    out = out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    return out[:, :length] if packing is None else out.index_select(1, packing.slot)


def _chunk_decay(log_decay: Tensor, length: int, chunk: int, count: int, packing: _Packing | None) -> _ChunkDecay:
    """Decay factors of all chunks. Every exponent is formed as a sum of log decays <= 0, never as a quotient."""
    step = torch.arange(chunk, device=log_decay.device)
    if log_decay.dim() == 3:
        total = _split(log_decay, chunk, count, packing).permute(0, 3, 1, 2).cumsum(-1)
        future = step[:, None] < step
        pair = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
        return _ChunkDecay(pair, total.exp(), (total[..., -1:] - total).exp(), total[..., -1])
    # Fixed decays depend on distances only: one [C, C] table a head serves all chunks.
    if packing is None:
        lengths = (length - chunk * torch.arange(count, device=log_decay.device)).clamp(max=chunk)
    else:
        lengths = packing.lengths
    rate = log_decay[:, None, None]
    distance = (step[:, None] - step).clamp(min=0)
    remaining = (lengths[:, None] - 1 - step).clamp(min=0)
    return _ChunkDecay(
        pair=(rate * distance).exp().tril()[None, :, None],
        from_start=(rate * (step + 1)).exp()[None],
        to_end=(rate * remaining).exp()[None],
        total=(log_decay[:, None] * lengths)[None],
    )


def _enter(
    added: Tensor, total: Tensor, first: Tensor | None, sequences: int, packing: _Packing | None
) -> tuple[Tensor, Tensor]:
    """States entering the chunks `[B, Hs, NC, D, X]` and leaving the sequences `[N, Hs, D, X]`.

    added `[B, Hs, NC, D, X]` is what each chunk adds, total its log decay, first `[N, Hs, D, X]` the initial states.
    """
    if packing is None:
        states = scan_states(added, total, first)
        return states[:, :, :-1], states[:, :, -1]
    if first is None:
        first = added.new_zeros(sequences, added.shape[1], *added.shape[3:])
    items = torch.cat([first.transpose(0, 1)[None], added], 2).index_select(2, packing.order)
    total = torch.cat([total.new_zeros(1, total.shape[1], sequences), total], 2).index_select(2, packing.order)
    states = scan_states(items, total, None, packing.segment)
    final = states.index_select(2, packing.final).squeeze(0).transpose(0, 1)
    return states.index_select(2, packing.entering), final


def scan_states(items: Tensor, total: Tensor, carry: Tensor | None, segment: Tensor | None = None) -> Tensor:
    """States between items that each add to the state and decay it.

    Args:
        items: what each adds, `[B, Hs, M, ...]`.
        total: its log decay `[B, Hs, M]`.
        carry: state before the first item `[B, Hs, ...]`, None for 0.
        segment: `[M]` rising numbers, with a state for each number; None for one state.

    Returns:
        `[B, Hs, M + 1, ...]`: row n is the state before item n, row M the one behind the last.
    """
    shape, flat, rows = items.shape[3:], items.flatten(3), []
    carry = None if carry is None else carry.flatten(2).unsqueeze(2)
    owner = None if segment is None else F.pad(segment, (1, 0), value=-1)
    for start in range(0, flat.shape[2], _SCAN_BLOCK):
        stop = min(start + _SCAN_BLOCK, flat.shape[2])
        own = None if owner is None else owner[start : stop + 1]
        weights = _scan_weights(total[:, :, start:stop], own)
        states = weights[..., 1:] @ flat[:, :, start:stop]
        if carry is not None:
            states = torch.addcmul(states, weights[..., :1], carry)
        carry = states[:, :, -1:]
        rows.append(states if stop == flat.shape[2] else states[:, :, :-1])
    return torch.unflatten((rows[0] if len(rows) == 1 else torch.cat(rows, 2)), 3, shape)


def _scan_weights(total: Tensor, owner: Tensor | None) -> Tensor:
    """`[B, Hs, n + 1, n + 1]`: decay from the carry (column 0) or item c - 1 (column c) to the state before item r.

    Each exponent is summed on its own: a difference of running sums would cancel after a long sequence.
    """
    size = total.shape[-1]
    steps = total[..., None].expand(*total.shape, size + 1).tril()
    hidden = torch.ones(size + 1, size + 1, dtype=torch.bool, device=total.device).triu(1)
    if owner is not None:
        hidden = hidden | (owner[:, None] != owner)
    return F.pad(steps, (0, 0, 1, 0)).cumsum(-2).masked_fill(hidden, -torch.inf).exp()


def expect_integer(name: str, x: Tensor) -> None:
    """ValueError for another dtype than int32 and int64."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, found {x.dtype}")


def check_mask(mask: Tensor, rows: int, length: int) -> None:
    """ValueError for what is not bool `[rows, length]`."""
    if mask.shape != (rows, length):
        raise ValueError(f"mask: expected shape {[rows, length]}, found {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, found {mask.dtype}")


def check_boundaries(cu_seqlens: Tensor, rows: int, length: int) -> None:
    """ValueError for boundaries that do not go from 0 to `length` in one row; values are looked at on the CPU alone."""
    if rows != 1:
        raise ValueError(f"q: expected one row beside cu_seqlens, found {rows}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, found {list(cu_seqlens.shape)}")
    expect_integer("cu_seqlens", cu_seqlens)
    # On another device the values could be read only by waiting for it, and in a traced call not at all.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens: expected values rising from 0 to T = {length}, found {bounds}")
