"""Named decay schedules: the slope s ≥ 0 of each head, λ = exp(−s) per token.

Three different schedules are called "lightning" in the wild; each has its own name here, and a converted
checkpoint stores the numbers.
"""

from __future__ import annotations

import math

import torch


def decay_slopes(schedule: str, heads: int, layer: int, layers: int) -> torch.Tensor:
    """Slopes of one layer under a named schedule.

    Args:
        schedule: `alibi` 2^(−8(h+1)/H), the OpenNLPLab code and HALO (arXiv 2601.22156); `minimax` the same times
            1 − l/(L−1) + 1e-5 (arXiv 2501.08313 and transformers); `transnormer` (8h/H)(1 − l/L) with h from 1
            (arXiv 2405.17381, section 3.1; Lightning Attention-2, arXiv 2401.04658); `retnet` −ln(1 − 2^(−5−h))
            (arXiv 2307.08621, section 2.2); `none` 0, plain linear attention.
        heads: H, number of decays of the layer.
        layer: l, index of the layer from 0.
        layers: L, number of layers of the model.

    Returns:
        fp32 `[heads]`, in units of 1/token.

    Raises:
        ValueError: unknown schedule.
    """
    h = torch.arange(heads, dtype=torch.float64)
    alibi = torch.exp2(-8 * (h + 1) / heads)
    match schedule:
        case "alibi":
            slopes = alibi
        case "minimax":
            slopes = alibi * (1 - layer / max(layers - 1, 1) + 1e-5)
        case "transnormer":
            slopes = 8 * (h + 1) / heads * (1 - layer / layers)
        case "retnet":
            slopes = -torch.log1p(-torch.exp2(-5 - h))
        case "none":
            slopes = torch.zeros_like(h)
        case _:
            raise ValueError(f"unknown decay schedule {schedule!r}")
    return slopes.float()


def slope_of_distance(distance: torch.Tensor) -> torch.Tensor:
    """Slope whose half-life is a given distance in tokens: ln 2 / distance, clamped to [0.001, 5].

    Source: Taylor-Calibrate, arXiv 2606.16429.
    """
    return (math.log(2) / distance).clamp(0.001, 5.0)
