"""Losses against their formulas, and the gradients that they give."""

from __future__ import annotations

import pytest
import torch

from swapattn.losses import chunked_kl, forward_kl, normalized_mse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_kl(student, teacher, temperature):
    """KL over all logits at once, fp64, mean over tokens."""
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean() * temperature**2


def test_normalized_mse_is_one_for_zero_and_zero_for_equal():
    teacher = randn(2, 3, 4)
    assert normalized_mse(torch.zeros_like(teacher), teacher) == 1
    assert normalized_mse(teacher, teacher) == 0
    assert normalized_mse(100 * teacher + 1, 100 * teacher) < normalized_mse(teacher + 1, teacher)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    (normalized_mse(student, teacher) + forward_kl(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_layer_that_is_silent_does_not_divide_by_zero():
    assert torch.isfinite(normalized_mse(randn(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 10, 1000])
def test_chunked_kl_and_its_gradients_are_those_of_the_full_logits(chunk, temperature):
    # two models of different width; 14 tokens, which 4 and 10 do not divide
    hidden, other = randn(2, 7, 6).requires_grad_(), randn(2, 7, 5, seed=1)
    head, teacher_head = randn(6, 33, seed=2).requires_grad_(), randn(5, 33, seed=3)
    loss = chunked_kl(
        hidden, other, lambda h: h @ head, lambda h: h @ teacher_head, temperature=temperature, chunk=chunk
    )
    expected = full_kl(hidden @ head, other @ teacher_head, temperature)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (hidden, head))
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (hidden, head)), strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_kl_is_zero_for_the_teacher_itself_and_has_its_direction():
    logits, other = randn(5, 11), randn(5, 11, seed=1)
    assert float(forward_kl(logits, logits)) == pytest.approx(0, abs=1e-5)
    assert float(forward_kl(logits, other)) == pytest.approx(5 * float(full_kl(logits, other, 1.0)), rel=1e-5)
    assert abs(float(forward_kl(logits, other)) - float(forward_kl(other, logits))) > 1e-2


def test_bf16_logits_are_taken_to_fp32():
    logits, other = randn(5, 11).bfloat16(), randn(5, 11, seed=1).bfloat16()
    assert forward_kl(logits, other).dtype == torch.float32
    assert float(forward_kl(logits, other)) == pytest.approx(5 * float(full_kl(logits, other, 1.0)), rel=1e-5)
