"""What a stage trains, how fast, and along which schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import swaps
from .errors import RecipeError
from .stages import OWN_GROUPS, DistillStage, TrainStage

# The first part of a parameter's name inside a swap.
_NEW_GROUPS = {
    "log_slope": "decay",
    "q_map": "feature_map",
    "k_map": "feature_map",
    "mix": "mix",
    "mix_query": "mix",
    "mix_sum": "mix",
    "merge": "mix",
    "merge_query": "mix",
    "shift": "mix",
    "shift_query": "mix",
    "out_scale": "scale",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
    "decay_gate": "gates",
    "output_gate": "gates",
}


def grouping(model: nn.Module) -> Callable[[str], str]:
    """A function from a parameter's name to its group in a recipe's `learning_rates`.

    New parameters: `decay` (slopes), `feature_map`, `mix` (share of the local branch), `scale` (of the linear branch),
    `qk_norm` (gains), `gates` (of decay and output). The teacher's own: `attention` (all of the attention modules,
    kept softmax ones too), `embeddings` (input and output, tied or not), `norms` (outside attention), `mlp` (whatever
    else there is, such as experts and routers). `lora`: the adapters.
    """
    numbers = {re.sub(r"\d+", r"\\d+", re.escape(path)) for path in swaps(model)}
    attention = re.compile(rf"(?:{'|'.join(sorted(numbers)) or '(?!)'})\.")  # not self_attn_layer_norm
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
        for parameter in module.parameters()
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}

    def group(name: str) -> str:
        owner, _, rest = name.partition(".swap.")
        if rest:
            return _NEW_GROUPS[rest.partition(".")[0]]
        if ".lora_" in name:
            return "lora"
        if id(parameters[name]) in embeddings:
            return "embeddings"
        if attention.match(owner):
            return "attention"
        return "norms" if name.rpartition(".")[0] in norms else "mlp"

    return group


def _rate(stage: TrainStage, group: str) -> float:
    default = stage.backbone_learning_rate if group in OWN_GROUPS else stage.learning_rate
    return dict(stage.learning_rates).get(group, default)  # type: ignore[call-overload, no-any-return]


def trainable_parameters(model: nn.Module, stage: TrainStage, title: str = "stage") -> tuple[list[str], list[str]]:
    """Mark what a stage trains; returns the names of the new and of the other trainable parameters.

    `new` is every parameter of the swaps, but slopes that are not learnable; `attention` adds the rest of the
    attention modules that were swapped; `all` everything; `lora` the adapters, where the model has any. Whatever has a
    learning rate of 0 is left out, and everything new where the stage trains the window alone.

    Raises:
        RecipeError: a group of `learning_rates` has no parameter that the stage could train.
    """
    owners = tuple(f"{path}." for path in swaps(model))
    fixed = {f"{path}.swap.log_slope" for path, swap in swaps(model).items() if not swap.learnable_decay}
    group_of = grouping(model)
    new: list[str] = []
    own: list[str] = []
    groups = {"lora"} if stage.train == "lora" else set()  # before they are there
    for name, parameter in model.named_parameters():
        group = group_of(name)
        wanted = name not in fixed and not (isinstance(stage, DistillStage) and stage.branch == "local")
        if group in OWN_GROUPS:
            attention = stage.train == "attention" and name.startswith(owners)
            wanted = (group == "lora") if stage.train == "lora" else stage.train == "all" or attention
        groups |= {group} if wanted else set()
        wanted = wanted and _rate(stage, group) > 0
        parameter.requires_grad_(wanted)
        if wanted:
            (own if group in OWN_GROUPS else new).append(name)
    unknown = sorted(stage.learning_rates.keys() - groups)
    if unknown:
        raise RecipeError(
            f"distill.stages.{title}.learning_rates.{unknown[0]}: the stage trains no such parameter of this model; "
            f"there are: {', '.join(sorted(groups))}"
        )
    return new, own


def build_optimizer(model: nn.Module, stage: TrainStage, new: list[str], own: list[str]) -> torch.optim.AdamW:
    """AdamW with a parameter group for each learning rate."""
    parameters, group_of = dict(model.named_parameters()), grouping(model)
    groups: dict[float, list[nn.Parameter]] = {}
    for name in (*new, *own):
        groups.setdefault(_rate(stage, group_of(name)), []).append(parameters[name])
    fused = all(parameter.is_cuda for group in groups.values() for parameter in group)
    settings: list[dict[str, Any]] = [{"params": group, "lr": rate} for rate, group in groups.items()]
    return torch.optim.AdamW(settings, betas=stage.betas, weight_decay=stage.weight_decay, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, stage: TrainStage) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, or along a line or a cosine down to `final_learning_rate` of the peak."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(stage, step))


def _factor(stage: TrainStage, step: int) -> float:
    warmup, final = max(1, round(stage.warmup * stage.steps)), stage.final_learning_rate
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(1, stage.steps - warmup), 1.0)
    fall = {"constant": 0.0, "linear": progress, "cosine": 0.5 - 0.5 * math.cos(math.pi * progress)}
    return 1 - (1 - final) * fall[stage.scheduler]
