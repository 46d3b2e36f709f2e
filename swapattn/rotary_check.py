"""Whether, and how, the rotary embedding of a model's attention layers can be undone: tried out, not looked up.

Each kind of attention module is run by itself on the CPU with random weights, once with a rotation and once without.
The inverse rotation of the first must give the second. That is known for no list of families, but for this model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .audit import quadratic_sites
from .errors import UnsupportedModelError
from .inputs import Rotary, layer_inputs, rotation_of, unrotated

CAPTURE = "swapattn_capture"
LENGTH = 7


def rotary_dims(config: Any, swapped: Iterable[str], kept: Iterable[str] = ()) -> dict[str, int]:
    """Leading dimensions of queries and keys that each attention module rotates, 0 for one that does not.

    Args:
        config: of a causal LM.
        swapped: paths of the modules whose rotation is to be undone.
        kept: paths of the modules that are to be called with a rotation by nothing; only looked at.

    Raises:
        UnsupportedModelError: a module is not handed (cos, sin), or the inverse rotation does not give back what it
            rotated.
    """
    captured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def capture(_: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, **___: Any) -> Any:
        captured.append((q, k))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    AttentionInterface.register(CAPTURE, capture)
    AttentionMaskInterface.register(CAPTURE, lambda *args, **kwargs: None)
    with torch.device("meta"):  # in bf16, the only dtype that fused experts multiply in there
        config = type(config).from_dict(config.to_dict())
        model = AutoModelForCausalLM.from_config(config, attn_implementation=CAPTURE, dtype=torch.bfloat16)
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    swapped, kept = list(swapped), list(kept)
    for path in (*swapped, *kept):
        keep = lambda _m, args, kwargs, path=path: inputs.update({path: (args, kwargs)})  # noqa: E731 - binds path
        model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    quadratic_sites(model, length=LENGTH, device="meta")
    if any(layer_inputs(*inputs[path]).rotary is None for path in (*swapped, *kept)):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} hands no rotary embedding to its attention modules: convert.rope cannot "
            "drop it"
        )
    found: dict[Any, int | None] = {}
    for path in swapped:
        module = model.get_submodule(path)
        kind = _kind(module)
        if kind not in found:
            try:
                found[kind] = _tried(module, inputs[path], captured)
            except Exception:  # whatever the code of a family raises when one module of it runs by itself
                found[kind] = None
        if found[kind] is None:
            raise UnsupportedModelError(
                f"model type {config.model_type!r}: the rotary embedding of {path} cannot be undone; leave convert."
                "rope.linear at keep"
            )
    return {path: found[_kind(model.get_submodule(path))] or 0 for path in swapped}


def _kind(module: nn.Module) -> Any:
    """What tells attention modules of a model apart in how they rotate: class and settings, without the index."""
    plain = (bool, int, float, str, type(None))
    settings = {name: v for name, v in vars(module).items() if isinstance(v, plain) and name != "layer_idx"}
    layer_types = getattr(module.config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    layer_type = layer_types[index] if layer_types and isinstance(index, int) and index < len(layer_types) else None
    return type(module), layer_type, tuple(sorted(settings.items(), key=lambda item: item[0]))


@torch.no_grad()
def _tried(module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], captured: list[Any]) -> int | None:
    """Leading dimensions that one module rotates, or None when its rotation cannot be undone."""
    trial = copy.deepcopy(module).float().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*trial.parameters(), *trial.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    angle = torch.rand(1, LENGTH, 1, generator=generator) * 3
    real = (angle.cos(), angle.sin())
    hidden = torch.randn(1, LENGTH, _width(inputs), generator=generator)
    q, k = _run(trial, inputs, hidden, real, captured)
    still_q, still_k = _run(trial, inputs, hidden, (torch.ones_like(angle), torch.zeros_like(angle)), captured)
    if _near(q, still_q) and _near(k, still_k):
        return 0
    rotate, rotary = rotation_of(module), layer_inputs(*inputs).rotary
    if rotate is None or rotary is None:
        return None
    width = rotary[0].shape[-1]
    for dims in (q.shape[-1], width):
        try:
            back_q, back_k = unrotated(rotate, dims, q, k, _expanded(real, width))
        except RuntimeError:  # shapes that do not fit
            continue
        if _near(back_q, still_q) and _near(back_k, still_k):
            return int(dims)
    return None


def _width(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    hidden = layer_inputs(*inputs).hidden
    assert hidden is not None
    return hidden.shape[-1]


def _expanded(rotary: Rotary, width: int) -> Rotary:
    cos, sin = (x.expand(-1, -1, width) for x in rotary)
    return cos, sin


def _run(
    module: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    hidden: torch.Tensor,
    rotary: Rotary,
    captured: list[Any],
) -> Any:
    """Queries and keys of a module that is called as the model calls it, with other values."""
    found = layer_inputs(*inputs)

    def value(old: Any) -> Any:
        if old is found.hidden and old is not None:
            return hidden
        if old is found.rotary and old is not None:
            return _expanded(rotary, old[0].shape[-1])
        return torch.zeros_like(old, device="cpu") if isinstance(old, torch.Tensor) else old

    args, kwargs = inputs
    module(*map(value, args), **{name: value(x) for name, x in kwargs.items()})
    return captured.pop()


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())
