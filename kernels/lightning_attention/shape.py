"""Sizes of a call and how its sequences are cut into segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import LARGEST_TILE, can_narrow, hopper_cut, processors, segment_length, sweep_config

CUT_FOR_HOPPER = True  # False: calls for Hopper's sweep are cut as the others are, to compare


class Shape(NamedTuple):
    """Sizes and options of a call that every kernel needs."""

    rows: int
    length: int
    query_heads: int
    shared: int  # key/value heads
    heads: int  # of the decay and of the state
    dim: int
    value_dim: int
    sequences: int
    segment: int  # tokens
    segments: int  # of a row; of all sequences when they are packed
    parts: int  # into which a segment is cut where only its share of the state is computed; 1 of packed sequences
    packed: bool
    per_token: bool
    masked: bool
    normalize: bool
    narrow: bool  # so few programs that half the columns for each are better

    @property
    def group(self) -> int:
        """Query heads that share a state."""
        return self.query_heads // self.heads

    @property
    def items(self) -> int:
        """Upper bound of the segments in all."""
        return self.segments if self.packed else self.rows * self.segments

    @property
    def split(self) -> bool:
        """Whether states have to be handed from segment to segment."""
        return self.segment < self.length

    @property
    def block_sequences(self) -> int:
        """The constant SEQUENCES of `sweep.locate`."""
        return 1 << (max(self.sequences, 2) - 1).bit_length() if self.packed else 0


def shape_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    masked: bool,
    normalize: bool,
    segment: int | None = None,
) -> Shape:
    """Sizes of a call, and how its sequences are cut into segments (`segment` tokens, None: as fits the device).

    The forward pass, a trace on fake tensors and the backward pass each ask, so that nothing but sizes, dtype and
    device may count: not where a tensor lies.
    """
    from .hopper import suits_hopper  # which imports this

    rows, length, query_heads, dim = q.shape
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = log_decay.shape[-1]
    columns = sweep_config("forward", dim, v.shape[3], q.dtype, normalize).columns
    paired = _paired(query_heads // heads, normalize)
    programs = sequences * (query_heads // paired) * -(-v.shape[3] // columns)
    narrow = 0
    if can_narrow(dim, v.shape[3], q.dtype, normalize, paired, q.device):
        half = sweep_config("forward", dim, v.shape[3], q.dtype, normalize, narrow=True).columns
        narrow = sequences * (query_heads // paired) * -(-v.shape[3] // half)
    uncut = Shape(
        rows, length, query_heads, k.shape[2], heads, dim, v.shape[3], sequences, length, 1, 1,
        cu_seqlens is not None, log_decay.dim() == 3, masked, normalize, False,
    )  # fmt: skip
    parts = 1
    if segment is None:
        if CUT_FOR_HOPPER and not uncut.packed and suits_hopper(uncut, q.dtype, q.device):
            together = 1 if normalize or dim != v.shape[3] else 2  # dk and dv, side by side
            pieces = rows * min(query_heads, together * heads) * (min(dim, v.shape[3]) // 64)
            forward = rows * query_heads * (v.shape[3] // 64)
            segment, parts = hopper_cut(length, pieces, forward, narrow, rows * heads, q.device)
        else:
            segment = segment_length(length, programs, narrow, 1 if cu_seqlens is None else sequences, q.device)
    cut = -(-length // segment)
    segments = cut if cu_seqlens is None else (sequences if segment >= length else cut + sequences)
    return uncut._replace(
        segment=segment, segments=segments, parts=parts,
        narrow=segment >= length and narrow > 0 and programs <= processors(q.device),
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a dot: exact for fp32; of half types only states are multiplied in fp32, tf32 is as fine."""
    return "ieee" if dtype == torch.float32 else "tf32"


def outputs_per_program(shape: Shape) -> int:
    """Query heads of a group that one program computes with one state: two where they pair off.

    Measured on an H100 at 32/8 heads: 80 % of the copy floor with two, 76 % with four, 58 % with one. The sum of a
    normalised output needs the registers.
    """
    return _paired(shape.group, shape.normalize)


def _paired(group: int, normalize: bool) -> int:
    return 2 if group % 2 == 0 and not normalize else 1


def padded(size: int) -> int:
    """Tile size of a feature dimension: a power of 2, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def addressable(x: Tensor) -> Tensor:
    """`[B, T, ...]` contiguous in the last dimension, and such that offsets within a tile of tokens fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**31 // LARGEST_TILE else x.contiguous()
