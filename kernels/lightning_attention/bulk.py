"""Where bulk copies (Hopper's TMA) may be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import SweepConfig, has_bulk_copies
from .shape import Shape, padded

try:  # in a try block: transformers demands what the files of a checkpoint import outside one
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ImportError as error:
    raise ImportError("the kernels of lightning_attention need triton") from error


def bulk_copies(shape: Shape, config: SweepConfig, group: int, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may read these tensors `[B, T, H, D]` with `sweep.rows_of` for a group of heads.

    A mask may hide tokens that hold NaN, which only a masked load keeps out. Addresses are multiples of 16 bytes, and
    tokens do not overlap, as those of an expanded gradient do.
    """
    if shape.masked or shape.length == 0 or (shape.split and shape.segment % config.chunk):
        return False
    if not all(_aligned(x) for x in tensors) or (group > 1 and not all(_matrix(x) for x in tensors)):
        return False
    if group > 1:
        whole = not shape.packed and shape.length % config.chunk == 0
        if not whole or padded(shape.dim) != shape.dim or padded(shape.value_dim) != shape.value_dim:
            return False
    device = tensors[0].device
    if device.type == "cuda":
        triton.set_allocator(_scratch)
    return has_bulk_copies(device)


def bulk_tensors(tensors: Sequence[Tensor]) -> bool:
    """Whether descriptors of these tensors `[B, T, H, D]` may be made on the host: nothing is expanded."""
    whole = all(x.numel() > 0 and min(x.stride()[:3]) >= x.shape[3] and _aligned(x) for x in tensors)
    return whole and has_bulk_copies(tensors[0].device)


def _aligned(x: Tensor) -> bool:
    steps = (x.stride(i) * x.element_size() for i in range(3))
    return x.stride(1) >= x.shape[3] and x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


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
