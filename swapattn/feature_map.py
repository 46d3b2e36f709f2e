"""Feature maps φ of the linear branch, applied to queries and keys before `lightning_attention`.

A file of the checkpoint runtime: it imports torch and its neighbours only, so that a saved checkpoint can carry a copy.

A map of `branches` linear branches makes features for each of them, one branch after another: `[B, T, H, D]` in,
`[B, T, branches·H, ·]` out. `scale` is a factor of x.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

try:
    from lightning_attention import hedgehog_features
except ImportError:  # inside a saved checkpoint, where the plain PyTorch form lies beside this file
    from .features import hedgehog_features  # type: ignore[no-redef, import-untyped]


class Identity(nn.Module):
    """φ(x) = x (HALO, arXiv 2601.22156; Lightning Attention-2 without activation). `[B, T, H, D] -> [B, T, H, D]`."""

    expansion = 1  # features of each dimension

    def __init__(self, heads: int, dim: int, branches: int = 1) -> None:
        super().__init__()
        self.branches = branches
        self.out_dim = self.expansion * dim

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The features of all branches."""
        x = x * scale
        return self.features(x if self.branches == 1 else x.repeat(1, 1, self.branches, 1))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return x unchanged."""
        return x


class SiLU(Identity):
    """φ(x) = x·σ(x), elementwise (TransNormerLLM, arXiv 2405.17381, section 3; MiniMax-01, arXiv 2501.08313)."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.silu(x)


class EluPlusOne(Identity):
    """φ(x) = elu(x) + 1 > 0, elementwise (Katharopoulos et al., arXiv 2006.16236, section 3.2.1)."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.elu(x) + 1


class ReLU(Identity):
    """φ(x) = max(x, 0), elementwise (cosFormer, arXiv 2202.08791). `[B, T, H, D] -> [B, T, H, D]`."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return F.relu(x)


class Exp(Identity):
    """φ(x) = exp(x), elementwise (compared in Hedgehog, arXiv 2402.04347).

    Arguments above 10 are cut to 10: exp(10) = 22026 is what fp16 can still hold.
    """

    largest = 10.0

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]` elementwise."""
        return x.clamp(max=self.largest).exp()


class SoftmaxFeatures(Identity):
    """φ(x) = softmax(x) over the feature dimension (Liger, arXiv 2503.01496; Efficient Attention, arXiv 1812.01243)."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]`; the features of a head sum to one."""
        return x.softmax(dim=-1, dtype=torch.float32).to(x.dtype)


class Hedgehog(nn.Module):
    """φ(x) = softmax([xW, −xW]) with one learned D×D matrix per head (arXiv 2402.04347; LoLCATs, arXiv 2410.10254).

    `[B, T, H, D] -> [B, T, H, 2D]`. W starts as `gain` times the identity; the gain sharpens the features.
    """

    expansion = 2
    gain = 2.0

    def __init__(self, heads: int, dim: int, branches: int = 1) -> None:
        super().__init__()
        self.out_dim = self.expansion * dim
        self.weight = nn.Parameter(torch.eye(dim).mul(self.gain).repeat(branches * heads, 1, 1))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The features of all branches; those of a head sum to one."""
        return hedgehog_features(x, self.weight, scale=scale)


class HedgehogMLP(Hedgehog):
    """Hedgehog of y = xW + silu(xA)B: two more layers per head, D -> 2D -> D, B = 0 at the start.

    `[B, T, H, D] -> [B, T, H, 2D]`. A linear map in front of a softmax imitates sharp attention badly; MLPs as feature
    maps are in Hedgehog's section 3 (arXiv 2402.04347) and LoLCATs' code.
    """

    def __init__(self, heads: int, dim: int, branches: int = 1) -> None:
        super().__init__(heads, dim, branches)
        # Rows of a cosine transform: orthogonal, of the size of random ones, and the same in every conversion.
        angle = torch.arange(0.5, dim)[:, None] * torch.arange(0.5, 2 * dim) * (math.pi / (2 * dim))
        self.up = nn.Parameter((angle.cos() * (2 / dim) ** 0.5).repeat(branches * heads, 1, 1))
        self.down = nn.Parameter(torch.zeros(branches * heads, 2 * dim, dim))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The features of all branches; those of a head sum to one."""
        return hedgehog_features(x, self.weight, self.up, self.down, scale=scale)


class T2R(Identity):
    """φ(x) = max(xW + b, 0) with one learned D×D matrix and bias per head (T2R, Kasai et al., arXiv 2103.13076).

    `[B, T, H, D] -> [B, T, H, D]`. W starts as the identity and b as 0, so that the map starts as ReLU.
    """

    def __init__(self, heads: int, dim: int, branches: int = 1) -> None:
        super().__init__(heads, dim, branches)
        self.weight = nn.Parameter(torch.eye(dim).repeat(branches * heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(branches * heads, dim))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, H, D]`."""
        y = torch.einsum("bthd,hdf->bthf", x, self.weight.to(x.dtype))
        return F.relu(y + self.bias.to(x.dtype))


FEATURE_MAPS: dict[str, type[Identity] | type[Hedgehog]] = {
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
