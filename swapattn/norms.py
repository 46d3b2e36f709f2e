"""RMS norms of the linear branch: of queries and keys before the feature map, of the output after the sum.

A file of the checkpoint runtime: it imports torch only, so that a saved checkpoint can carry a copy of it.
"""

from __future__ import annotations

import torch
from torch import nn

RMS_EPS = 1e-6


def rms_normalized(x: torch.Tensor, dims: tuple[int, ...] = (-1,)) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) over `dims`, computed in fp32 or better, in the dtype of x.

    Source: Zhang and Sennrich, arXiv 1910.07467; without a weight it is TransNormer's SRMSNorm (arXiv 2405.17381).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + RMS_EPS)).to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm of each head with one gain per head: `[B, T, H, D] -> [B, T, H, D]`, of norm gain·√D.

    As HALO (arXiv 2601.22156) adds it to teachers without q/k norm. The gain is one number per head, not per channel:
    the rotary embedding is in q and k already, and only a gain that is equal in all channels commutes with it.

    Parameters, fp32:
        gain `[H]`: starts at 1; `calibrate` sets it so that the mean norm of the teacher's heads is kept.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[B, T, H, D]` over D."""
        return (rms_normalized(x) * self.gain[:, None]).to(x.dtype)


OUTPUT_NORM_DIMS: dict[str, tuple[int, ...]] = {"rms": (-1,), "rms_all": (-2, -1)}
"""Dimensions of `[B, T, H, Dv]` that an output norm averages over: each head by itself (as RetNet's group norm,
arXiv 2307.08621), or all heads together (TransNormer, arXiv 2405.17381; MiniMax-01, arXiv 2501.08313;
HALO, arXiv 2601.22156)."""
