"""The learnt features: their formula in plain PyTorch, and the Triton kernels in the interpreter and on a GPU."""

import pytest
import torch
from lightning_attention import hedgehog_features
from torch.nn import functional as F


def make(dim, hidden, *, heads=2, branches=1, rows=2, length=45, dtype=torch.float64, device="cpu"):
    """x as a view with further heads beside it, the matrices in fp32 (fp64), and a gradient of the features."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(device)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = random(rows, length, heads + 1, dim).to(dtype)[:, :, :heads]
    sizes = [(dim, dim), *([(dim, hidden), (hidden, dim)] if hidden else [])]
    matrices = [random(branches * heads, *size).to(exact) / size[0] ** 0.5 for size in sizes]
    return [x, *matrices], random(rows, length, branches * heads, 2 * dim).to(dtype)


def formula(x, weight, up=None, down=None, *, scale=1.0):
    """Head by head, as the docstring says it."""
    found = []
    for head in range(weight.shape[0]):
        of_head = x[:, :, head % x.shape[2]] * scale
        y = of_head @ weight[head]
        if up is not None:
            y = y + F.silu(of_head @ up[head]) @ down[head]
        found.append(torch.cat((y, -y), -1).softmax(-1))
    return torch.stack(found, 2)


def with_gradients(function, inputs, gradient, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def errors(found, wanted):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def exact(inputs, gradient, **options):
    return with_gradients(formula, [x.double() for x in inputs], gradient.double(), **options)


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("branches", [1, 3])
def test_the_plain_form_is_the_formula(hidden, branches):
    inputs, gradient = make(6, hidden, branches=branches)
    found = with_gradients(hedgehog_features, inputs, gradient, scale=0.7)
    assert max(errors(found, exact(inputs, gradient, scale=0.7))) < 1e-12
    assert torch.allclose(found[0].sum(-1), torch.ones(()).double())


FLOATS = ((torch.float32, 1e-6), (torch.float16, 2e-3))  # and how far the kernels may be from the formula


@pytest.mark.parametrize(
    ("dtype", "bound", "dim", "hidden", "heads", "branches"),
    [
        *((*dtype, *sizes) for dtype in FLOATS for sizes in ((8, 16, 2, 1), (16, 0, 3, 2), (24, 48, 1, 3))),
        (*FLOATS[1], 80, 160, 1, 1),
    ],
)
def test_the_kernels_are_the_formula_in_the_interpreter(dtype, bound, dim, hidden, heads, branches, monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    inputs, gradient = make(dim, hidden, heads=heads, branches=branches, dtype=dtype)
    found = with_gradients(hedgehog_features, inputs, gradient, scale=0.7)
    assert found[0].dtype == dtype
    assert [x.dtype for x in found[2:]] == [torch.float32] * len(found[2:])
    assert max(errors(found, exact(inputs, gradient, scale=0.7))) < bound


def test_a_program_that_owns_several_blocks_computes_them_all(monkeypatch):
    from lightning_attention import features_op

    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    monkeypatch.setattr(features_op, "processors", lambda device: 1)
    inputs, gradient = make(8, 16, length=150, dtype=torch.float32)
    found = with_gradients(hedgehog_features, inputs, gradient)
    assert max(errors(found, exact(inputs, gradient))) < 1e-6


@pytest.mark.parametrize(("dtype", "dim", "largest"), [(torch.float32, 72, 64), (torch.float16, 136, 128)])
def test_dimensions_that_the_kernels_do_not_take_are_computed_unless_asked_of_them(dtype, dim, largest, monkeypatch):
    inputs, gradient = make(dim, 0, heads=1, rows=1, length=3, dtype=dtype)
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    message = f"kernels cannot take this call: {dim} dimensions in {dtype} are more than {largest}"
    with pytest.raises(ValueError, match=message):
        hedgehog_features(*inputs)
    monkeypatch.delenv("SWAPATTN_KERNELS")
    found = with_gradients(hedgehog_features, inputs, gradient)
    assert max(errors(found, exact(inputs, gradient))) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("trained", [(0,), (1, 2, 3), (2,)])
def test_what_needs_no_gradient_gets_none(trained, monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    inputs, gradient = make(8, 16, branches=2, dtype=torch.float32)
    leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    found = torch.autograd.grad(hedgehog_features(*leaves), [leaves[i] for i in trained], gradient)
    wanted = exact(inputs, gradient)[1:]
    assert max(errors(found, [wanted[i] for i in trained])) < 1e-6


def test_small_gpus_get_small_tiles(monkeypatch):
    from lightning_attention import features_op

    def config(dim):
        return features_op.features_config("input", dim, 2 * dim, torch.bfloat16, torch.device("cpu"))

    blocks = []
    for memory in (65536, 101376, 232448):
        monkeypatch.setattr(features_op, "shared_memory", lambda device, memory=memory: memory)
        blocks.append(config(64).block)
    assert blocks == [16, 32, 128]
    monkeypatch.setattr(features_op, "shared_memory", lambda device: 65536)
    with pytest.raises(RuntimeError, match=r"features of 128 dimensions need 98304 bytes.*SWAPATTN_KERNELS=torch"):
        config(128)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_no_tokens_no_features(kernels, monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", kernels)
    inputs, _ = make(8, 16, length=0, dtype=torch.float32)
    assert hedgehog_features(*inputs).shape == (2, 0, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, a, b: (x[0], w, a, b), r"x: expected 4 dimensions"),
        (lambda x, w, a, b: (x, w[:1], a, b), r"weight: expected \[H, 8, 8\] with H a multiple of 2"),
        (lambda x, w, a, b: (x, w[:, :4], a, b), r"weight: expected"),
        (lambda x, w, a, b: (x, w[:0], a, b), r"weight: expected"),
        (lambda x, w, a, b: (x[:, :, :0], w, a, b), r"weight: expected \[H, 8, 8\] with H a multiple of 0"),
        (lambda x, w, a, b: (x, w, a, None), r"up and down: expected both or neither"),
        (lambda x, w, a, b: (x, w, a, b[:, :3]), r"down: expected shape \[2, 16, 8\]"),
        (lambda x, w, a, b: (x, w, a[:1], b), r"up: expected shape \[2, 8, 16\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs, _ = make(8, 16)
    with pytest.raises(ValueError, match=message):
        hedgehog_features(*change(*inputs))


def test_the_operators_keep_the_rules_of_torch_library(monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    from lightning_attention import features_op

    (x, *matrices), gradient = make(8, 16, branches=2, dtype=torch.float32)
    leaves = [m.requires_grad_() for m in (x, *matrices)]
    torch.library.opcheck(features_op._features, (*leaves, 0.5), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        features_op._backward, (gradient, x, *matrices, 0.5, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_kernels_are_as_good_as_the_plain_form(dtype, dim, mlp, branches, monkeypatch):
    inputs, gradient = make(
        dim, 2 * dim if mlp else 0, heads=3, branches=branches, length=1000, dtype=dtype, device="cuda"
    )
    found = with_gradients(hedgehog_features, inputs, gradient, scale=dim**-0.25)
    wanted = exact(inputs, gradient, scale=dim**-0.25)
    monkeypatch.setenv("SWAPATTN_KERNELS", "torch")
    plain = with_gradients(hedgehog_features, inputs, gradient, scale=dim**-0.25)
    for own, other in zip(errors(found, wanted), errors(plain, wanted), strict=True):
        assert own < max(1.2 * other, 1e-6)


@pytest.mark.gpu
def test_on_a_gpu_they_compile_whole_are_recorded_and_give_the_same_bits_twice():
    inputs, gradient = make(64, 128, heads=9, branches=4, length=500, dtype=torch.bfloat16, device="cuda")

    def work(function):
        return with_gradients(function, inputs, gradient, scale=0.5)

    first, again = work(hedgehog_features), work(hedgehog_features)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    compiled = work(torch.compile(hedgehog_features, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(first, compiled, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work(hedgehog_features)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, recorded, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_more_than_2_31_features():
    (x, *matrices), _ = make(64, 0, heads=1, rows=1, length=1, dtype=torch.bfloat16, device="cuda")
    long = x.expand(1, 2**31 // 128 + 64, 1, 64)
    with torch.no_grad():
        out = hedgehog_features(long, *matrices)
        assert torch.equal(out[0, -1], hedgehog_features(x, *matrices)[0, 0])
