"""Offsets beyond 2^31 elements in every kernel: small tensors spread over memory that is reserved and never touched."""

import mmap

import pytest
import torch
from lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    local_attention,
    local_attention_cached,
    merged_local_attention,
)
from lightning_attention.linear_op import lightning_attention_kernel

NO_RESERVE = 0x4000
FAR = 2**31


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The interpreter copies all the memory that an operand lies in, to itself on a CPU: here 17 GB."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda _, arguments, named: (arguments, named))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def spread():
    """Copies a tensor so that its last step along `axis` passes 2^31 elements.

    The memory starts as far before it: an offset that lost its upper bits reads zeros, and does not crash.
    """
    rooms, used = {}, {}

    def place(x, axis):
        if x.dtype not in rooms:
            size = (2 * FAR + 2**20) * x.element_size()
            room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
            rooms[x.dtype], used[x.dtype] = torch.frombuffer(room, dtype=x.dtype), FAR
        start = used[x.dtype]
        used[x.dtype] += x.numel()
        strides, size = [0] * x.dim(), 1
        for i in reversed(range(x.dim())):
            if i != axis:
                strides[i], size = size, size * x.shape[i]
        strides[axis] = -(-FAR // (x.shape[axis] - 1)) // 64 * 64 + 64
        return rooms[x.dtype].as_strided(x.shape, strides, start).copy_(x)

    return place


def operands(rows=3, length=20, heads=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, length, heads, 16, generator=generator).half() for _ in range(4)]


def results(form, tensors):
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out = form(*leaves)
    return [out, *torch.autograd.grad(out, leaves, tensors[3])]


ROW, TOKEN, HEAD = 0, 1, 2


@pytest.mark.parametrize(
    ("axis", "options"),
    [
        (ROW, {}),
        (TOKEN, {"mask": torch.arange(20)[None] != 3}),
        (HEAD, {}),
        (HEAD, {"segment": 16, "normalize": True}),
    ],
)
def test_forward_and_backward(spread, axis, options):
    rows, heads = (3, 1) if axis == ROW else (1, 3)
    log_decay = -torch.tensor([0.0, 0.1, 0.9])[:heads]

    def form(q, k, v):
        return lightning_attention_kernel(q, k, v, log_decay, **options)[0]

    tensors = [x.abs() for x in operands(rows, heads=heads)]
    wanted = results(form, tensors)
    for x, y in zip(results(form, [spread(x.detach(), axis) for x in tensors]), wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("states", [3, 1])
def test_gradient_of_the_decay_with_grouped_heads(spread, states):
    """Several query heads in one program, each with an offset of its own."""
    log_decay = -torch.full((states,), 0.1)

    def form(q, k, v, log_decay):
        return lightning_attention(q, k[:, :, :1], v[:, :, :1], log_decay)[0]

    near, found = operands(1), []
    for q, k, v, do in (near, [spread(x, HEAD) for x in near]):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
        found.append(torch.autograd.grad(form(*leaves), leaves, do))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("axis", [ROW, TOKEN, HEAD])
def test_step_and_its_pool(spread, axis):
    q, k, v, _ = operands(length=2)
    log_decay, slots = -torch.tensor([0.0, 0.1, 0.9]), torch.tensor([2, -1, 0])
    pool = torch.randn(3, 3, 16, 16)
    far = [spread(x, axis) for x in (q, k, v)]
    far_pool = spread(pool, min(axis, 1))
    out = lightning_attention_step(*far, log_decay, far_pool, slots=slots)
    torch.testing.assert_close(out, lightning_attention_step(q, k, v, log_decay, pool, slots=slots))
    torch.testing.assert_close(far_pool.contiguous(), pool)


MASKED = [(False, ROW), (True, TOKEN), (False, HEAD)]
MASKED += [pytest.param(*x, marks=pytest.mark.slow) for x in ((True, ROW), (False, TOKEN), (True, HEAD))]


@pytest.mark.parametrize(("masked", "axis"), MASKED)
def test_window(spread, axis, masked):
    rows = 3 if axis == ROW else 1
    mask = torch.rand(rows, 20, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None

    def form(q, k, v):
        return local_attention(q, k, v, window=6, sinks=2, mask=mask)

    tensors = operands(rows)
    wanted = results(form, tensors)
    for x, y in zip(results(form, [spread(x.detach(), axis) for x in tensors]), wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("masked", "axis"), MASKED)
def test_other_attention_of_a_merge(spread, axis, masked):
    rows = 3 if axis == ROW else 1
    mask = torch.rand(rows, 20, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    *tensors, do = operands(rows)
    log_sum, scale = torch.zeros(rows, 20, 3), torch.full((3, 16), 0.7)

    def form(q, k, other):
        return merged_local_attention(q, k, q, other, log_sum, scale, window=6, sinks=2, mask=mask)

    wanted = results(form, [*tensors, do])
    for x, y in zip(results(form, [*tensors[:2], spread(tensors[2].detach(), axis), do]), wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("axis", [ROW, TOKEN, HEAD])
def test_window_of_a_cache(spread, axis):
    positions = torch.arange(20).expand(3, 20)
    options = {"k_positions": positions, "q_positions": positions, "window": 6, "sinks": 2}
    tensors = operands()[:3]
    found = local_attention_cached(*(spread(x, axis) for x in tensors), **options)
    torch.testing.assert_close(found, local_attention_cached(*tensors, **options))


@pytest.mark.gpu
def test_on_gpu_heads_far_apart():
    room = torch.zeros(2 * FAR + 2**20, dtype=torch.bfloat16, device="cuda")
    near = [torch.randn(1, 64, 3, 64, device="cuda").bfloat16() for _ in range(4)]
    # No two of them overlap: a head takes 2^12 elements.
    strides = (0, 64, FAR // 2 + 64, 1)
    far = [room.as_strided(x.shape, strides, FAR + i * 2**14).copy_(x) for i, x in enumerate(near)]
    log_decay = -torch.tensor([0.0, 0.1, 0.9], device="cuda")
    for options in ({}, {"normalize": True}):
        found, wanted = (
            results(lambda *x: lightning_attention(*x, log_decay, **options)[0], [x.detach() for x in tensors])  # noqa: B023
            for tensors in (far, near)
        )
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
