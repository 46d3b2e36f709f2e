"""What the trained stages minimise: losses of whole models, on the pure functions of `losses`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from .attention import observing, only_branch
from .call import AttentionCall
from .data import SHORTEST, boundaries
from .errors import UnsupportedModelError
from .lora import adapters_off
from .losses import Mixture, OutputEmbedding, TopK, linear_loss, normalized_mse
from .modeling import MODEL_TYPE_PREFIX
from .peak import forward_flops, step_flops
from .stages import AlignStage, CalibrateStage, DistillStage, Stage, TrainStage
from .swap import LightningSwap

LayerError = Callable[[LightningSwap, AttentionCall, torch.Tensor], torch.Tensor]


def layer_error(swap: LightningSwap, call: AttentionCall, target: torch.Tensor) -> torch.Tensor:
    """`normalized_mse` of one swapped layer on the teacher's inputs and its attention output `[B, T, ...]`."""
    output = call.in_rows(swap(call))
    return normalized_mse(output, target.view(output.shape))


def align_loss(
    model: Any,
    ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    amp: bool = False,
    recompute: bool = False,
    error: LayerError = layer_error,
) -> torch.Tensor:
    """Mean over swapped layers of the normalised squared error of the attention output, on the teacher's inputs.

    One model: every layer returns its own softmax output to the next, and the swap's output is compared with it.

    Args:
        model: the student.
        ids: `[B, T]`.
        position_ids: `[B, T]`, which begin again with each document; None where documents run on.
        amp: bf16 autocast.
        recompute: compute the swaps again in the backward pass rather than keep what is between.
        error: `layer_error`, or the same compiled.
    """
    losses: list[torch.Tensor] = []

    def compare(swap: LightningSwap, call: AttentionCall, target: torch.Tensor) -> None:
        losses.append(
            recomputed(error, swap, call, target, use_reentrant=False) if recompute else error(swap, call, target)
        )

    with observing(model, compare), torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        hidden_states(model, ids, **apart(position_ids))
    return torch.stack(losses).mean()


def distill_loss(
    model: Any,
    ids: torch.Tensor,
    *,
    stage: DistillStage,
    teacher: Any | None,
    amp: bool = False,
    position_ids: torch.Tensor | None = None,
    top_ids: torch.Tensor | None = None,
    top_log_probs: torch.Tensor | None = None,
    top_rest: torch.Tensor | None = None,
) -> torch.Tensor:
    """The stage's mixture of losses on full-vocabulary logits, a mean over tokens, chunked over tokens.

    The last token of a document has no label where the next one is apart from it; it counts in the mean all the same,
    so that every token weighs the same in every micro-batch and process.

    Args:
        model: the student.
        ids: `[B, T]`; in a cross-entropy the label of each token is the next one.
        position_ids: `[B, T]`, which begin again with each document; None where documents run on.
        stage: losses, temperature and chunk size.
        teacher: a separate model, or None for the student's own weights, see `as_teacher`.
        amp: bf16 autocast.
        top_ids, top_log_probs, top_rest: instead of a teacher what `swapattn logits` has written of it, `[B, T, k]` and
            `[B, T]`.
    """
    mixture = mixture_of(stage)
    target, target_head, top, labels = None, None, None, None
    if top_ids is not None and top_log_probs is not None and top_rest is not None:
        top = TopK(top_ids.flatten(0, 1), top_log_probs.flatten(0, 1), top_rest.flatten())
    given = apart(position_ids)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        if mixture.needs_teacher and top is None:
            with torch.no_grad(), as_teacher(model) if teacher is None else contextlib.nullcontext():
                target = hidden_states(teacher or model, ids, **given)
            target_head = output_embedding(teacher or model)
        if mixture.cross_entropy > 0:
            labels = torch.full_like(ids, -100)
            labels[:, :-1] = ids[:, 1:]
            if position_ids is not None:
                labels[:, :-1].masked_fill_(position_ids[:, 1:] == 0, -100)
        return linear_loss(
            hidden_states(model, ids, **given),
            output_embedding(model),
            mixture,
            teacher_hidden=target,
            teacher_head=target_head,
            teacher_top=top,
            labels=labels,
            label_count=ids[:, 1:].numel(),
            chunk=stage.chunk,
        )


@contextlib.contextmanager
def as_teacher(model: Any) -> Iterator[None]:
    """Let the student be its own teacher: softmax attention, no adapters."""
    with observing(model, lambda *_: None), adapters_off(model):
        yield


def mixture_of(stage: DistillStage) -> Mixture:
    """The stage's losses as `linear_loss` takes them."""
    return Mixture(**stage.losses.model_dump(), temperature=stage.temperature)


def trained_branches(model: Any, stage: TrainStage) -> contextlib.AbstractContextManager[None]:
    """The swapped layers as the stage trains them: their window alone where it says `branch: local`."""
    alone = isinstance(stage, DistillStage) and stage.branch == "local"
    return only_branch(model, "local") if alone else contextlib.nullcontext()


def stage_flops(model: Any, stage: TrainStage, teacher: Any | None) -> float | None:
    """FLOPs per token of the stage's training step, None where they are not known; `teacher` as in `distill_loss`."""
    with trained_branches(model, stage):
        own = forward_flops(model, stage.length)
    if isinstance(stage, AlignStage):
        return step_flops("align", own)
    if isinstance(stage, DistillStage) and not stage.runs_teacher:
        return step_flops("distill", own, {})
    return step_flops("distill", own, own if teacher is None else forward_flops(teacher, stage.length))


def hidden_states(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """Last hidden states `[B, T, ·]`, before the output embedding; `given` goes to the model's forward pass, too."""
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state
    return hidden


def apart(positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a model has to be given so that documents do not see each other.

    transformers makes the masks of softmax layers from the positions; swapped layers take the boundaries, so that
    none has to look for them in a mask, which waits for the device and cannot be compiled.
    """
    if positions is None:
        return {}
    found = boundaries(positions)
    return {"position_ids": positions, "cu_seq_lens_q": found, "cu_seq_lens_k": found}


def output_embedding(model: Any) -> OutputEmbedding:
    """What makes logits of last hidden states, with the scales and soft caps that some families put behind the matrix.

    Raises:
        UnsupportedModelError: it is something else than one matrix.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = _base_type(model)
        raise UnsupportedModelError(f"the output embedding of model type {kind!r} is no plain matrix: {type(head)}")
    divisor = getattr(config, "logits_scaling", None) or 1.0  # granite
    factor = getattr(config, "logit_scale", None) or 1.0  # cohere
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    return OutputEmbedding(head.weight, head.bias, factor / divisor, cap)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Make sure that `output_embedding` says what the model itself says.

    Raises:
        UnsupportedModelError: the family does something else between hidden states and logits.
    """
    ids = torch.arange(8, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    found = output_embedding(model)(hidden_states(model, ids)).float()
    if (found - own).norm() > 1e-2 * own.norm():
        kind = _base_type(model)
        raise UnsupportedModelError(f"model type {kind!r} scales its logits in a way that `distill` does not know")


def check_stages(model: Any, stages: Iterable[Stage]) -> None:
    """Make sure that the model can do what the stages ask of it.

    Raises:
        UnsupportedModelError: see `check_head` and `check_document_mask`.
    """
    stages = list(stages)
    if any(isinstance(stage, DistillStage) for stage in stages):
        check_head(model)
    if any(not isinstance(stage, CalibrateStage) and stage.document_mask for stage in stages):
        check_document_mask(model)


@torch.no_grad()
def check_document_mask(model: Any) -> None:
    """Make sure that the model keeps documents in a window apart, with its swaps and in softmax mode.

    Raises:
        UnsupportedModelError: the family does not make its masks from positions, or lacks what it needs for that.
    """
    ids = torch.arange(2 * SHORTEST, device=model.device)[None] % model.config.get_text_config().vocab_size
    pieces = ids.split(SHORTEST, 1)
    positions = torch.arange(2 * SHORTEST, device=model.device)[None] % SHORTEST
    for mode in (contextlib.nullcontext(), observing(model, lambda *_: None)):
        with mode:
            alone = torch.cat([hidden_states(model, piece) for piece in pieces], 1).float()
            reason = ""
            try:
                found = hidden_states(model, ids, **apart(positions)).float()
            except TypeError:  # no such argument
                found = torch.zeros_like(alone)
            except ValueError as error:  # layers of another kind, for which a package is missing
                found, reason = torch.zeros_like(alone), f" ({' '.join(str(error).split())})"
        if not (found - alone).norm() < 5e-2 * alone.norm():
            kind = _base_type(model)
            raise UnsupportedModelError(
                f"model type {kind!r} cannot keep the documents of a window apart: set document_mask: false{reason}"
            )


def _base_type(model: Any) -> str:
    """The model type that a user knows, swapped or not."""
    return str(model.config.model_type).removeprefix(MODEL_TYPE_PREFIX)
