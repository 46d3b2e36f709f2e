"""What the trained stages minimise: losses of whole models, on the pure functions of `losses`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from .attention import AttentionCall, LightningSwap, observing
from .errors import UnsupportedModelError
from .losses import Head, chunked_kl, normalized_mse
from .modeling import MODEL_TYPE_PREFIX
from .recipe import DistillStage


def align_loss(model: Any, ids: torch.Tensor, *, amp: bool = False, recompute: bool = False) -> torch.Tensor:
    """Mean over swapped layers of the normalised squared error of the attention output, on the teacher's inputs.

    One model: every layer returns its own softmax output to the next, and the swap's output is compared with it.

    Args:
        model: the student.
        ids: `[B, T]`.
        amp: bf16 autocast.
        recompute: compute the swaps again in the backward pass rather than keep what is between.
    """
    losses: list[torch.Tensor] = []

    def compare(swap: LightningSwap, call: AttentionCall, target: torch.Tensor) -> None:
        output = recomputed(swap, call, use_reentrant=False) if recompute else swap(call)
        losses.append(normalized_mse(output, target.view(output.shape)))

    with observing(model, compare), torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return torch.stack(losses).mean()


def distill_loss(
    model: Any, ids: torch.Tensor, *, stage: DistillStage, teacher: Any | None, amp: bool = False
) -> torch.Tensor:
    """Mean over tokens of KL(teacher ‖ student) on full-vocabulary logits, chunked over tokens.

    Args:
        model: the student.
        ids: `[B, T]`.
        stage: temperature and chunk size.
        teacher: a separate model, or None for the student's own weights with softmax attention.
        amp: bf16 autocast.
    """
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        with torch.no_grad(), observing(model, lambda *_: None) if teacher is None else contextlib.nullcontext():
            target = hidden_states(teacher or model, ids)
        student = hidden_states(model, ids)
        return chunked_kl(
            student,
            target,
            logits_head(model),
            logits_head(teacher or model),
            temperature=stage.temperature,
            chunk=stage.chunk,
        )


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[B, T, ·]`, before the output embedding."""
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def logits_head(model: Any) -> Head:
    """From last hidden states to logits, with the scales and soft caps that some families put behind the matrix."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0  # granite
    factor = getattr(config, "logit_scale", None) or 1.0  # cohere

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model.get_output_embeddings()(hidden) * (factor / divisor)
        return cap * torch.tanh(logits / cap) if cap else logits

    return head


@torch.no_grad()
def check_head(model: Any) -> None:
    """Make sure that `logits_head` says what the model itself says.

    Raises:
        UnsupportedModelError: the family does something else between hidden states and logits.
    """
    ids = torch.arange(8, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    found = logits_head(model)(hidden_states(model, ids)).float()
    if (found - own).norm() > 1e-2 * own.norm():
        kind = str(model.config.model_type).removeprefix(MODEL_TYPE_PREFIX)
        raise UnsupportedModelError(f"model type {kind!r} scales its logits in a way that `distill` does not know")
