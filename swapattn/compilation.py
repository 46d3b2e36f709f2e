"""`torch.compile` of a model's decoder layers, one by one: what repeats is compiled once, hooks stay outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import LightningSwap


@contextmanager
def compiled_layers(*models: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Run the decoder layers of the models compiled, for static shapes, while the context is open.

    A layer whose swap is observed (align, and a teacher that is the student's own weights) runs as it is: what the
    observer does is no part of the model. One compiled function serves all layers of a class.

    Args:
        models: transformers models; names of parameters and saved files stay what they are.
        backend: of `torch.compile`.
    """
    layers = [part for model in models for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    kinds: set[Any] = set(map(type, layers))
    compiled = {kind: torch.compile(kind.forward, dynamic=False, backend=backend) for kind in kinds}
    for layer in layers:
        swaps = [part for part in layer.modules() if isinstance(part, LightningSwap)]
        layer.forward = functools.partial(_forward, layer, compiled[type(layer)], swaps)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(
    layer: nn.Module, compiled: Callable[..., Any], swaps: list[LightningSwap], /, *args: Any, **kwargs: Any
) -> Any:
    observed = any(swap.observer is not None for swap in swaps)
    kind: Any = type(layer)
    return (kind.forward if observed else compiled)(layer, *args, **kwargs)
