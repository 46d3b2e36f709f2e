"""LoRA by peft: adapters put into a model, switched off for its teacher, and merged into its weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention import swaps
from .errors import RecipeError
from .sharding import as_shard_of, whole
from .stages import TrainStage

ADAPTER = "default"  # peft's name for the one that it is given


def target_paths(model: Any, stage: TrainStage, key: str = "stage") -> list[str]:
    """Paths of the matrices that get an adapter, in a model without any.

    By default these are all matrices of the attention modules that were swapped, whatever a family calls or fuses.
    `key` is the stage's in `--set distill.stages.KEY`.

    Raises:
        RecipeError: a target of the recipe is no matrix of the model.
    """
    head = model.get_output_embeddings()
    matrices = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".swap." not in path and module is not head
    ]
    if stage.lora.targets is None:
        owners = tuple(f"{path}." for path in swaps(model))
        return [path for path in matrices if path.startswith(owners)]
    endings = tuple(f".{target}" for target in stage.lora.targets)
    for target, ending in zip(stage.lora.targets, endings, strict=True):
        if not any(path.endswith(ending) for path in matrices):
            there = ", ".join(sorted({path.rpartition(".")[2] for path in matrices}))
            raise RecipeError(f"distill.stages.{key}.lora.targets: no matrix {target!r}; there are: {there}")
    return [path for path in matrices if path.endswith(endings)]


def inject_(model: nn.Module, stage: TrainStage, *, seed: int = 0, key: str = "stage") -> None:
    """Give a model the stage's adapters, in fp32 on the devices of their matrices; B starts at 0."""
    import peft

    targets = target_paths(model, stage, key)
    config = peft.LoraConfig(r=stage.lora.rank, lora_alpha=stage.lora.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it itself, for each matrix
        torch.manual_seed(seed)  # every process starts with the same
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute without the adapters, if there are any, while the context is open.

    peft's own switch also freezes and thaws the parameters, which sharded ones do not take.
    """
    adapted = _adapted(model).values()
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in adapted:
            module._disable_adapters = False


@torch.no_grad()
def merge_(model: nn.Module) -> list[str]:
    """Add the adapters, if there are any, to their matrices in the dtype of these, and take them out.

    Returns:
        Names of the weights that changed.
    """
    adapted = _adapted(model)
    for path, module in adapted.items():
        base = module.get_base_layer()
        for half in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
            half.weight = nn.Parameter(whole(half.weight), requires_grad=False)
        base.weight += as_shard_of(base.weight, module.get_delta_weight(ADAPTER))
        model.set_submodule(path, base)
    vars(model).pop("peft_config", None)  # or peft warns of those of the next stage
    return [f"{path}.weight" for path in adapted]
