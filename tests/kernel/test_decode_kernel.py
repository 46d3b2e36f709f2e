"""The Triton kernel of a decoding step: in the interpreter, and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_attention import decode, lightning_attention_step
from lightning_attention.reference import recurrent_attention

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")


def check(length, *, rows=2, heads=2, shared=1, dim=16, value_dim=16, own=False, normalize=False, per_token=False,
          hidden=False, slots=None, dtype=torch.float32, device="cpu", scale=None, seed=0):  # fmt: skip
    """A step equals the recurrence from the states of its slots, and leaves all other states alone."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.rand(*size, generator=generator).to(device)

    states = heads if own else shared
    q, k, v = (random(rows, length, h, d).to(dtype) for h, d in ((heads, dim), (shared, dim), (shared, value_dim)))
    log_decay = -random(rows, length, states) if per_token else -random(states)
    count = rows if slots is None else 6
    pool, sums = random(count, states, dim, value_dim), random(count, states, dim) + 1
    place = torch.arange(rows) if slots is None else torch.tensor(slots)
    real = (place >= 0).to(device)
    mask = (torch.rand(rows, length, generator=generator) > 0.4).to(device) if hidden else None
    seen = real[:, None].expand(rows, length) if mask is None else mask & real[:, None]
    rest = [x for x in range(count) if x not in place.tolist()]
    before = pool[rest].clone(), sums[rest].clone()
    held = [x[place.clamp(min=0)].double() for x in (pool, sums)]
    wanted, final = recurrent_attention(
        *(x.double() for x in (q, k, v, log_decay)), scale=scale, mask=seen, normalize=normalize,
        initial_state=tuple(held) if normalize else held[0], output_final_state=True,
    )  # fmt: skip
    for x in (q, k, v):
        x[~seen] = torch.nan
    out = lightning_attention_step(
        q, k, v, log_decay, (pool, sums) if normalize else pool, scale=scale, normalize=normalize, mask=mask,
        slots=None if slots is None else torch.tensor(slots, device=device),
    )  # fmt: skip
    assert out.dtype == dtype
    assert not out[~real].any()
    limit = LIMITS[dtype]
    assert (out - wanted).norm() <= limit * max(float(wanted.norm()), 1e-3)
    finals = final if normalize else (final,)
    for found, full in zip((pool, sums), finals, strict=False):
        assert (found[place[place >= 0]] - full[real]).norm() <= 1e-6 * (1 + full.norm())
    for found, full in zip((pool, sums), before, strict=True):
        assert torch.equal(found[rest], full)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_tokens_groups_and_decays(normalize, own):
    for length in (1, 3):
        check(length, heads=4, shared=2, own=own, normalize=normalize)
        check(length, heads=4, shared=2, own=own, normalize=normalize, per_token=True, hidden=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_slots(normalize):
    check(2, rows=4, slots=[3, -1, 0, 5], normalize=normalize)
    check(1, rows=2, slots=[-1, -1], normalize=normalize)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 40), (96, 16), (16, 192)])
def test_dimensions(dim, value_dim):
    check(2, dim=dim, value_dim=value_dim)
    check(1, dim=dim, value_dim=value_dim, normalize=True)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([None, 1.0]),
    st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99),
)  # fmt: skip
def test_property(length, group, normalize, hidden, scale, dtype, seed):
    check(length, heads=group, normalize=normalize, hidden=hidden, scale=scale, dtype=dtype, seed=seed)


def test_views_and_a_compiled_call():
    packed = torch.rand(2, 1, 3, 2, 16)
    q, k, v = packed.unbind(2)
    log_decay = -torch.rand(2)
    pool = torch.rand(2, 2, 16, 16)
    wanted, final = recurrent_attention(q, k, v, log_decay, initial_state=pool.clone(), output_final_state=True)
    compiled = torch.compile(lightning_attention_step, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, log_decay, pool)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(pool, final)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 64), (128, 128), (192, 96), (256, 256)])
def test_on_gpu(dtype, dim, value_dim):
    for heads, shared in ((32, 32), (32, 8), (9, 3)):
        for normalize in (False, True):
            options = {"heads": heads, "shared": shared, "dim": dim, "value_dim": value_dim, "normalize": normalize}
            check(1, dtype=dtype, device="cuda", **options)
            check(4, dtype=dtype, device="cuda", slots=[4, -1], hidden=True, per_token=True, **options)


@pytest.mark.gpu
def test_on_gpu_a_captured_step_follows_its_slots():
    q, k, v = torch.randn(3, 3, 1, 8, 128, device="cuda").bfloat16().unbind(0)
    log_decay, slots = -torch.rand(8, device="cuda"), torch.tensor([0, 2, -1], device="cuda")
    pool = torch.rand(5, 8, 128, 128, device="cuda")
    lightning_attention_step(q, k, v, log_decay, pool.clone(), slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lightning_attention_step(q, k, v, log_decay, pool, slots=slots)
    slots.copy_(torch.tensor([4, -1, 1]))
    wanted_pool = pool.clone()
    wanted = lightning_attention_step(q, k, v, log_decay, wanted_pool, slots=slots)
    graph.replay()
    assert torch.equal(out, wanted)
    assert torch.equal(pool, wanted_pool)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "shared"), [(1, 8), (64, 8), (64, 2)])
def test_on_gpu_no_launch_reads_what_the_one_before_has_not_written(rows, shared):
    """Forty steps in a graph, each on the output of the last; a launch may begin before its predecessor has ended."""
    heads, dim = 8, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(rows, 1, h, dim, generator=generator).cuda() for h in (heads, shared, shared))
    decay, start = torch.full((shared,), -0.1, device="cuda"), torch.zeros(rows, shared, dim, dim, device="cuda")
    pool = start.clone()

    def steps(step, pool, q, k, v):
        for _ in range(40):
            q = step(q, k, v, pool)
            q = q / q.norm(dim=-1, keepdim=True)
            k = q[:, :, : k.shape[2]]
        return q

    def plain(q, k, v, pool):
        pool.mul_(decay.to(pool).exp()[:, None, None]).add_(k[:, 0, :, :, None] * v[:, 0, :, None])
        return torch.einsum("bhd,bhdv->bhv", q[:, 0], pool.repeat_interleave(heads // shared, 1))[:, None] * dim**-0.5

    def kernel(q, k, v, pool):
        return lightning_attention_step(q, k, v, decay, pool)

    kernel(q, k, v, pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool.copy_(start)
        out = steps(kernel, pool, q, k, v)
    graph.replay()
    wanted = steps(plain, start.double(), *(x.double() for x in (q, k, v)))
    assert (out - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("states", "group", "config"),
    [
        (32, 1, (16, 4, False)),
        (512, 1, (64, 4, True)),
        (2048, 1, (64, 4, False)),
        (128, 4, (16, 1, True)),
        (512, 4, (32, 1, True)),
        (2048, 4, (64, 2, False)),
    ],
)
def test_how_states_are_cut(states, group, config):
    """Where all of them stay in the cache, their lines leave it first."""
    assert decode.step_config(states, 128, 128, group, False, torch.device("cpu")) == config
    assert group == 1 or decode.step_config(states, 256, 128, group, False, torch.device("cpu")) == (32, 2, False)
