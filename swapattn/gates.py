"""Data-dependent gates of the linear branch, computed from the input of the attention module.

A file of the checkpoint runtime: it imports torch only, so that a saved checkpoint can carry a copy of it.
Both start as a constant (their matrices are 0), so that a layer begins as the one without the gate.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F


class DecayGate(nn.Module):
    """Step size Δ_t = softplus(W x_t + b) > 0 of each state and token; ln λ_t = −slope·Δ_t.

    Mamba-2's scalar decay exp(−A·Δ_t) (arXiv 2405.21060, section 7; GLA, arXiv 2312.06635, gates every channel). It
    starts at Δ = 1, the fixed decay of the schedule.

    Parameters, fp32:
        weight `[Hs, M]`: W, starts at 0.
        bias `[Hs]`: b, starts at ln(e − 1).
    """

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(states, width))
        self.bias = nn.Parameter(torch.full((states,), math.log(math.e - 1)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Δ for inputs `[B, T, M]`: `[B, T, Hs]` in fp32 (fp64 for fp64), also under autocast: it is summed over T."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with _no_autocast(hidden):
            return F.softplus(F.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype)))


class OutputGate(nn.Module):
    """Factor 2σ(W x_t) of the output, one per head or per channel; starts at 1.

    Source: Gated Attention, arXiv 2505.06708 (headwise and elementwise, from the layer's input), as in
    Qwen3-Next, MiniMax-01 (arXiv 2501.08313) and HALO (arXiv 2601.22156). The 2 keeps the output at the start the
    same; published gates start at random, which scrambles the output of a converted layer.

    Parameters, fp32:
        weight `[H·C, M]`: W, starts at 0; C is 1 or Dv.
    """

    def __init__(self, width: int, heads: int, channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.zeros(heads * channels, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The factor for inputs `[B, T, M]`: `[B, T, H, C]` in the dtype of the inputs."""
        z = F.linear(hidden, self.weight.to(hidden.dtype))
        return 2 * z.view(*hidden.shape[:2], self.heads, -1).sigmoid()


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    # The meta device knows none; asking torch.amp which do would break a compiled graph in two.
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
