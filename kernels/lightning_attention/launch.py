"""Launch parameters, chosen by plain functions from measured tables (see README.md)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

SMALLEST_SEGMENT = 256  # tokens
SMALLEST_LONG_PART = 1024  # tokens; below, writing and reading a state takes as long as its k and v
LONGEST_UNCUT = 4096  # up to here three launches cost more than idle multiprocessors
LARGEST_TILE = 128  # tokens


class SweepConfig(NamedTuple):
    """How a sweep over the tokens is cut."""

    chunk: int  # tokens
    columns: int  # output columns of a program
    warps: int
    stages: int  # chunks in flight


def sweep_config(
    kind: str, dim: int, value_dim: int, dtype: torch.dtype, normalize: bool = False, narrow: bool = False
) -> SweepConfig:
    """Launch parameters of the sweeps for o ("forward"), dq ("dq"), dk and dv ("dkv").

    `narrow`: half the columns, twice the programs, where there would be no more than multiprocessors (`can_narrow`).
    Chosen on an H100 in bf16 among chunks of 16 to 128, 32 to 128 columns, 2 to 8 warps and 1 to 4 stages, each
    checked against fp64: with 64 tokens in a chunk the normalised forward is miscompiled (error .25).
    """
    size = max(dim, value_dim)
    if dtype == torch.float32:
        return SweepConfig(32 if size <= 128 else 16, 32, 4, 1)
    if dtype == torch.float16 and size > 64:  # states are multiplied in tf32, which takes twice the memory
        return SweepConfig(32 if size <= 128 else 16, 32, 4, 2)
    if size > 128:
        return SweepConfig(32, 64, 8, 3) if kind == "dkv" else SweepConfig(16, 64, 4, 3)
    if normalize:
        return SweepConfig(32, 64, 4, 2 if kind == "dkv" else 3)
    if kind == "dkv":
        return SweepConfig(32, 64, 2, 3) if size <= 64 else SweepConfig(64, 64, 4, 2)
    return SweepConfig(64, 32, 4, 3) if narrow else SweepConfig(32, 64, 4, 3)


def can_narrow(dim: int, value_dim: int, dtype: torch.dtype, normalize: bool, group: int, device: torch.device) -> bool:
    """Whether there is a narrow form; `group` query heads share a program."""
    return value_dim > 64 and _as_measured(dim, value_dim, dtype, normalize, group, device)


def state_config(
    sweep: SweepConfig, dim: int, value_dim: int, dtype: torch.dtype, normalize: bool, group: int, device: torch.device
) -> SweepConfig:
    """Launch parameters for the states between segments, which are cut for the sweep given; a sum over `group` heads.

    Without outputs there is room for all columns, so that one of the two tensors is not read twice.
    """
    wide = _as_measured(dim, value_dim, dtype, normalize, group, device)
    return SweepConfig(64, 128, 8, 3) if wide else sweep


def _as_measured(
    dim: int, value_dim: int, dtype: torch.dtype, normalize: bool, group: int, device: torch.device
) -> bool:
    """Whether a call is like those for which an H200 chose: loads in the place of bulk copies would spill registers."""
    plain = dtype == torch.bfloat16 and not normalize and group == 1
    return plain and 64 < max(dim, value_dim) <= 128 and has_bulk_copies(device)


def in_memory(config: SweepConfig, group: int, width: int, itemsize: int, device: torch.device) -> SweepConfig:
    """With as few chunks in flight as the shared memory holds, of each `group` tiles with `width` columns in all.

    Args:
        config: launch parameters as measured, for one head.
        group: query heads whose tiles a program reads for every chunk.
        width: features and columns of such tiles.
        itemsize: bytes of an element.
        device: where it runs.
    """
    chunk = group * config.chunk * width * itemsize
    return config._replace(stages=max(1, min(config.stages, shared_memory(device) // chunk)))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; that of an H100 where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; those of an H100 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a trace on fake tensors
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_bulk_copies(device: torch.device) -> bool:
    """Whether it has bulk copies (TMA: Hopper and later); the interpreter has."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return not cuda or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9)


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch)."""
    cuda = device.type == "cuda" and torch.version.hip is None
    return cuda and torch.cuda.get_device_capability(device)[0] >= 9


def segment_length(length: int, programs: int, narrow: int, sequences: int, device: torch.device) -> int:
    """Tokens of a segment: the whole sequence if there are programs enough, else a part that fills the device.

    Args:
        length: tokens of a row (of all sequences when they are packed into one).
        programs: programs of the forward pass with whole sequences.
        narrow: the same in the narrow form, 0 where there is none.
        sequences: sequences in a row of tokens: 1, or the number that is packed.
        device: where it runs.
    """
    wanted = processors(device)
    if 4 * programs >= 3 * wanted:  # reading k and v twice costs more than a quarter of the device
        return length
    if 4 * narrow >= 3 * wanted and length <= LONGEST_UNCUT:
        return length
    parts = max(2, 2 * wanted // programs)  # two programs fit a multiprocessor: one more would begin a second wave
    segment = max(SMALLEST_SEGMENT, share_of(length, parts * sequences))
    return length if segment >= length else segment


def hopper_cut(
    length: int, programs: int, forward: int, narrow: int, states: int, device: torch.device
) -> tuple[int, int]:
    """Tokens of a segment for Hopper's sweep, and into how many parts the pass for the states cuts it.

    One program fills a multiprocessor there (of 64 columns in all: two), so segments are fewer and longer than those of
    `segment_length`, and fewer of k and v are read twice: all but the last segment. Without outputs a program is small;
    two to a multiprocessor, and four where parts are long: those that have decayed to nothing are over at once.
    With 128 features and values and 132 multiprocessors:

        rows x tokens, heads    segments x tokens    parts
        2 x 32768, 32           1                    1
        1 x 65536, 32           2 x 32768            16
        1 x 4096, 32            1                    1
        1 x 65536, 32 / 8       4 x 16384            16
        1 x 32768, 8            8 x 4096             4

    A short sequence is not cut for a backward pass alone that has work for most of the device: 32 x 1,024 tokens of 9/3
    heads (128 features, 64 values, normalised) took 0.137 and 0.342 ms in two segments, on another H100 0.115 and 0.296
    ms in one.

    Args:
        length: tokens of a row.
        programs: the fewest programs of a sweep of whole sequences, each with 64 columns.
        forward: those of the forward pass.
        narrow: the same in the narrow form of the Triton kernels, 0 where there is none.
        states: sequences times heads of the state.
        device: where it runs.
    """
    wanted = processors(device)
    ahead = max(narrow, forward if 2 * programs >= wanted else 0)
    if 4 * programs >= 3 * wanted or (4 * ahead >= 3 * wanted and length <= LONGEST_UNCUT):
        return length, 1
    segment = max(SMALLEST_SEGMENT, share_of(length, max(2, wanted // programs)))
    if segment >= length:
        return length, 1
    before = -(-length // segment) - 1  # segments whose share of the state enters another
    evenly = 2 * wanted // (states * before)
    return segment, max(1, min(evenly, segment // SMALLEST_SEGMENT), min(2 * evenly, segment // SMALLEST_LONG_PART))


def share_of(tokens: int, parts: int) -> int:
    """Tokens of each of so many parts: whole tiles, of which the last part may have fewer."""
    return -(-tokens // (parts * LARGEST_TILE)) * LARGEST_TILE
