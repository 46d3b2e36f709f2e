"""Feature maps φ of the linear branch, applied to queries and keys before `lightning_attention`.

A file of the checkpoint runtime: it imports torch only, so that a saved checkpoint can carry a copy of it.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Identity(nn.Module):
    """φ(x) = x (HALO, arXiv 2601.22156; Lightning Attention-2 without activation). `[B, T, H, D] -> [B, T, H, D]`."""

    expansion = 1  # features of each dimension

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.out_dim = self.expansion * dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x unchanged."""
        return x


class SiLU(Identity):
    """φ(x) = x·σ(x), elementwise (TransNormerLLM, arXiv 2405.17381, section 3; MiniMax-01, arXiv 2501.08313)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.silu(x)


class EluPlusOne(Identity):
    """φ(x) = elu(x) + 1 > 0, elementwise (Katharopoulos et al., arXiv 2006.16236, section 3.2.1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.elu(x) + 1


class ReLU(Identity):
    """φ(x) = max(x, 0), elementwise (cosFormer, arXiv 2202.08791). `[B, T, H, D] -> [B, T, H, D]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.relu(x)


class Exp(Identity):
    """φ(x) = exp(x), elementwise (compared in Hedgehog, arXiv 2402.04347).

    Arguments above 10 are cut to 10: exp(10) = 22026 is what fp16 can still hold.
    """

    largest = 10.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return x.clamp(max=self.largest).exp()


class SoftmaxFeatures(Identity):
    """φ(x) = softmax(x) over the feature dimension (Liger, arXiv 2503.01496; Efficient Attention, arXiv 1812.01243)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]`; the features of a head sum to one."""
        return x.softmax(dim=-1, dtype=torch.float32).to(x.dtype)


class Hedgehog(nn.Module):
    """φ(x) = softmax([xW, −xW]) with one learned D×D matrix per head (arXiv 2402.04347; LoLCATs, arXiv 2410.10254).

    `[B, T, H, D] -> [B, T, H, 2D]`. W starts as `gain` times the identity; the gain sharpens the features.
    """

    expansion = 2
    gain = 2.0

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.out_dim = self.expansion * dim
        self.weight = nn.Parameter(torch.eye(dim).mul(self.gain).repeat(heads, 1, 1))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """What the features are the softmax of, `[B, T, H, D]`."""
        return torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]`; the features of a head sum to one."""
        y = self.project(x)
        return torch.cat((y, -y), dim=-1).softmax(dim=-1, dtype=torch.float32).to(x.dtype)


class HedgehogMLP(Hedgehog):
    """Hedgehog of y = xW + silu(xA)B: two more layers per head, D -> 2D -> D, B = 0 at the start.

    `[B, T, H, D] -> [B, T, H, 2D]`. A linear map in front of a softmax imitates sharp attention badly; MLPs as feature
    maps are in Hedgehog's section 3 (arXiv 2402.04347) and LoLCATs' code.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads, dim)
        # Rows of a cosine transform: orthogonal, of the size of random ones, and the same in every conversion.
        angle = torch.arange(0.5, dim)[:, None] * torch.arange(0.5, 2 * dim) * (math.pi / (2 * dim))
        self.up = nn.Parameter((angle.cos() * (2 / dim) ** 0.5).repeat(heads, 1, 1))
        self.down = nn.Parameter(torch.zeros(heads, 2 * dim, dim))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """What the features are the softmax of, `[B, T, H, D]`."""
        hidden = F.silu(torch.einsum("bthd,hdf->bthf", x, self.up.to(x.dtype)))
        return super().project(x) + torch.einsum("bthf,hfd->bthd", hidden, self.down.to(x.dtype))


class T2R(nn.Module):
    """φ(x) = max(xW + b, 0) with one learned D×D matrix and bias per head (T2R, Kasai et al., arXiv 2103.13076).

    `[B, T, H, D] -> [B, T, H, D]`. W starts as the identity and b as 0, so that the map starts as ReLU.
    """

    expansion = 1

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.out_dim = self.expansion * dim
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]`."""
        y = torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))
        return F.relu(y + self.bias.to(x.dtype))


FEATURE_MAPS: dict[str, type[Identity] | type[Hedgehog] | type[T2R]] = {
    "identity": Identity,
    "silu": SiLU,
    "elu1": EluPlusOne,
    "relu": ReLU,
    "exp": Exp,
    "softmax": SoftmaxFeatures,
    "hedgehog": Hedgehog,
    "hedgehog_mlp": HedgehogMLP,
    "t2r": T2R,
}
