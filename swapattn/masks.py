"""What a mask of transformers says about the new tokens: which are real, and where packed sequences start.

A file of the checkpoint runtime: it imports torch only.
"""

from __future__ import annotations

from typing import Any

import torch

Found = tuple[torch.Tensor | None, torch.Tensor | None]
_READ, _UNPACKED = "_swapattn_read", "_swapattn_unpacked"  # attributes of a mask: what all layers share


def recorded(tensor: torch.Tensor) -> bool:
    """Whether operators go into a graph, compiled or CUDA's, so that values of the tensor cannot be read here."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def unpacked(mask: Any) -> Any:
    """Note on a mask that it holds no packed sequences, so that nobody has to look."""
    if isinstance(mask, torch.Tensor) and not torch.compiler.is_compiling():
        setattr(mask, _UNPACKED, True)
    return mask


def read_mask(mask: Any, length: int, seen: int | torch.Tensor, *, may_be_packed: bool = True) -> Found:
    """Real tokens `[B, T]` and sequence starts `[B, T]` (None when nothing is packed) from a 2D or 4D mask.

    The diagonal of transformers' 4D mask is the padding mask of the new tokens, for full, sliding and chunked
    masks alike; a gap right below the diagonal between two real tokens is a boundary of packed sequences.

    Whether there is such a gap depends on values, so the host has to wait for the device to know it. That is done
    once per forward pass, for the first layer that sees the mask, and only where it can be: in a prefill or without
    a cache, with a 4D mask that was not made from a padding mask. While torch.compile traces it cannot be done:
    there, and while a CUDA graph is recorded, a gap is an error when the graph runs (on CUDA a device-side assertion);
    say `cu_seq_lens_q` instead.

    Args:
        mask: 2D `[B, K]`, 4D `[B, 1, T, K]` (bool, or additive), or None.
        length: T, the number of new tokens.
        seen: tokens in the cache before them; a tensor `[]` is not read on the host.
        may_be_packed: False to take the sequences for unpacked, or for already known.
    """
    if mask is None:
        return None, None
    if isinstance(seen, torch.Tensor):
        return _read(mask, length, seen, False)
    may_be_packed = may_be_packed and not getattr(mask, _UNPACKED, False)
    if recorded(mask):
        tokens, starts = _read(mask, length, seen, may_be_packed)
        if starts is not None:
            torch._assert_async(
                ~starts.any(), "packed sequences in a compiled model: pass cu_seq_lens_q, or a 2D attention_mask"
            )
        return tokens, None
    key = (length, seen, may_be_packed, None if mask.is_inference() else mask._version)
    held = getattr(mask, _READ, None)
    if held is not None and held[0] == key:
        found: Found = held[1]
        return found
    tokens, starts = _read(mask, length, seen, may_be_packed)
    if starts is not None and bool((~starts).all()):  # the meta device has no values: `audit` says yes to everything
        starts = None
    if starts is not None:
        starts[:, 0] = True
    setattr(mask, _READ, (key, (tokens, starts)))
    return tokens, starts


def _read(mask: torch.Tensor, length: int, seen: int | torch.Tensor, may_be_packed: bool) -> Found:
    """Real tokens, and what comes right after a gap where there may be one, `[B, T]` each."""
    if mask.dtype == torch.bool:
        allowed = mask
    else:  # eager's additive mask holds 0 where attending is allowed, a 2D mask holds 1
        allowed = mask == 0 if mask.dim() == 4 else mask > 0
    last = allowed.shape[-1] - length
    if last < 0:  # stock layers made it, which a static cache holds until the first forward pass
        raise ValueError(f"a mask of {allowed.shape[-1]} tokens for {length} new ones: the static cache is too short")
    offset = seen.clamp(max=last) if isinstance(seen, torch.Tensor) else min(seen, last)
    index = torch.arange(length, device=mask.device)  # not slices or diagonals: a graph would hold for one offset only
    if allowed.dim() == 2:
        return allowed[:, offset + index], None
    rows = allowed[:, 0]
    tokens = rows[:, index, offset + index]
    if length == 1 or not may_be_packed:
        return tokens, None
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = ~rows[:, index[1:], index[1:] - 1] & tokens[:, 1:] & tokens[:, :-1]
    return tokens, starts
