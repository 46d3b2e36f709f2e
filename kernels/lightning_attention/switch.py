"""Which calls the Triton kernels take."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# Where the kernels run: "torch" nowhere, "triton" everywhere (an error where they cannot), "auto" on CUDA tensors.
SWITCH = "SWAPATTN_KERNELS"
LARGEST_DIM = 256
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def on_kernels(*tensors: Tensor, refused: str | None = None) -> bool:
    """Whether the kernels take a call on these tensors `[..., D]`; see `SWITCH`.

    Args:
        tensors: its operands.
        refused: what else keeps the kernels from it.

    Raises:
        ValueError: the switch has an unknown value, or asks for kernels that cannot take the call.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in ("torch", "triton", "auto"):
        raise ValueError(f"{SWITCH}: expected torch, triton or auto, found {choice}")
    if choice == "torch" or (choice == "auto" and not tensors[0].is_cuda):
        return False
    widest = max(x.shape[-1] for x in tensors)
    if not _HAS_TRITON:
        refused = "triton is not installed"
    elif widest > LARGEST_DIM:
        refused = f"{widest} features are more than {LARGEST_DIM}"
    elif any(x.dtype == torch.float64 for x in tensors):
        refused = "float64"
    if choice == "triton" and refused:
        raise ValueError(f"{SWITCH}=triton: the kernels cannot take this call: {refused}")
    return refused is None
