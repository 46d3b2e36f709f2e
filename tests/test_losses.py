"""Losses against their formulas, and the gradients that they give."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swapattn.losses import (
    Mixture,
    OutputEmbedding,
    chunk_tokens,
    cross_entropy,
    divergence,
    linear_loss,
    normalized_mse,
)

MIXTURES = {
    "forward": Mixture(),
    "reverse": Mixture(forward_kl=0, reverse_kl=1),
    "jsd": Mixture(forward_kl=0, jsd=1, beta=0.3),
    "labels": Mixture(forward_kl=0, cross_entropy=1),
    "all": Mixture(forward_kl=0.4, reverse_kl=0.3, jsd=0.7, cross_entropy=0.2, beta=0.6, temperature=2.5),
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """Two models of different width, 14 tokens, of which some have no label and some do not count."""

    def __init__(self, dtype=torch.float32, vocabulary=33, cap=0.0, bias=True, device="cpu"):
        make = lambda *shape, seed: randn(*shape, seed=seed, dtype=dtype).to(device).requires_grad_()  # noqa: E731
        self.hidden, self.weight = make(2, 7, 6, seed=0), make(vocabulary, 6, seed=2)
        self.bias = make(vocabulary, seed=4) if bias else None
        self.other, self.matrix = make(2, 7, 5, seed=1), make(vocabulary, 5, seed=3)
        self.head = OutputEmbedding(self.weight, self.bias, 0.7, cap)
        self.teacher_head = OutputEmbedding(self.matrix, None, 1.3, cap)
        self.labels = torch.arange(14, device=device).view(2, 7) * 5 % vocabulary
        self.labels[0, 1] = -100
        self.mask = torch.ones(2, 7, dtype=torch.bool, device=device)
        self.mask[1, :3] = False

    def loss(self, mixture, masked=True, **options):
        return linear_loss(
            self.hidden,
            self.head,
            mixture,
            teacher_hidden=self.other,
            teacher_head=self.teacher_head,
            labels=self.labels,
            mask=self.mask if masked else None,
            **options,
        )

    def gradients(self, loss):
        wanted = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        return torch.autograd.grad(loss, wanted)

    def expected(self, mixture, masked=True):
        """By the formulas, all logits at once in fp64: loss and gradients."""
        tau, beta = mixture.temperature, mixture.beta
        double = [x.detach().double().requires_grad_() for x in (self.hidden, self.weight)]
        bias = self.bias.detach().double().requires_grad_() if self.bias is not None else None
        cap = lambda x: self.head.cap * (x / self.head.cap).tanh() if self.head.cap else x  # noqa: E731
        z = double[0] @ double[1].T
        z = cap(self.head.factor * (z + bias if bias is not None else z))
        t = cap(self.teacher_head.factor * (self.other.detach().double() @ self.matrix.detach().double().T))
        p, q = (t / tau).softmax(-1), (z / tau).softmax(-1)
        m = beta * p + (1 - beta) * q
        kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
        mixed = mixture.forward_kl * kl(p, q) + mixture.reverse_kl * kl(q, p)
        mixed = tau**2 * (mixed + mixture.jsd * (beta * kl(p, m) + (1 - beta) * kl(q, m)))
        mask = self.mask if masked else torch.ones_like(self.mask)
        loss = mixed[mask].mean()
        known = mask & (self.labels >= 0)
        picked = z.log_softmax(-1).gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        loss = loss - mixture.cross_entropy * picked[known].mean()
        return loss, torch.autograd.grad(loss, [x for x in (*double, bias) if x is not None])


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_normalized_mse_is_one_for_zero_and_zero_for_equal():
    teacher = randn(2, 3, 4)
    assert normalized_mse(torch.zeros_like(teacher), teacher) == 1
    assert normalized_mse(teacher, teacher) == 0
    assert normalized_mse(100 * teacher + 1, 100 * teacher) < normalized_mse(teacher + 1, teacher)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    (normalized_mse(student, teacher) + divergence(student, teacher, Mixture()).sum()).backward()
    assert teacher.grad is None
    assert student.grad is not None
    case = Case()
    case.loss(MIXTURES["all"]).backward()
    assert case.other.grad is case.matrix.grad is None


def test_a_layer_that_is_silent_does_not_divide_by_zero():
    assert torch.isfinite(normalized_mse(randn(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize(("cap", "bias"), [(0.0, True), (3.0, False)])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("chunk", [1, 4, 1000])  # 4 does not divide the 14 tokens
def test_loss_and_gradients_are_those_of_the_formulas(chunk, name, cap, bias):
    case = Case(cap=cap, bias=bias)
    loss = case.loss(MIXTURES[name], chunk=chunk)
    wanted, gradients = case.expected(MIXTURES[name])
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for found, gradient in zip(case.gradients(loss), gradients, strict=True):
        assert found.dtype == torch.float32
        assert relative(found, gradient) < 1e-5


def test_doubles_stay_doubles_and_no_mask_counts_every_token():
    case = Case(dtype=torch.float64)
    loss = case.loss(MIXTURES["all"], masked=False, chunk=5)
    wanted, gradients = case.expected(MIXTURES["all"], masked=False)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for found, gradient in zip(case.gradients(loss), gradients, strict=True):
        assert relative(found, gradient) < 1e-12


def test_autocast_computes_logits_in_bf16_and_gives_gradients_in_the_parameters_dtype():
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(MIXTURES["all"])
    wanted, gradients = case.expected(MIXTURES["all"])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=2e-2)
    assert float(loss.detach()) != pytest.approx(float(wanted.detach()), rel=1e-6)
    for found, gradient in zip(case.gradients(loss), gradients, strict=True):
        assert found.dtype == torch.float32
        assert relative(found, gradient) < 3e-2


def test_a_common_divisor_makes_micro_batches_add_up_to_the_batch():
    case = Case()
    both = case.loss(Mixture())
    halves = [
        linear_loss(
            case.hidden[i],
            case.head,
            Mixture(),
            teacher_hidden=case.other[i],
            teacher_head=case.teacher_head,
            mask=case.mask[i],
            count=case.mask.sum(),
        )
        for i in range(2)
    ]
    assert float(sum(halves).detach()) == pytest.approx(float(both.detach()), rel=1e-5)


def test_nothing_valid_gives_zero_and_not_nan():
    case = Case()
    case.mask[:] = False
    loss = case.loss(MIXTURES["all"])
    assert float(loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in case.gradients(loss))


def test_what_does_not_train_gets_no_gradient_and_costs_none():
    case = Case()
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    (found,) = torch.autograd.grad(case.loss(Mixture()), [case.hidden])
    assert relative(found, case.expected(Mixture())[1][0]) < 1e-5
    with torch.no_grad():
        loss = case.loss(Mixture())
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(case.expected(Mixture())[0].detach()), rel=1e-5)


def test_whole_logits_never_exist(monkeypatch):
    sizes = []
    original = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a: sizes.append((out := original(*a)).shape) or out, raising=True
    )
    case = Case()
    case.loss(Mixture(), chunk=4).backward()
    assert sorted(set(sizes)) == [(2, 33), (4, 33)]
    assert len(sizes) == 2 * 4


def test_labels_alone_need_no_teacher_and_what_is_missing_is_named():
    case = Case()
    loss = linear_loss(case.hidden, case.head, MIXTURES["labels"], labels=case.labels, mask=case.mask)
    assert float(loss.detach()) == pytest.approx(float(case.expected(MIXTURES["labels"])[0].detach()), rel=1e-5)
    with pytest.raises(ValueError, match="teacher_hidden"):
        linear_loss(case.hidden, case.head, Mixture())
    with pytest.raises(ValueError, match="labels are needed"):
        linear_loss(case.hidden, case.head, MIXTURES["labels"])


def test_a_token_that_the_teacher_forbids_does_not_make_nan():
    teacher = randn(5, 11)
    teacher[:, 3] = -torch.inf
    student = randn(5, 11, seed=1).requires_grad_()
    total = divergence(student, teacher, Mixture()).sum()
    assert torch.isfinite(total)
    assert torch.isfinite(torch.autograd.grad(total, student)[0]).all()


def test_divergences_are_zero_for_the_teacher_itself_and_have_their_direction():
    logits, other = randn(5, 11), randn(5, 11, seed=1)
    for name in ("forward", "reverse", "jsd"):
        assert float(divergence(logits, logits, MIXTURES[name]).abs().max()) == pytest.approx(0, abs=1e-6)
    forward, reverse = divergence(logits, other, MIXTURES["forward"]), divergence(other, logits, MIXTURES["reverse"])
    assert torch.allclose(forward, reverse, rtol=1e-5)
    assert float((forward - divergence(logits, other, MIXTURES["reverse"])).abs().min()) > 1e-3
    assert cross_entropy(logits.bfloat16(), torch.tensor([1, -100, 2, 3, 4])).dtype == torch.float32


def test_chunks_fill_their_memory():
    assert chunk_tokens(49_152, torch.bfloat16, torch.device("cuda")) == 4096
    assert chunk_tokens(128_256, torch.bfloat16, torch.device("cuda")) == 2048
    assert chunk_tokens(49_152, torch.float32, torch.device("cpu")) == 256
    assert chunk_tokens(10**9, torch.float32, torch.device("cpu")) == 64


INTERPRETED = """
import torch
from test_losses import Case, MIXTURES, kernel_errors
import swapattn.loss_kernel as kernel
kernel.BLOCK = 64
for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 1.5e-3)):
    for name in MIXTURES if dtype == torch.float32 else ["all"]:
        for cap in (0.0, 3.0):
            errors = kernel_errors(MIXTURES[name], dtype, cap)
            assert max(errors) < bound, (name, dtype, cap, errors)
"""


def kernel_errors(mixture, dtype, cap, device="cpu", vocabulary=150):
    """Relative errors of the Triton kernel against fp64 autograd on the same rounded logits: losses, gradient."""
    from swapattn.loss_kernel import launch

    tokens = 5
    student = 2 * randn(tokens, vocabulary, seed=5).to(device, dtype)
    teacher = 2 * randn(tokens, vocabulary, seed=6).to(device, dtype)
    if mixture.needs_teacher and not mixture.reverse_kl:  # KL(q ‖ p) is infinite then
        teacher[2, 7] = -torch.inf
    labels = torch.tensor([3, vocabulary - 1, -100, 0, 70], device=device)
    token_weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], device=device)
    label_weights = torch.tensor([1.0, 0.0, 0.0, 1.5, 1.0], device=device) * mixture.cross_entropy
    leaf = student.double().requires_grad_()
    z, t = (
        OutputEmbedding(leaf, None, 0.7, cap).scaled(leaf),
        OutputEmbedding(leaf, None, 1.3, cap).scaled(teacher.double()),
    )
    wanted = divergence(z, t, mixture) * token_weights + cross_entropy(z, labels) * label_weights
    (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    has_labels = mixture.cross_entropy > 0
    arguments = (
        teacher if mixture.needs_teacher else None,
        labels if has_labels else None,
        token_weights,
        label_weights if has_labels else None,
        mixture,
        (0.7, cap, 1.3, cap),
    )
    before = student.clone()
    plain = launch(student, *arguments, gradient=False)
    assert torch.equal(student, before)
    losses = launch(student, *arguments, gradient=True)
    assert torch.equal(losses, plain)
    return relative(losses, wanted.detach()), relative(student, gradient)


def run(program, **environment):
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined."""
    program = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{program}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_kernel_in_the_interpreter_gives_the_same_losses_and_gradients():
    pytest.importorskip("triton")
    run(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.slow  # test_compile.py has the launcher's own
def test_the_kernel_compiles_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    program = "from test_losses import MIXTURES, compile_kernel\nfor x in MIXTURES.values():\n    compile_kernel(x)"
    run(program, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def compile_kernel(mixture):
    """For sm_90, without a GPU; it may not ask for more shared memory than every GPU has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swapattn import loss_kernel

    constants = {
        "FORWARD": mixture.forward_kl > 0,
        "REVERSE": mixture.reverse_kl > 0,
        "JSD": mixture.jsd > 0,
        "LABELS": mixture.cross_entropy > 0,
        "STUDENT_CAPPED": True,
        "TEACHER_CAPPED": False,
        "GRADIENT": True,
        "BLOCK": loss_kernel.BLOCK,
    }
    pointers = {"student": "*bf16", "teacher": "*bf16", "labels": "*i64"}
    pointers |= dict.fromkeys(("token_weights", "label_weights", "losses"), "*fp32")
    integers = dict.fromkeys(("student_stride", "teacher_stride", "columns"), "i32")
    rest = [arg for arg in loss_kernel.loss_kernel.arg_names if arg not in {**constants, **pointers, **integers}]
    signature = {**pointers, **integers, **dict.fromkeys(rest, "fp32"), **dict.fromkeys(constants, "constexpr")}
    signature = {arg: signature[arg] for arg in loss_kernel.loss_kernel.arg_names}
    source = ASTSource(loss_kernel.loss_kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": loss_kernel.WARPS})
    assert compiled.metadata.shared < 48 * 1024
    assert "cubin" in compiled.asm


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_kernel_on_a_gpu(name, cap):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-3)):
        # Gradients of 49,152 tokens are so small that fp16 holds only some of their bits.
        errors = kernel_errors(MIXTURES[name], dtype, cap, "cuda", vocabulary=49_152)
        assert errors[0] < 1e-5
        assert errors[1] < bound


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXTURES)
def test_the_whole_loss_on_a_gpu_in_bf16_and_fp32(name):
    for masked, chunk in itertools.product((False, True), (None, 4)):
        case = Case(device="cuda")
        wanted, gradients = case.expected(MIXTURES[name], masked)
        for amp, bound in ((False, 5e-3), (True, 3e-2)):  # fp32 matrices may go through TF32
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss = case.loss(MIXTURES[name], masked, chunk=chunk)
            assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=bound)
            for found, gradient in zip(case.gradients(loss), gradients, strict=True):
                assert relative(found, gradient) < bound
