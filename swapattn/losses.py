"""Pure loss functions of the distillation stages; each says what it is divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CUDA_CHUNK_BYTES = 512 * 2**20  # of logits of one model: matrices big enough to be efficient, 4,096 x 49,152 in bf16
CPU_CHUNK_BYTES = 64 * 2**20


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error over the teacher's squared norm, one fp32 number: 1 means as bad as zero, in every layer alike.

    Each sequence is divided by its own norm, so that the mean over a batch does not depend on how the batch is cut
    into micro-batches or shared out among processes.

    Args:
        student, teacher: tensors of one shape `[B, ...]`, any dtype; no gradient flows into the teacher.
    """
    target = teacher.detach().float()
    error = (student.float() - target).pow(2).flatten(1).sum(1)
    return (error / target.pow(2).flatten(1).sum(1).clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class Mixture:
    """Weights of the losses on logits, p the teacher's and q the student's distribution over the whole vocabulary.

    Attributes:
        forward_kl: of KL(p ‖ q) (arXiv 1503.02531, section 2.1).
        reverse_kl: of KL(q ‖ p) (MiniLLM, arXiv 2306.08543).
        jsd: of β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q (GKD, arXiv 2306.13649, equation 1).
        cross_entropy: of −ln q on labels, at temperature 1.
        beta: β of jsd, between 0 and 1.
        temperature: divides both models' logits in the three divergences, which are multiplied by its square.
    """

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    cross_entropy: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any divergence has a weight."""
        return self.forward_kl > 0 or self.reverse_kl > 0 or self.jsd > 0


@dataclass(frozen=True)
class OutputEmbedding:
    """From last hidden states `[n, d]` to logits `[n, V]`: matrix, bias, a factor, a soft cap cap·tanh(x / cap).

    Attributes:
        weight: `[V, d]`, tied or not.
        bias: `[V]` or None.
        factor: multiplies the logits (granite, cohere).
        cap: soft cap behind the factor (gemma2), 0 for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    factor: float = 1.0
    cap: float = 0.0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits, in the dtype of the product."""
        return self.scaled(F.linear(hidden, self.weight, self.bias))

    def scaled(self, raw: torch.Tensor) -> torch.Tensor:
        """What comes behind matrix and bias."""
        logits = raw * self.factor if self.factor != 1 else raw
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def divergence(student: torch.Tensor, teacher: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """The mixture's divergences of each token, `[N]`, at least fp32; logits `[N, V]`, no gradient to the teacher."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(wide) / mixture.temperature, dim=-1)
    log_p = F.log_softmax(teacher.detach().to(wide) / mixture.temperature, dim=-1)
    return _divergence(log_q, log_p, mixture) * mixture.temperature**2


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's distribution over the vocabulary: its k most probable tokens.

    Attributes:
        ids: int `[N, k]`.
        log_probs: `[N, k]`, any floating dtype; as ln of probabilities they need not sum up to 1 exactly.
        rest: `[N]`, ln of the probability of all other tokens together, −inf where there is none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int) -> TopK:
        """The k most probable tokens of logits `[N, V]`, in fp32; all of them where k is V or more."""
        log_probs = F.log_softmax(logits.float(), dim=-1)
        found = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        rest = log_probs.scatter(-1, found.indices, -torch.inf).logsumexp(-1)
        return cls(found.indices, found.values, rest)

    def part(self, rows: slice) -> TopK:
        """Some of the tokens."""
        return TopK(self.ids[rows], self.log_probs[rows], self.rest[rows])


def divergence_of_top(student: torch.Tensor, teacher: TopK, mixture: Mixture) -> torch.Tensor:
    """`divergence` of the distributions over k + 1 classes: the teacher's top k tokens and all others as one.

    Its forward KL is Σ_{i ∈ top k} p_i ln(p_i / q_i) + p_r ln(p_r / q_r) with p_r = 1 − Σ p_i and q_r = 1 − Σ q_i: at
    most the full one, which it is for k = V. Without the last term, or with the p_i made to sum up to 1, the student
    learns to be too sure of itself (Sparse Logit Sampling, arXiv 2503.16870, which shows that of top-k distillation).
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    logits = student.to(wide)
    ids, total = teacher.ids.long(), logits.logsumexp(-1)
    log_q = logits.gather(-1, ids) - total[:, None]
    lowest = torch.finfo(wide).min
    # not 1 − Σ q_i: of a student that is sure of itself nothing would be left of it, nor of its gradient
    others = logits.scatter(-1, ids, lowest).logsumexp(-1) - total
    log_p, rest = teacher.log_probs.detach().to(wide), teacher.rest.detach().to(wide)
    log_p = log_p + (torch.log1p(-rest.exp()) - log_p.logsumexp(-1))[:, None]  # what rounding them has cost
    nothing = rest.isneginf()
    others = others.masked_fill(nothing, lowest)
    log_p, log_q = torch.cat((log_p, rest[:, None]), -1), torch.cat((log_q, others[:, None]), -1)
    return _divergence(log_q, log_p, mixture)


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """The mixture's divergences of distributions that are given as ln of probabilities `[N, classes]`, each `[N]`."""
    wide = log_q.dtype
    log_p = log_p.clamp(min=torch.finfo(wide).min)  # a token that the teacher forbids: 0 times a finite number is 0
    total = torch.zeros_like(log_q[:, 0])
    if mixture.forward_kl > 0:
        total = total + mixture.forward_kl * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if mixture.reverse_kl > 0:
        total = total + mixture.reverse_kl * F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    if mixture.jsd > 0:
        beta = mixture.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        to_mix = (1 - beta) * F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
        from_mix = beta * F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
        total = total + mixture.jsd * (to_mix + from_mix)
    return total


def cross_entropy(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−ln q of each token's label, `[N]`, 0 where the label is negative; logits `[N, V]`, at least fp32."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return F.cross_entropy(student.to(wide), labels.clamp(min=-1), ignore_index=-1, reduction="none")


def chunk_tokens(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' logits to hold at a time: a power of two of at most 512 MiB (on a CPU 64 MiB) a model."""
    budget = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return 1 << max(6, (budget // (vocabulary * dtype.itemsize)).bit_length() - 1)


def linear_loss(
    hidden: torch.Tensor,
    head: OutputEmbedding,
    mixture: Mixture,
    *,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: OutputEmbedding | None = None,
    teacher_top: TopK | None = None,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
    label_count: torch.Tensor | float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Output embedding and loss in one, with the logits of `chunk` tokens at a time in memory; one fp32 number.

    Gradients of the hidden states and of the student's embedding are computed on the way forward, so that no logits
    are kept or computed again (as Liger-Kernel does, arXiv 2410.10989, section 3.2). The divergences are divided by
    the number of valid tokens, cross-entropy by the number of valid tokens that have a label.

    Memory beside inputs and gradients: logits `[chunk, V]` of both models in the dtype of the product (that of
    autocast where it is on), on a CPU about six such tensors in fp32; where the embedding is trained, its gradient in
    fp32 and one product `[V, d]`.

    Args:
        hidden: the student's last hidden states `[..., d]`, any floating dtype.
        head: the student's output embedding; gradients flow into weight and bias.
        mixture: weights of the losses.
        teacher_hidden, teacher_head: the same of the teacher, of any width; only where the mixture has a divergence.
        teacher_top: instead of these two what was kept of its distribution, of `[...]` tokens flattened; at
            temperature 1, and in plain PyTorch on every device (see `divergence_of_top`).
        labels: int64 `[...]`, negative where there is none; only where the mixture has a cross-entropy.
        mask: bool `[...]`, False for tokens that do not count; None when all do.
        count: divisor of the divergences instead of the number of valid tokens here, such as their mean over the
            micro-batches and processes of a step.
        label_count: the same for the cross-entropy, instead of the number of valid tokens that have a label.
        chunk: tokens at a time, None for `chunk_tokens`.

    Raises:
        ValueError: the mixture needs a teacher or labels that are not given.
    """
    if mixture.needs_teacher and teacher_top is None and (teacher_hidden is None or teacher_head is None):
        raise ValueError("the mixture has a divergence: teacher_hidden and teacher_head, or teacher_top, are needed")
    if mixture.cross_entropy > 0 and labels is None:
        raise ValueError("the mixture has a cross-entropy: labels are needed")
    rows = hidden.flatten(0, -2)
    wide = torch.promote_types(rows.dtype, torch.float32)
    ones = torch.ones(rows.shape[0], dtype=wide, device=rows.device)
    token_weights = ones if mask is None else mask.flatten().to(wide)
    valid = token_weights.sum().clamp(min=1) if count is None else count
    label_weights = None
    if mixture.cross_entropy > 0 and labels is not None:
        labels = labels.flatten()
        labelled = token_weights * (labels >= 0)
        # relative to the divergences' divisor, by which everything is divided in the end
        present = labelled.sum().clamp(min=1) if label_count is None else label_count
        label_weights = labelled * (mixture.cross_entropy * valid / present)
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    teacher = None
    if mixture.needs_teacher and teacher_hidden is not None and teacher_head is not None and teacher_top is None:
        teacher = (teacher_hidden.detach().flatten(0, -2), teacher_head)
    work = _Work(
        mixture,
        (head.factor, head.cap),
        teacher,
        teacher_top if mixture.needs_teacher else None,
        labels if label_weights is not None else None,
        token_weights,
        label_weights,
        chunk or chunk_tokens(head.weight.shape[0], dtype, rows.device),
        dtype,
    )
    total: torch.Tensor = _LinearLoss.apply(rows, head.weight, head.bias, work)  # type: ignore[no-untyped-call]
    return total / valid


@dataclass(frozen=True)
class _Work:
    """What one call of `_LinearLoss` needs beside the tensors that get a gradient."""

    mixture: Mixture
    scale: tuple[float, float]
    teacher: tuple[torch.Tensor, OutputEmbedding] | None
    top: TopK | None
    labels: torch.Tensor | None
    token_weights: torch.Tensor
    label_weights: torch.Tensor | None
    chunk: int
    dtype: torch.dtype

    def teacher_logits(self, part: slice, cast: tuple[torch.Tensor, torch.Tensor | None] | None) -> Any:
        """Raw logits of the teacher for a chunk, or None."""
        if self.teacher is None or cast is None:
            return None
        return F.linear(self.teacher[0][part].to(self.dtype), *cast)

    def losses_(self, raw: torch.Tensor, teacher: torch.Tensor | None, part: slice, gradient: bool) -> torch.Tensor:
        """Sum of the chunk's losses; with `gradient` the raw logits of the student become their gradient."""
        labels = self.labels[part] if self.labels is not None else None
        label_weights = self.label_weights[part] if self.label_weights is not None else None
        token_weights = self.token_weights[part]
        if raw.is_cuda and raw.dtype != torch.float64 and self.top is None:
            from .loss_kernel import launch

            head = self.teacher[1] if self.teacher is not None else None
            scales = (*self.scale, head.factor, head.cap) if head is not None else (*self.scale, 1.0, 0.0)
            return launch(
                raw, teacher, labels, token_weights, label_weights, self.mixture, scales, gradient=gradient
            ).sum()
        with torch.set_grad_enabled(gradient):
            leaf = raw.detach().requires_grad_(gradient)
            logits = OutputEmbedding(leaf, None, *self.scale).scaled(leaf)
            total = logits.new_zeros((), dtype=torch.promote_types(raw.dtype, torch.float32))
            if teacher is not None and self.teacher is not None:
                target = self.teacher[1].scaled(teacher)
                total = total + (divergence(logits, target, self.mixture) * token_weights).sum()
            if self.top is not None:
                total = total + (divergence_of_top(logits, self.top.part(part), self.mixture) * token_weights).sum()
            if labels is not None and label_weights is not None:
                total = total + (cross_entropy(logits, labels) * label_weights).sum()
        if gradient:
            raw.copy_(torch.autograd.grad(total, leaf)[0])
        return total.detach()


def _cast(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.detach().to(dtype), bias.detach().to(dtype) if bias is not None else None


class _LinearLoss(torch.autograd.Function):
    """Sum of weighted losses; its gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:3]
        gradient = any(wanted)
        wide = torch.promote_types(work.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=work.dtype) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, shift = _cast(weight, bias, work.dtype)
            head = work.teacher[1] if work.teacher is not None else None
            other = _cast(head.weight, head.bias, work.dtype) if head is not None else None
            for start in range(0, hidden.shape[0], work.chunk):
                part = slice(start, start + work.chunk)
                inputs = hidden[part].detach().to(work.dtype)
                raw = F.linear(inputs, matrix, shift)
                total += work.losses_(raw, work.teacher_logits(part, other), part, gradient)
                if d_hidden is not None:
                    torch.mm(raw, matrix, out=d_hidden[part])
                if d_weight is not None:
                    d_weight += raw.t() @ inputs
                if d_bias is not None:
                    d_bias += raw.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # a number without dimensions does not change the dtype of the product, nor is it rounded to it
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if x is None else (x * upstream).to(dtype) for x, dtype in found]
        return (*scaled, None)
