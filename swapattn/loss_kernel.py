"""One Triton kernel a row of logits: the losses of `losses.Mixture` and their gradient, in place.

Dimensions: N tokens, V vocabulary. A program owns one token; it walks over its row in blocks of `BLOCK`: once for the
log-sum-exps of both models, once more for the means that the gradients of reverse KL and JSD need, and once for loss
and gradient. All arithmetic is fp32. The repeated reads mostly come out of the L2 cache (100 kB a row of 49,152).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .losses import Mixture

BLOCK = 4096
WARPS = 8
# Plain numbers that change between calls must not make the kernel compile anew. `columns` is not among them: it is the
# same for a model, and only when it is known to be a multiple of 16 do the masked loads become wide ones.
_SCALARS = (
    "temperature",
    "forward_weight",
    "reverse_weight",
    "jsd_weight",
    "beta",
    "student_factor",
    "student_cap",
    "teacher_factor",
    "teacher_cap",
)


@triton.jit
def _logits(row, columns, inside, factor, cap, CAPPED: tl.constexpr):
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32) * factor
    if CAPPED:
        x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _gathered(highest, total, x):
    """Online log-sum-exp: the highest value so far and the sum of exp(value - highest)."""
    higher = tl.maximum(highest, tl.max(x, 0))
    return higher, total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)


@triton.jit(do_not_specialize=_SCALARS)
def loss_kernel(  # noqa: C901
    student,
    teacher,
    labels,
    token_weights,
    label_weights,
    losses,
    student_stride,
    teacher_stride,
    columns,
    temperature,
    forward_weight,
    reverse_weight,
    jsd_weight,
    beta,
    student_factor,
    student_cap,
    teacher_factor,
    teacher_cap,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    JSD: tl.constexpr,
    LABELS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses `[N]` of logits `[N, V]`; with GRADIENT the student's raw logits are replaced by their gradient."""
    TEACHER: tl.constexpr = FORWARD or REVERSE or JSD
    token = tl.program_id(0).to(tl.int64)
    student_row = student + token * student_stride
    teacher_row = teacher + token * teacher_stride
    cold = 1.0 / temperature
    block = tl.arange(0, BLOCK)
    label = -1
    if LABELS:
        label = tl.load(labels + token)

    s_high, t_high, l_high = float("-inf"), float("-inf"), float("-inf")
    s_sum, t_sum, l_sum, label_logit = 0.0, 0.0, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + block
        inside = at < columns
        z = _logits(student_row, at, inside, student_factor, student_cap, STUDENT_CAPPED)
        if LABELS:
            l_high, l_sum = _gathered(l_high, l_sum, z)
            label_logit += tl.sum(tl.where(at == label, z, 0.0), 0)
        if TEACHER:
            s_high, s_sum = _gathered(s_high, s_sum, z * cold)
            t = _logits(teacher_row, at, inside, teacher_factor, teacher_cap, TEACHER_CAPPED)
            t_high, t_sum = _gathered(t_high, t_sum, t * cold)
    s_lse = s_high + tl.log(s_sum)
    t_lse = t_high + tl.log(t_sum)
    l_lse = l_high + tl.log(l_sum)

    reverse, to_mix = 0.0, 0.0  # KL(q ‖ p) and KL(q ‖ m), means over q that their gradients subtract
    if REVERSE or JSD:
        for start in range(0, columns, BLOCK):
            at = start + block
            inside = at < columns
            z = _logits(student_row, at, inside, student_factor, student_cap, STUDENT_CAPPED)
            t = _logits(teacher_row, at, inside, teacher_factor, teacher_cap, TEACHER_CAPPED)
            log_q, log_p = z * cold - s_lse, t * cold - t_lse
            q, p = tl.exp(log_q), tl.exp(log_p)
            if REVERSE:
                reverse += tl.sum(tl.where(q > 0, q * (log_q - log_p), 0.0), 0)
            if JSD:
                log_m = tl.log(beta * p + (1.0 - beta) * q)
                to_mix += tl.sum(tl.where(q > 0, q * (log_q - log_m), 0.0), 0)

    loss = 0.0
    token_weight = tl.load(token_weights + token)
    label_weight = 0.0
    if LABELS:
        label_weight = tl.load(label_weights + token)
        loss += label_weight * tl.where(label_weight > 0, l_lse - label_logit, 0.0)
    forward, from_mix = 0.0, 0.0
    if GRADIENT or FORWARD or JSD:
        for start in range(0, columns, BLOCK):
            at = start + block
            inside = at < columns
            z = _logits(student_row, at, inside, student_factor, student_cap, STUDENT_CAPPED)
            slope = tl.zeros([BLOCK], tl.float32)
            if TEACHER:
                t = _logits(teacher_row, at, inside, teacher_factor, teacher_cap, TEACHER_CAPPED)
                log_q, log_p = z * cold - s_lse, t * cold - t_lse
                q, p = tl.exp(log_q), tl.exp(log_p)
                if FORWARD:
                    forward += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
                    slope += forward_weight * (q - p)
                if REVERSE:
                    slope += reverse_weight * tl.where(q > 0, q * (log_q - log_p - reverse), 0.0)
                if JSD:
                    log_m = tl.log(beta * p + (1.0 - beta) * q)
                    from_mix += tl.sum(tl.where(p > 0, p * (log_p - log_m), 0.0), 0)
                    slope += jsd_weight * (1.0 - beta) * tl.where(q > 0, q * (log_q - log_m - to_mix), 0.0)
                slope *= token_weight * temperature
            if GRADIENT:
                if LABELS:
                    slope += label_weight * (tl.exp(z - l_lse) - tl.where(at == label, 1.0, 0.0))
                if STUDENT_CAPPED:
                    inner = z / student_cap
                    slope *= 1.0 - inner * inner
                tl.store(student_row + at, slope * student_factor, mask=inside)
    if TEACHER:
        jsd = beta * from_mix + (1.0 - beta) * to_mix
        parts = forward_weight * forward + reverse_weight * reverse + jsd_weight * jsd
        loss += token_weight * temperature * temperature * parts
    tl.store(losses + token, loss)


def launch(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    token_weights: torch.Tensor,
    label_weights: torch.Tensor | None,
    mixture: Mixture,
    scales: tuple[float, float, float, float],
    *,
    gradient: bool,
) -> torch.Tensor:
    """Losses fp32 `[N]` of raw logits `[N, V]`; with `gradient` the student's become their gradient.

    Args:
        student, teacher: raw logits, contiguous in the last dimension; the teacher's only where the mixture needs it.
        labels: int64 `[N]`, with `label_weights` fp32 `[N]` (0 where there is no label), or None.
        token_weights: fp32 `[N]`, of the divergences.
        mixture: weights and temperature; its cross-entropy weight is part of `label_weights`.
        scales: factor and soft cap (0 for none) of the student's, then of the teacher's logits.
        gradient: see above.
    """
    tokens, columns = student.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=student.device)
    other = student if teacher is None else teacher
    loss_kernel[(tokens,)](
        student,
        other,
        token_weights if labels is None else labels,
        token_weights,
        token_weights if label_weights is None else label_weights,
        losses,
        student.stride(0),
        other.stride(0),
        columns,
        mixture.temperature,
        mixture.forward_kl,
        mixture.reverse_kl,
        mixture.jsd,
        mixture.beta,
        scales[0],
        scales[1],
        scales[2],
        scales[3],
        FORWARD=mixture.forward_kl > 0,
        REVERSE=mixture.reverse_kl > 0,
        JSD=mixture.jsd > 0,
        LABELS=labels is not None,
        STUDENT_CAPPED=scales[1] > 0,
        TEACHER_CAPPED=scales[3] > 0,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return losses
