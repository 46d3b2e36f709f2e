"""Pure loss functions of the distillation stages; each says what it is divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error over the teacher's squared norm, one fp32 number: 1 means as bad as zero, in every layer alike.

    Args:
        student, teacher: tensors of one shape, any dtype; no gradient flows into the teacher.
    """
    target = teacher.detach().float()
    return (student.float() - target).pow(2).sum() / target.pow(2).sum().clamp(min=1e-12)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher ‖ student) summed over tokens, times temperature², fp32 (arXiv 1503.02531, section 2.1).

    Args:
        student, teacher: logits `[N, V]`; log-softmax in fp32 over the full vocabulary.
        temperature: divides both logits.
    """
    p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="sum") * temperature**2


def chunked_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> torch.Tensor:
    """Mean over tokens of `forward_kl`, with the logits of only `chunk` tokens in memory, also in the backward pass.

    Args:
        student_hidden, teacher_hidden: last hidden states `[B, T, ·]` of both models.
        student_head, teacher_head: from hidden states `[n, ·]` to logits `[n, V]`.
        temperature: see `forward_kl`.
        chunk: tokens at a time; the logits are computed again in the backward pass.
    """

    def part(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = teacher_head(t)
        return forward_kl(student_head(s), teacher, temperature)

    students = torch.split(student_hidden.flatten(0, 1), chunk)
    teachers = torch.split(teacher_hidden.detach().flatten(0, 1), chunk)
    total: Any = sum(checkpoint(part, s, t, use_reentrant=False) for s, t in zip(students, teachers, strict=True))
    mean: torch.Tensor = total / (student_hidden.shape[0] * student_hidden.shape[1])
    return mean
