"""Arithmetic of a training step, and what share of the hardware's peak a measured speed is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .swap import LightningSwap

# Dense bf16 tensor-core FLOP/s, from the vendor's data sheets, by what the device's name holds; the first match counts.
PEAK_BF16 = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("A10G", 70e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name, None when it is not known."""
    return next((peak for part, peak in PEAK_BF16 if part in device_name), None)


def forward_flops(model: nn.Module, length: int) -> dict[str, float] | None:
    """FLOPs per token of one forward pass, two for a multiplication and addition, by part of the model.

    Args:
        model: a causal language model, swapped or not.
        length: tokens in a sequence; causal softmax looks back on half of them on average.

    Returns:
        `matrices` (linear layers but the output embedding and the swaps), `head` (output embedding), `softmax` (all
        layers with softmax attention), `kept` (those that are not swapped) and `swap` (the swapped layers' own work,
        in the recurrent form: a chunked kernel computes more than that); None for models with fused experts, of
        which a token uses only some.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    swaps = {name: module for name, module in model.named_modules() if isinstance(module, LightningSwap)}
    inner = {id(part) for swap in swaps.values() for part in swap.modules()}
    total = 0.0
    for module in model.modules():
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) and id(module) not in inner:
            return None
        if isinstance(module, nn.Linear | Conv1D) and module is not head and id(module) not in inner:
            total += 2 * module.weight.numel()
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softmax = 4 * config.num_attention_heads * width * length / 2
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {
        "matrices": total,
        "head": 2.0 * head.weight.numel(),
        "softmax": softmax * config.num_hidden_layers,
        "kept": softmax * (config.num_hidden_layers - len(swaps)),
        "swap": sum(_swap_flops(swap, kv_heads) for swap in swaps.values()),
    }


def _swap_flops(swap: LightningSwap, kv_heads: int) -> float:
    heads, value_dim = swap.out_scale.shape
    features = int(swap.q_map.out_dim)
    maps = sum(2.0 * p.numel() for p in swap.parameters() if p.dim() >= 2 and p is not swap.out_scale)
    linear = 2.0 * features * value_dim * (heads + kv_heads)
    local = 4.0 * heads * value_dim * (swap.window + swap.sinks)
    return local if swap.branch == "local" else maps + linear + local


def step_flops(
    kind: str, flops: Mapping[str, float] | None, teacher: Mapping[str, float] | None = None
) -> float | None:
    """FLOPs per token of a training step; a backward pass counts twice its forward, recomputation not at all.

    Args:
        kind: "align" (teacher's body forward, the swaps forward and backward), "distill" (teacher forward, student
            forward and backward) or "finetune" (the unswapped model forward and backward).
        flops: of the model's forward pass, see `forward_flops`; None gives None.
        teacher: of the teacher's forward pass in "distill", empty without a teacher; None gives None.
    """
    if flops is None or (kind == "distill" and teacher is None):
        return None
    body = flops["matrices"] + flops["softmax"]
    if kind == "align":
        return body + 3 * flops["swap"]
    if kind == "finetune":
        return 3 * (body + flops["head"])
    taught = sum((teacher or {}).get(part, 0.0) for part in ("matrices", "head", "softmax"))
    return taught + 3 * (flops["matrices"] + flops["head"] + flops["kept"] + flops["swap"])


def share_of_peak(tokens_per_second: float, flops_per_token: float | None, device: str) -> float | None:
    """Share of the peak of the GPU that `device` names, None on CPUs and where something is not known."""
    if flops_per_token is None or not device.startswith("cuda"):
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return tokens_per_second * flops_per_token / peak if peak else None
