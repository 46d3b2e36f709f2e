"""`torch.compile` of a model's decoder layers, one by one: what repeats is compiled once, hooks stay outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import processes
from .objectives import LayerError, align_loss, layer_error
from .stages import AlignStage
from .swap import LightningSwap


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


def compiled_error(backend: str | Callable[..., Any] = "inductor") -> LayerError:
    """`objectives.layer_error` compiled for static shapes, one function for all layers: the compiled form of align."""
    compiled: LayerError = torch.compile(layer_error, dynamic=False, backend=backend)
    return compiled


def align_function(stage: AlignStage, *, amp: bool) -> Callable[..., torch.Tensor]:
    """`objectives.align_loss` as the stage wants it; with `compile` the layers' errors are what is compiled.

    Not where the swaps are sharded: what gathers them would be inside the compiled function.
    """
    error = compiled_error() if stage.compile and not processes.sharded() else layer_error
    return functools.partial(align_loss, amp=amp, recompute=stage.gradient_checkpointing, error=error)


def _forward(
    layer: nn.Module, compiled: Callable[..., Any], swaps: list[LightningSwap], /, *args: Any, **kwargs: Any
) -> Any:
    observed = any(swap.observer is not None for swap in swaps)
    kind: Any = type(layer)
    return (kind.forward if observed else compiled)(layer, *args, **kwargs)
