"""The Triton kernels of the linear branch: in the interpreter, and on a GPU."""

import itertools
import os

import pytest
import torch
from attention_case import SLOPES, Case, relative
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning_attention import lightning_attention, lightning_attention_step, local_attention
from lightning_attention.reference import chunked_attention, recurrent_attention
from lightning_attention.shape import shape_of

EXAMPLES = int(os.environ.get("SWAPATTN_EXAMPLES", "3"))  # a second each, so none is made smaller
EXACT = 1e-5  # of float32; an exponent of 50 alone is known to 3e-6


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")


EVERYTHING = {"started": True, "final": True, "decay": True}


@pytest.mark.parametrize("length", [1, 2, 31, 32, 63, 64, 65, 127])
@pytest.mark.parametrize("normalize", [False, True])
def test_any_length(length, normalize):
    Case(length, normalize=normalize, rows=1, dim=16, value_dim=32).compare(EXACT)


@pytest.mark.parametrize(
    ("kind", "normalize", "states"),
    [
        ("fixed", True, "shared"),
        ("fixed", False, "own"),
        ("per_token", True, "own"),
        ("hidden", False, "shared"),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                ("fixed", False, "shared"),
                ("fixed", True, "own"),
                ("per_token", False, "shared"),
                ("per_token", False, "own"),
                ("per_token", True, "shared"),
                ("hidden", False, "own"),
                ("hidden", True, "shared"),
                ("hidden", True, "own"),
            )
        ),
    ],
)
def test_groups_states_and_decays(states, normalize, kind):
    options = {} if kind == "fixed" else {kind: True}
    Case(70, rows=1, heads=4, states=states, normalize=normalize, segment=32, **options, **EVERYTHING).compare(EXACT)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (2, {"slopes": (2.8, 0.96), "normalize": True, "decay": False}),
        pytest.param(2, {"shared": 1}, marks=pytest.mark.slow),
        pytest.param(
            3,
            {"shared": 1, "states": "own", "normalize": True, "hidden": True, "layout": "within"},
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"per_token": True, "started": False, "final": False}, marks=pytest.mark.slow),
    ],
)
def test_states_of_parts_of_segments(monkeypatch, parts, options):
    """96 tokens in parts of 64 and 32, or of 32 each; in the last segment some have no token.

    With a slope of 2.8 the part before the last of the walk adds nothing.
    """
    from lightning_attention import launch, linear_op

    def cut(*arguments):
        shape = shape_of(*arguments)
        assert (shape.segments, shape.parts) == (3, 1)
        return shape._replace(parts=parts)

    monkeypatch.setattr(launch, "LARGEST_TILE", 32)
    monkeypatch.setattr(linear_op, "shape_of", cut)
    Case(200, segment=96, **(EVERYTHING | options)).compare(EXACT)


@pytest.mark.parametrize(
    ("bounds", "normalize"), [pytest.param(None, True, marks=pytest.mark.slow), ([0, 280, 300], False)]
)
def test_what_has_decayed_to_nothing_is_not_read(bounds, normalize):
    """Of segments of 96 tokens in chunks of 32, the last two where nothing reaches further than 32 tokens."""
    from lightning_attention.linear_op import lightning_attention_kernel

    Case(140, rows=1, segment=65, slopes=(2.8, 0.9), normalize=normalize).compare(EXACT)  # one token in a last chunk
    case = Case(300, rows=1, bounds=bounds, slopes=(2.8,), normalize=normalize)
    wanted = case.run(lightning_attention_kernel, segment=96)
    for x in case.inputs:
        x[:, :20] = torch.nan
    case.do[:, 165:190] = torch.nan
    found = case.run(lightning_attention_kernel, segment=96)
    assert found[0][:, :96].isnan().any()
    assert torch.equal(found[0][:, 96:], wanted[0][:, 96:])
    if not normalize:  # there every gradient of the first segment hangs on its outputs
        for x, y in zip(found[-2:], wanted[-2:], strict=True):
            assert x[:, 96:165].isnan().any()
            assert torch.equal(x[:, 50:96], y[:, 50:96])


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 40), (96, 16), (16, 80)])
def test_dimensions_that_are_no_power_of_two(dim, value_dim):
    Case(40, rows=1, heads=1, shared=1, dim=dim, value_dim=value_dim, **EVERYTHING).compare(EXACT)


@pytest.mark.parametrize(
    ("segment", "normalize"),
    [(None, True), (32, False), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((None, False), (32, True)))],
)
def test_packed_sequences(segment, normalize):
    options = {"bounds": [0, 0, 1, 65, 65, 100], "layout": "within", **EVERYTHING}
    Case(100, heads=4, segment=segment, normalize=normalize, **options).compare(EXACT)


def test_half_precision_loses_no_more_than_the_plain_form():
    case = Case(100, dtype=torch.float16, rows=1)
    found, plain = case.run(lightning_attention), case.run(chunked_attention)
    for x, y, z in zip(found, plain, case.run(recurrent_attention, torch.float64), strict=True):
        assert relative(x, z) <= max(2 * relative(y, z), 1e-3)


@pytest.mark.parametrize("segment", [128, 32])
@pytest.mark.parametrize("normalize", [False, True])
def test_final_state_of_half_precision_is_kept_to_fp32(segment, normalize):
    from lightning_attention.linear_op import lightning_attention_kernel

    case = Case(100, dtype=torch.float16, rows=1, final=True, normalize=normalize)
    found, wanted = case.run(lightning_attention_kernel, segment=segment), case.run(recurrent_attention, torch.float64)
    for x, y in list(zip(found, wanted, strict=True))[1 : 2 + normalize]:
        assert relative(x.flatten(2)[:, None], y.flatten(2)[:, None]) <= 1e-5


@st.composite
def cases(draw):
    """Any call of the op with its gradients."""
    flag = st.booleans()
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any))
    packed, shared, group = draw(flag), *draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]))
    slopes = draw(st.lists(st.sampled_from([0.0, 0.0039, 0.96, 7.9, 40.0, torch.inf]), min_size=2, max_size=2))
    per_token = draw(flag)
    return {
        "length": sum(lengths) if packed else max(lengths),
        "bounds": list(itertools.accumulate(lengths, initial=0)) if packed else None,
        "rows": draw(st.integers(1, 2)), "heads": shared * group, "shared": shared,
        "dim": draw(st.sampled_from([8, 16, 24, 33])), "value_dim": draw(st.sampled_from([1, 16, 40])),
        "states": draw(st.sampled_from(["shared", "own"])), "per_token": per_token, "hidden": draw(flag),
        "normalize": draw(flag), "started": draw(flag), "final": draw(flag), "decay": draw(flag),
        "segment": draw(st.sampled_from([None, 32])), "scale": draw(st.sampled_from([None, 1.0, 128**-0.5])),
        # where infinity meets a random 0 there is no number
        "slopes": tuple(1e6 if per_token and x == torch.inf else x for x in slopes),
        "layout": draw(st.sampled_from(["plain", "heads first", "within"])), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 3, phases=[Phase.generate])
@given(options=cases())
def test_any_call_and_its_gradients(options):
    # A decay for every token enters as the difference of two sums over a chunk of 32, each known to its size * 6e-8.
    largest = 32 * min(1.44 * max(options["slopes"]), 160) if options["per_token"] else 0
    Case(**options).compare(max(EXACT, 4 * 6e-8 * largest))


def test_a_token_may_forget_all_that_came_before():
    """A decay of 0 within a chunk parts it like the boundary of a packed sequence, to full precision."""
    q, k, v = torch.randn(3, 1, 60, 2, 16).unbind(0)
    log_decay = -torch.rand(1, 60, 2)
    wanted, _ = lightning_attention(q, k, v, log_decay, cu_seqlens=torch.tensor([0, 20, 60]))
    for forget in (-1e4, -1e30, -torch.inf):
        log_decay[:, 20] = forget
        found, _ = lightning_attention(q, k, v, log_decay)
        plain, _ = chunked_attention(q, k, v, log_decay)
        assert relative(found, wanted) <= EXACT
        assert relative(plain, wanted) <= EXACT


def test_views_of_a_packed_projection_need_no_copy():
    packed = torch.randn(2, 64, 3, 2, 16)
    q, k, v = packed.unbind(2)
    log_decay = -torch.tensor(SLOPES[:2])
    out, _ = lightning_attention(q, k, v, log_decay)
    wanted, _ = recurrent_attention(q.double(), k.double(), v.double(), log_decay.double())
    assert relative(out, wanted) <= EXACT
    heads_first = torch.randn(3, 2, 2, 64, 16).transpose(2, 3)
    q, k, v = heads_first.unbind(0)
    out, _ = lightning_attention(q, k, v, log_decay)
    wanted, _ = recurrent_attention(q.double(), k.double(), v.double(), log_decay.double())
    assert relative(out, wanted) <= EXACT


@pytest.mark.parametrize("normalize", [False, True])
def test_a_prompt_equals_its_parts_and_its_tokens(normalize):
    """In one pass; in two, the second from the state of the first; in one and then token by token."""
    q, k, v = torch.rand(3, 1, 40, 2, 16).unbind(0)
    log_decay, options = -torch.tensor([0.0039, 0.96]), {"normalize": normalize, "output_final_state": True}
    whole, final = lightning_attention(q, k, v, log_decay, **options)
    first, state = lightning_attention(q[:, :33], k[:, :33], v[:, :33], log_decay, **options)
    second, last = lightning_attention(q[:, 33:], k[:, 33:], v[:, 33:], log_decay, initial_state=state, **options)
    tokens = zip(*(x[:, 33:].split(1, 1) for x in (q, k, v)), strict=True)
    steps = [lightning_attention_step(*token, log_decay, state, normalize=normalize) for token in tokens]
    for rest, end in ((second, last), (torch.cat(steps, 1), state)):
        assert relative(torch.cat((first, rest), 1), whole) <= EXACT
        pairs = zip(end, final, strict=True) if normalize else [(end, final)]
        assert all(relative(x, y) <= EXACT for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 1200]])
def test_gradient_of_the_decay_over_more_tokens_than_are_added_at_a_time(bounds):
    case = Case(1200, rows=1, heads=2, shared=1, bounds=bounds, per_token=True, segment=1280, **EVERYTHING)
    case.compare(5 * EXACT)


def test_no_decay_is_exactly_plain_linear_attention():
    """Small integers are summed without rounding, so that a factor of exactly 1 can be told from almost 1."""
    q, k, v = torch.randint(-3, 4, (3, 1, 70, 1, 16)).float().unbind(0)
    out, state = lightning_attention(q, k, v, torch.zeros(1), scale=1.0, output_final_state=True)
    seen = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
    assert torch.equal(out, torch.einsum("bthd,bthde->bthe", q, seen))
    assert torch.equal(state, seen[:, -1])


def test_hidden_tokens_may_hold_nan():
    q, k, v = torch.randn(3, 1, 40, 2, 16).unbind(0)
    mask = torch.rand(1, 40) > 0.4
    log_decay = -torch.tensor(SLOPES[1:3])
    wanted, _ = lightning_attention(q, k, v, log_decay, mask=mask)
    poisoned = [x.masked_fill(~mask[..., None, None], torch.nan) for x in (q, k, v)]
    found, _ = lightning_attention(*poisoned, log_decay, mask=mask)
    assert torch.equal(found, wanted)


def test_future_changes_no_past_bit():
    q, k, v = torch.randn(3, 1, 70, 2, 16).unbind(0)
    log_decay = -torch.tensor(SLOPES[1:3])
    wanted, _ = lightning_attention(q, k, v, log_decay)
    q[:, 45:], k[:, 45:], v[:, 45:] = 9.0, 9.0, 9.0
    found, _ = lightning_attention(q, k, v, log_decay)
    assert torch.equal(found[:, :45], wanted[:, :45])


@pytest.mark.parametrize(("normalize", "per_token", "segment"), [(False, False, 16), (True, True, 0)])
def test_operators_pass_the_checks_of_torch(normalize, per_token, segment):
    """Schema, fake implementation with symbolic sizes, and autograd under torch.compile."""
    from lightning_attention import decode, linear_op

    q, k, v = (torch.rand(1, 20, heads, 16).requires_grad_() for heads in (2, 1, 1))
    log_decay = -(torch.rand(1, 20, 1) if per_token else torch.rand(1))
    bounds = torch.tensor([0, 7, 20]) if per_token else None
    count = 2 if per_token else 1
    state = torch.rand(count, 1, 16, 16, requires_grad=True)
    sums = torch.rand(count, 1, 16, requires_grad=True) if normalize else None
    mask = torch.ones(1, 20, dtype=torch.uint8) if normalize else None
    arguments = (q, k, v, log_decay.requires_grad_(), 0.25, state, sums, True, bounds, mask, normalize, segment)
    torch.library.opcheck(
        linear_op._forward, arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    row = [x.detach()[:, :1] for x in (q, k, v)]
    pools = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16) if normalize else None
    arguments = (*row, -torch.rand(1), *pools, 0.25, torch.tensor([2]), None, normalize)
    torch.library.opcheck(decode._step, arguments, test_utils=("test_schema", "test_faketensor"))


def test_gpu_path_is_traced_without_a_gpu(monkeypatch):
    """Shapes and dtypes on fake CUDA tensors, a sequence long enough to be cut into segments."""
    from torch._subclasses import FakeTensorMode

    monkeypatch.setenv("SWAPATTN_KERNELS", "auto")
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(1, 8192, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        log_decay = torch.zeros(2, device="cuda")
        out, state = lightning_attention(q, k, v, log_decay, output_final_state=True)
        assert (out.shape, out.dtype, state.shape) == ((1, 8192, 4, 64), torch.bfloat16, (1, 2, 64, 64))
        assert local_attention(q, k, v, window=64, sinks=4).shape == out.shape


LIMITS = {torch.bfloat16: (3e-3, 6e-3), torch.float16: (1e-3, 2e-3), torch.float32: (1e-5, 1e-5)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 64), (64, 128), (128, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
)
def test_on_gpu(dtype, dim, value_dim):
    options = {"dim": dim, "value_dim": value_dim, "dtype": dtype, "device": "cuda", "started": True, "final": True}
    for scale in (None, 1.0):
        Case(500, heads=4, scale=scale, **options).compare(*LIMITS[dtype])
    Case(512, heads=4, segment=256, **options).compare(*LIMITS[dtype])
    Case(512, heads=6, **options).compare(*LIMITS[dtype])


def test_chunks_in_flight_fit_the_memory():
    """A program of dk and dv reads the tiles of all query heads of a group."""
    from lightning_attention.launch import in_memory, sweep_config

    config, device = sweep_config("dkv", 128, 128, torch.bfloat16), torch.device("cpu")
    assert in_memory(config, 1, 192, 2, device) == config
    assert in_memory(config, 8, 192, 2, device) == config._replace(stages=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("heads", [14, 32])
def test_on_gpu_large_groups(dim, heads):
    """Of 7 and 16 query heads: their tiles fill the shared memory."""
    options = {"dim": dim, "value_dim": 128, "dtype": torch.bfloat16, "device": "cuda", "started": True, "final": True}
    Case(100, heads=heads, **options).compare(*LIMITS[torch.bfloat16])
    Case(600, heads=heads, segment=256, rows=1, **options).compare(*LIMITS[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"per_token": True, "decay": True}, {"hidden": True}, {"scale": 1.0}])
@pytest.mark.parametrize("dim", [96, 128])
def test_on_gpu_narrow_programs(dim, options):
    """Enough sequences and heads for half the device, so that a program takes half the columns."""
    case = Case(
        500, heads=32, shared=32, dim=dim, value_dim=128, dtype=torch.bfloat16, device="cuda",
        started=True, final=True, **options,
    )  # fmt: skip
    q, k, v = case.inputs
    assert shape_of(q, k, v, case.log_decay, None, False, False).narrow
    case.compare(3e-3, 3e-2 if "decay" in options else 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 64), (128, 128), (256, 128)])
@pytest.mark.parametrize("heads", [2, 6])
def test_on_gpu_normalised(dtype, dim, value_dim, heads):
    options = {"dim": dim, "value_dim": value_dim, "dtype": dtype, "device": "cuda", "normalize": True, "heads": heads}
    output, gradient = LIMITS[dtype]  # a gradient through the sum is a difference: the plain form loses as much
    Case(500, started=True, final=True, **options).compare(output, 2 * gradient)
    Case(500, hidden=True, **options).compare(output, 2 * gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 1000, 4097])
@pytest.mark.parametrize("kind", ["fixed", "per_token", "hidden"])
def test_on_gpu_any_length(length, kind):
    options = {} if kind == "fixed" else {kind: True}
    case = Case(length, rows=1, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda", heads=4, **options)
    limits = LIMITS[torch.bfloat16] if length > 8 else (5e-3, 8e-3)  # of few tokens no roundings average out
    case.compare(*limits)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "hidden"), [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("value_dim", [64, 128])
def test_on_gpu_gradient_of_a_decay_for_every_token(heads, hidden, value_dim):
    """A sum over the tokens behind each, of products that all but cancel: what bf16 leaves of it."""
    options = {"per_token": True, "decay": True, "heads": heads, "hidden": hidden, "started": True, "final": True}
    Case(1500, dim=128, value_dim=value_dim, dtype=torch.bfloat16, device="cuda", **options).compare(5e-3, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("segment", [None, 128])
def test_on_gpu_packed(segment):
    bounds = [0, 0, 1, 500, 500, 1000]
    options = {"dim": 128, "value_dim": 128, "dtype": torch.bfloat16, "device": "cuda", "heads": 4}
    Case(1000, bounds=bounds, segment=segment, started=True, final=True, **options).compare(*LIMITS[torch.bfloat16])


@pytest.mark.gpu
def test_on_gpu_long_and_large():
    """Prefill in parts equals prefill; offsets beyond 2^31 elements."""
    q, k, v = torch.randn(3, 1, 131072, 2, 128, device="cuda").bfloat16().unbind(0)
    log_decay = -torch.tensor([0.0039, 0.96], device="cuda")
    out, final = lightning_attention(q, k, v, log_decay, output_final_state=True)
    cut = 70001
    first, state = lightning_attention(q[:, :cut], k[:, :cut], v[:, :cut], log_decay, output_final_state=True)
    second, last = lightning_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], log_decay, initial_state=state, output_final_state=True
    )
    assert relative(torch.cat((first, second), 1), out) <= 3e-3
    assert relative(last.flatten(2)[:, None], final.flatten(2)[:, None]) <= 1e-3
    del q, k, v, out, first, second
    x = torch.randn(3, 16384, 2, 64, device="cuda").bfloat16()
    big = torch.empty(2**31 // (16384 * 128) + 2, 16384, 2, 64, device="cuda", dtype=torch.bfloat16)
    big[-1] = x[0]
    out, _ = lightning_attention(big, big, big, log_decay)
    wanted, _ = lightning_attention(x[:1], x[:1], x[:1], log_decay)
    assert relative(out[-1:], wanted) <= 3e-3  # programs of half the columns where they are few: other chunks


@pytest.mark.gpu
def test_on_gpu_runs_are_equal_and_graphs_replay():
    case = Case(1000, heads=4, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda", final=True)
    first, second = case.run(lightning_attention), case.run(lightning_attention)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    compiled = case.run(torch.compile(lightning_attention, fullgraph=True))
    assert all(torch.equal(x, y) for x, y in zip(first, compiled, strict=True))
    q, k, v = case.inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = lightning_attention(q, k, v, case.log_decay)
    q.mul_(2)
    graph.replay()
    wanted, _ = lightning_attention(q, k, v, case.log_decay)
    assert torch.equal(out, wanted)
