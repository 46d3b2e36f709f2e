"""Where bulk copies (Hopper's TMA) may be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import SweepConfig
from .shape import Shape, padded

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


def bulk_copies(shape: Shape, config: SweepConfig, group: int, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may read these tensors `[B, T, H, D]` with `sweep.rows_of` for a group of heads.

    A mask may hide tokens that hold NaN, which only a masked load keeps out. Addresses are multiples of 16 bytes, and
    tokens do not overlap, as those of an expanded gradient do.
    """
    if shape.masked or shape.length == 0 or (shape.split and shape.segment % config.chunk):
        return False
    for x in tensors:
        if x.stride(1) < x.shape[3] or x.data_ptr() % 16 or any(x.stride(i) * x.element_size() % 16 for i in range(3)):
            return False
        if group > 1 and not _matrix(x):
            return False
    if group > 1:
        whole = not shape.packed and shape.length % config.chunk == 0
        if not whole or padded(shape.dim) != shape.dim or padded(shape.value_dim) != shape.value_dim:
            return False
    device = tensors[0].device
    if device.type != "cuda":
        return True
    triton.set_allocator(_scratch)
    return torch.cuda.get_device_capability(device)[0] >= 9


def _matrix(x: Tensor) -> bool:
    """Whether all heads of a row lie in one matrix of tokens."""
    token, head = x.stride(1), x.stride(2)
    return head % token == 0 or head + x.shape[3] <= token


def head_steps(x: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix of tokens from one head to the next."""
    token, head = x.stride(1), x.stride(2)
    return (head // token, 0) if token and head % token == 0 else (0, head)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
