"""Which calls take the sweep for Hopper GPUs, and its launcher.

It takes bfloat16 without hidden tokens, and packed sequences unless their states are wanted. Every other call takes the
Triton kernels, which are correct everywhere and as fast where nothing is gained here (64 features and 64 values).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bulk import bulk_tensors
from .decay import running_sums
from .launch import processors
from .shape import Shape

try:
    from .hopper_kernels import hopper_kernel
    from .hopper_parts import GIVEN_BOTH, GIVEN_SUM, LINE, MAKE_SUM, NO_SUM, TILE, VERSION, TensorDescriptor
except (ImportError, AttributeError):  # a Triton without Gluon, or with one that is not known to compile it
    hopper_kernel, VERSION = None, (0, 0)

# "0": never; "1": with any Triton that compiles it; "auto": with those with which it has run on a GPU.
SWITCH = "SWAPATTN_HOPPER"
HAS_RUN = ((3, 6),)
CHUNK = 64  # tokens, and columns of a consumer
TAKEN = (64, 128), (128, 64), (128, 128), (256, 128), (256, 256)  # features of q and k, of v
SMALLEST = 2**22  # elements of q: for less, making the descriptors on the host takes longer than is gained
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # a, b, c, out: [B, T, H, D]
Pair = tuple[Tensor | None, Tensor | None]  # a state and its sum state


class Consumers(NamedTuple):
    """How the columns of a head are shared out."""

    number: int  # warpgroups of a program
    stages: int  # chunks in flight
    registers: int  # of a thread at the start, which the roles then share out
    programs: int  # that a multiprocessor holds
    heads: int = 1  # query heads of a group whose outputs a program makes with one state, where each has its own


def fits_hopper(shape: Shape, *tensors: Tensor) -> bool:
    """Whether sweeps of these tensors `[B, T, H, D]` run here; see `SWITCH`."""
    return suits_hopper(shape, tensors[0].dtype, tensors[0].device) and bulk_tensors(tensors)


def suits_hopper(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """As far as sizes, dtype and device tell, which fake tensors have, too.

    Raises:
        ValueError: the switch has an unknown value.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"{SWITCH}: expected 0, 1 or auto, found {choice}")
    if choice == "0" or (choice == "auto" and VERSION not in HAS_RUN):
        return False
    if hopper_kernel is None or shape.masked or (shape.packed and (shape.split or shape.per_token)):
        return False
    if shape.per_token and shape.split and shape.segment % CHUNK:
        return False
    if (shape.dim, shape.value_dim) not in TAKEN or shape.group > 8:
        return False
    large = shape.rows * shape.length * shape.query_heads * shape.dim >= SMALLEST
    return large and dtype == torch.bfloat16 and available(device)


@cache
def available(device: torch.device) -> bool:
    """Whether it is a Hopper GPU: other generations have no such products. A trace without a GPU is for one."""
    cuda = device.type == "cuda" and torch.version.hip is None
    return cuda and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] == 9)


def consumers(
    dim: int, columns: int, pieces: int, device: torch.device,
    *, group: int = 1, grouped: bool = False, made: bool = False, given: bool = False, dots: bool = False,
) -> Consumers:  # fmt: skip
    """How `columns` columns of each of `pieces` heads of sequences are shared out.

    Args:
        dim: features of a and b.
        group: query heads of a group with outputs of their own, which may share a state.
        grouped: a gradient where several query heads share a key/value head.
        made, given: this sweep makes 1/z, or takes it.
        dots: with a fifth tile.

    Measured on an H100 in bf16 (README.md). Two consumers of a program read a and b once; one and twice the programs
    are better where more than half of the multiprocessors would have none. Heads that share a state are better where
    they do not make the longest program longer.
    """
    few = pieces * (columns // CHUNK) < processors(device)
    if dim == 256:
        chosen = Consumers(1 if few or dots else 2, 2, 168, 1)
    elif columns == 64:
        chosen = Consumers(1, 3, 168, 1) if made or given else Consumers(1, 2, 128, 2)
    elif few:
        chosen = Consumers(1, 2 if made else 3, 168, 1)
    else:
        chosen = Consumers(2, 3 if grouped and not dots else 2, 168, 1)
    if dots or dim == 256 or (dim == 128 and (made or given)):  # there are no registers for it
        return chosen
    works, slots = pieces * columns // (CHUNK * chosen.number), processors(device)
    # As many heads one after another as without: in full rounds, and none of more heads that only some take part in.
    together = [n for n in (2, 3, 4) if group % n == 0 and n * -(-works // (n * slots)) <= -(-works // slots)]
    return chosen._replace(heads=max(together, default=1))


def chunk_sums(log_decay: Tensor) -> Tensor | None:
    """What a sweep wants to know of a decay for every token, `[B, T, Hs]`; None of a fixed one."""
    return running_sums(log_decay, CHUNK) if log_decay.dim() == 3 else None


def hopper_sweep(
    first: Operands, second: Operands | None, log_decay: Tensor, scale: float, entering: Pair,
    shape: Shape, *, into: str, reverse: bool = False, leaving: Pair = (None, None),
    cu_seqlens: Tensor | None = None, sums: Tensor | None = None,
    made: Tensor | None = None, given: Pair = (None, None),
    other: Tensor | None = None, dots: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch one sweep, or two side by side, of which the other goes into v and D = Dv.

    Args:
        first, second: a, b, c of a sweep, and where its output goes. With `reverse` a has the key/value heads, b and c
            the query heads, and the output has the heads of the state; else a and the output have the query heads.
        log_decay: fp32 `[Hs]`; not read where there are `sums`.
        scale: factor of the output.
        entering: state `[items, Hs, D, Dv]` and sum state `[items, Hs, D]`, fp32, before each segment in the order of
            the walk; None: 0.
        shape: sizes of the call.
        into: "v" if out has the Dv columns of v (o, dv), "k" if it has the D columns of k (dq, dk).
        reverse: tokens from the last to the first.
        leaving: where a sweep for o puts the state `[N, Hs, D, Dv]` and sum state `[N, Hs, D]` behind the last token.
        cu_seqlens: `[N + 1]` integers.
        sums: `chunk_sums`.
        made: where 1/z goes, fp32 `[Hq, B, T]`, if the output is to be normalised.
        given: 1/z and -(do . o) of a normalised output, fp32 `[Hq, B, T]`; a sweep into v reads the first only.
        other, dots: `[B, T, H, D]` as a; the products of it and the output go into dots, fp32
            `[blocks of 64 columns, B, H, T]` with the heads of the output.
    """
    dim, columns, device = first[0].shape[3], first[3].shape[3], first[0].device
    pieces = shape.items * (shape.heads if reverse else shape.query_heads) * (1 if second is None else 2)
    config = consumers(
        dim, columns, pieces, device,
        group=1 if reverse or shape.packed or leaving[0] is not None else shape.group,  # else not measured
        grouped=shape.group > 1 and (reverse or into == "k"), made=made is not None,
        given=given[0] is not None, dots=dots is not None,
    )  # fmt: skip
    together = shape.group if reverse else config.heads
    heads = shape.query_heads // together
    works = pieces // (1 if reverse else together) * (columns // (CHUNK * config.number))
    tiles: list[Any] = [
        None if operands is None else _tile(operands[i], size)
        for operands in (first, second)
        for i, size in enumerate((dim, dim, CHUNK, CHUNK))
    ]
    line = None
    if sums is not None:
        line = TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [1, 1, CHUNK], LINE)

    def held(tensor: Tensor | None) -> Tensor:  # a pointer that is not read still has to be one
        return first[3] if tensor is None else tensor

    role = NO_SUM
    if made is not None:
        role = MAKE_SUM
    elif given[0] is not None:
        role = GIVEN_SUM if into == "v" else GIVEN_BOTH
    # Packed sequences are of different lengths: the device hands them out.
    programs = works if shape.packed else min(works, config.programs * processors(device))
    hopper_kernel[(programs,)](
        *tiles, None if other is None else _tile(other, CHUNK), line, first[3], (second or first)[3],
        *(held(x) for x in (*entering, *leaving)), log_decay, held(made), *(held(x) for x in given), held(dots),
        held(cu_seqlens), scale,
        works, heads, shape.length, shape.rows * shape.length, shape.segment, shape.segments, 0,
        *((columns, 1) if into == "v" else (1, dim)),  # of a's features and of the columns, in the state
        0 if dots is None else dots.stride(0),
        A=dim, V=columns, GROUP=shape.group, READERS=shape.heads // shape.shared, HEADS=together,
        STAGES=config.stages, CONSUMERS=config.number, PAIR=second is not None, REVERSED=reverse,
        ENTERING=entering[0] is not None, LEAVING=leaving[0] is not None,
        PER_TOKEN=sums is not None, DOTS=dots is not None, PACKED=shape.packed, SUM=role.value,
        num_warps=4, maxnreg=config.registers,
    )  # fmt: skip


def _tile(x: Tensor, columns: int) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, CHUNK, 1, columns], TILE)
