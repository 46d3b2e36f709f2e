"""Launchers of the kernels of `hedgehog_features`, as operators of torch.library; nothing is read on the host.

Dimensions: B rows, T tokens, H heads of the features, Hx heads of x, D dimensions of x, F hidden ones.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .feature_kernels import features_kernel, input_kernel, matrices_kernel
from .launch import processors, shared_memory
from .shape import addressable, padded, precision
from .switch import SWITCH

LEAST_MEMORY = 98304  # bytes of shared memory without which there are tiles for up to 64 dimensions alone
LARGEST_MEMORY = 147456  # bytes of shared memory that the largest of the launch parameters below need (on sm_80)
_Maybe = Tensor | None
# Of this copy of the file: the one that travels with a checkpoint may be loaded beside the installed one.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class FeaturesConfig(NamedTuple):
    """How a kernel is cut."""

    block: int  # tokens of a tile
    columns: int  # hidden dimensions of a tile, of "matrices" also columns of W
    warps: int
    stages: int
    programs: int  # of a multiprocessor


def features_config(kind: str, dim: int, hidden: int, dtype: torch.dtype, device: torch.device) -> FeaturesConfig:
    """Launch parameters of the kernels for the features ("forward"), dx ("input") and the matrices ("matrices").

    In bf16 chosen on an H100 among blocks of 16 to 128, 32 to 128 columns, 4 and 8 warps, 1 to 3 stages and 1 to 4
    programs, each checked against fp64 (README.md).

    Raises:
        RuntimeError: the device has too little shared memory for so many dimensions.
    """
    wide, most, memory = padded(dim) > 64, padded(max(hidden, 1)), shared_memory(device)
    if memory < LEAST_MEMORY:
        if wide:
            raise RuntimeError(
                f"features of {dim} dimensions need {LEAST_MEMORY} bytes of shared memory, the device has {memory}: "
                f"set {SWITCH}=torch"
            )
        return FeaturesConfig(16, 32 if kind == "matrices" else 16, 4, 1, 2)
    if dtype == torch.float32:
        return FeaturesConfig(32, 32, 8, 1, 2)
    if kind == "forward":
        return FeaturesConfig(64, 64, 4, 2, 4) if wide else FeaturesConfig(64, min(most, 128), 4, 2, 3)
    if kind == "input":
        small = wide or memory < LARGEST_MEMORY
        return FeaturesConfig(32, 64, 4, 1, 2) if small else FeaturesConfig(128, min(most, 128), 8, 2, 2)
    return FeaturesConfig(64, 64, 4, 2, 3) if wide else FeaturesConfig(64, 64, 4, 3, 2)


def _given(x: Tensor, weight: Tensor, up: _Maybe, down: _Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What the kernels read, and F. Matrices that do not stay on the chip are rounded once, not for each block."""
    hidden = 0 if up is None else up.shape[2]
    matrices = [weight if m is None else m for m in (weight, up, down)]  # what is not read still has to be a pointer
    if padded(x.shape[3]) > 64:
        matrices = [m.to(x.dtype) for m in matrices]
    weight, up, down = (m.contiguous() for m in matrices)
    return addressable(x), weight, up, down, hidden


def _launch(
    kernel: Any,
    kind: str,
    x: Tensor,
    hidden: int,
    heads: int,
    *tensors: Tensor,
    scale: float,
    after: tuple[Any, ...] = (),
) -> None:
    """Run a kernel that is neither given nor gives a sum over parts."""
    rows, length, heads_x, dim = x.shape
    config = features_config(kind, dim, hidden, x.dtype, x.device)
    parts = _parts(rows * length, config, heads, x.device)
    kernel[(heads * parts,)](
        x, *tensors, scale, rows * length, length, heads, heads_x, x.stride()[:3], *after,
        D=dim, F=hidden, BD=padded(dim), BF=config.columns, BM=config.block, PRECISION=precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _parts(tokens: int, config: FeaturesConfig, programs: int, device: torch.device) -> int:
    """Among how many programs the blocks of a head are shared out."""
    return max(1, min(-(-tokens // config.block), config.programs * processors(device) // programs))


@torch.library.custom_op(f"{_NAMESPACE}::features", mutates_args=())
def _features(x: Tensor, weight: Tensor, up: _Maybe, down: _Maybe, scale: float) -> Tensor:
    """The features `[B, T, H, 2 D]`."""
    o = x.new_empty(*x.shape[:2], weight.shape[0], 2 * x.shape[3])
    x, weight, up, down, hidden = _given(x, weight, up, down)
    _launch(features_kernel, "forward", x, hidden, weight.shape[0], weight, up, down, o, scale=scale)
    return o


@_features.register_fake
def _(x: Tensor, weight: Tensor, up: _Maybe, down: _Maybe, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0], 2 * x.shape[3])


@torch.library.custom_op(f"{_NAMESPACE}::features_backward", mutates_args=())
def _backward(
    do: Tensor, x: Tensor, weight: Tensor, up: _Maybe, down: _Maybe, scale: float, trained: bool
) -> list[Tensor]:
    """dx `[B, T, H, D]`, of each head of the features alone, and those of all matrices one after another, fp32.

    The latter are empty unless the matrices are `trained`.
    """
    x, weight, up, down, hidden = _given(x, weight, up, down)
    do = addressable(do)
    rows, length, heads_x, dim = x.shape
    heads = weight.shape[0]
    dx, dy = x.new_empty(rows, length, heads, dim), x.new_empty(rows, length, heads, dim)
    _launch(
        input_kernel, "input", x, hidden, heads, do, weight, up, down, dx, dy, scale=scale, after=(do.stride()[:3],)
    )
    if not trained:
        return [dx, dx.new_empty(0, dtype=torch.float32)]
    config = features_config("matrices", dim, hidden, x.dtype, x.device)
    pieces = -(-dim // config.columns) - (-hidden // config.columns)
    parts = _parts(rows * length, config, heads * pieces, x.device)
    sums = torch.empty(parts, heads * dim * (dim + 2 * hidden), dtype=torch.float32, device=x.device)
    matrices_kernel[(pieces * heads * parts,)](
        x, dy, up, down, sums, scale, rows * length, length, heads, heads_x, x.stride()[:3],
        D=dim, F=hidden, BD=padded(dim), BC=config.columns, BM=config.block, PRECISION=precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return [dx, sums.sum(0)]


@_backward.register_fake
def _(do: Tensor, x: Tensor, weight: Tensor, up: _Maybe, down: _Maybe, scale: float, trained: bool) -> list[Tensor]:
    numbers = sum(m.numel() for m in (weight, up, down) if m is not None) if trained else 0
    dx = x.new_empty(*x.shape[:2], weight.shape[0], x.shape[3])
    return [dx, x.new_empty(numbers, dtype=torch.float32)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    x, *matrices = ctx.saved_tensors
    wanted, trained = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
    dx, sums = _backward(do, x, *matrices, ctx.scale, trained)
    if wanted and dx.shape[2] != x.shape[2]:
        dx = torch.unflatten(dx, 2, (-1, x.shape[2])).sum(2)
    there = [m for m in matrices if m is not None] if trained else []
    parts = sums.split([m.numel() for m in there]) if trained else []
    gradients = [part.view(m.shape).to(m.dtype) for part, m in zip(parts, there, strict=True)]
    return dx if wanted else None, *gradients, *[None] * (4 - len(gradients))


_features.register_autograd(_differentiate, setup_context=_keep)


def hedgehog_features_kernel(
    x: Tensor, weight: Tensor, up: Tensor | None = None, down: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """`hedgehog_features` by the kernels; arguments checked by the caller."""
    found: Tensor = _features(x, weight, up, down, float(scale))
    return found
