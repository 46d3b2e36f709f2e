"""What an attention module is called with and its attention function is not: its input and its rotary embedding.

A file of the checkpoint runtime: it imports torch only, so that a saved checkpoint can carry a copy of it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Rotary = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[..., Any]


class LayerInputs(NamedTuple):
    """Input `[B, T, M]` of an attention module, and cos and sin of its rotary embedding; None where not found."""

    hidden: torch.Tensor | None
    rotary: Rotary | None


def layer_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerInputs:
    """Read the arguments of an attention module's forward."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        hidden = None
    return LayerInputs(hidden, next(filter(_is_rotary, (*args, *kwargs.values())), None))


def _is_rotary(value: Any) -> bool:
    """Whether an argument is the pair (cos, sin), whatever its name."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in value)
        and value[0].shape == value[1].shape
    )


def rotation_of(module: nn.Module) -> Rotate | None:
    """The function (q, k, cos, sin) -> (q, k) by which the model's own file rotates `[B, H, T, D]`, or None."""
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)
    if names[:4] == ["q", "k", "cos", "sin"]:
        return function  # type: ignore[no-any-return]
    return functools.partial(_one_by_one, function) if names[:3] == ["x", "cos", "sin"] else None


def _one_by_one(rotate: Rotate, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
    return rotate(q, cos, sin, unsqueeze_dim=1), rotate(k, cos, sin, unsqueeze_dim=1)


def unrotated(rotate: Rotate, dims: int, q: torch.Tensor, k: torch.Tensor, rotary: Rotary) -> Rotary:
    """Queries and keys before their rotary embedding (arXiv 2104.09864), by the inverse rotation.

    Args:
        rotate: the model's own rotation (see `rotation_of`), so that its layout of pairs is the right one.
        dims: leading dimensions that the model hands to it.
        q, k: `[B, H, T, D]`, rotated.
        rotary: cos and sin `[B or 1, T, R]`; a length other than 1 (scaled embeddings, as YaRN's) is undone too.
    """
    cos, sin = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in rotary)
    power = cos.square() + sin.square()
    first_q, first_k = (x[..., :dims].to(torch.promote_types(x.dtype, cos.dtype)) for x in (q, k))
    first_q, first_k = rotate(first_q, first_k, cos / power, -sin / power)
    return torch.cat((first_q.to(q.dtype), q[..., dims:]), -1), torch.cat((first_k.to(k.dtype), k[..., dims:]), -1)


class NoRotary(nn.Module):
    """Takes the rotary embedding away from a kept softmax layer: NoPE, as in HALO (arXiv 2601.22156).

    It sits in the attention module as `nope` and has no parameters. Not active while the model is its own teacher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = True


def drop_rotary(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a module with a `nope`: rotate by nothing (cos = 1, sin = 0)."""
    if not module.nope.active:
        return None

    def still(value: Any) -> Any:
        return (torch.ones_like(value[0]), torch.zeros_like(value[1])) if _is_rotary(value) else value

    return tuple(map(still, args)), {name: still(value) for name, value in kwargs.items()}
