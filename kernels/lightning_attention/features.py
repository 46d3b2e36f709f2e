"""Features of the linear branch that are learnt: softmax([y, -y]) of a matrix or a small network of each head.

Hedgehog, arXiv 2402.04347; as in LoLCATs, arXiv 2410.10254. This is the public operation and its plain PyTorch form; on
a GPU the Triton kernels of `features_op` take over.

Dimensions: B rows, T tokens, H heads of the features, Hx heads of x, D dimensions of x, F hidden ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .switch import on_kernels

LARGEST_DIM = 128  # of the kernels, half in float32: more does not fit the registers


def hedgehog_features(
    x: Tensor, weight: Tensor, up: Tensor | None = None, down: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """softmax([y, -y]) with y = scale·x W + silu(scale·x A) B, one W, A and B for each head of the features.

    Args:
        x: `[B, T, Hx, D]`, any strides with a contiguous last dimension.
        weight: W `[H, D, D]`, H a multiple of Hx; head h of the features reads head h % Hx of x.
        up: A `[H, D, F]`, or None for y = scale·x W.
        down: B `[H, F, D]`, with `up`.
        scale: factor of x.

    Returns:
        `[B, T, H, 2 D]` in the dtype of x, features ≥ 0 that sum to one; differentiable in x and the matrices. Products
        are of matrices rounded to the dtype of x, on the kernels with sums, softmax and y in float32.

    Raises:
        ValueError: if shapes do not fit, or the switch asks for kernels that cannot take the call.
    """
    _check(x, weight, up, down)
    dim, largest = x.shape[3], largest_dim(x.dtype)
    refused = f"{dim} dimensions in {x.dtype} are more than {largest}" if dim > largest else None
    if x.numel() > 0 and on_kernels(x, refused=refused):
        from .features_op import hedgehog_features_kernel

        return hedgehog_features_kernel(x, weight, up, down, scale=scale)
    x, branches = x * scale, weight.shape[0] // x.shape[2]
    x = x if branches == 1 else x.repeat(1, 1, branches, 1)
    y = torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype))
    if up is not None and down is not None:
        hidden = F.silu(torch.einsum("bthd,hdf->bthf", x, up.to(x.dtype)))
        y = y + torch.einsum("bthf,hfd->bthd", hidden, down.to(x.dtype))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat((y, -y), dim=-1).softmax(dim=-1, dtype=dtype).to(x.dtype)


def largest_dim(dtype: torch.dtype) -> int:
    """Dimensions that the kernels take."""
    return LARGEST_DIM // 2 if dtype == torch.float32 else LARGEST_DIM


def _check(x: Tensor, weight: Tensor, up: Tensor | None, down: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [B, T, H, D], found shape {list(x.shape)}")
    heads, dim = x.shape[2:]
    multiple = heads > 0 and weight.dim() == 3 and weight.shape[0] > 0 and weight.shape[0] % heads == 0
    if not multiple or weight.shape[1:] != (dim, dim):
        raise ValueError(f"weight: expected [H, {dim}, {dim}] with H a multiple of {heads}, found {list(weight.shape)}")
    if (up is None) is not (down is None):
        raise ValueError("up and down: expected both or neither")
    if up is not None and down is not None:
        hidden = up.shape[-1]
        for name, matrix, shape in (("up", up, (dim, hidden)), ("down", down, (hidden, dim))):
            if matrix.shape != (weight.shape[0], *shape):
                wanted = [weight.shape[0], *shape]
                raise ValueError(f"{name}: expected shape {wanted}, found {list(matrix.shape)}")
