"""The three plain forms of the op agree with each other, in outputs, states and every gradient."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_attention.reference import chunked_attention, quadratic_attention, recurrent_attention

LENGTHS = (1, 2, 63, 64, 65, 127, 300)
SLOPES = (0.0, 0.0039, 0.96, 7.9)
# Each form sums in its own order; float64 leaves this much room for sums over 300 tokens.
EXACT = 1e-10


def make(
    length,
    *,
    rows=2,
    heads=4,
    shared=2,
    dim=5,
    value_dim=3,
    decay="shared",
    dtype=torch.float64,
    seed=0,
    features=False,
):
    """q, k, v and a decay: `shared` or `query` fixed per head, `token` or `token_query` for every token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(rows, length, heads, dim), draw(rows, length, shared, dim), draw(rows, length, shared, value_dim)
    if features:
        q, k = q.abs(), k.abs()
    count = heads if decay.endswith("query") else shared
    slopes = torch.tensor(SLOPES).repeat(3)[3 - count % 2 :][:count]
    log_decay = -(draw(rows, length, count).abs() if decay.startswith("token") else slopes.double())
    wide = log_decay if dtype == torch.float64 else log_decay.float()
    return q.to(dtype), k.to(dtype), v.to(dtype), wide


def first_state(inputs, sequences, normalize=False, seed=1):
    q, _, v, log_decay = inputs
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, log_decay.shape[-1], q.shape[-1])
    state = torch.randn(*shape, v.shape[-1], generator=generator, dtype=torch.float64)
    return (state, torch.rand(*shape, generator=generator, dtype=torch.float64)) if normalize else state


def flat(result):
    out, state = result
    return [out, *(state if isinstance(state, tuple) else [state])]


def worst(found, wanted):
    assert len(found) == len(wanted)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, wanted, strict=True))


def with_gradients(form, inputs, state, **options):
    """Outputs, final states and the gradients of every input for a fixed direction."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *(state if isinstance(state, tuple) else [state]))]
    start = tuple(leaves[4:]) if len(leaves) == 6 else leaves[4]
    results = flat(form(*leaves[:4], initial_state=start, output_final_state=True, **options))
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", ["shared", "query", "token", "token_query"])
def test_forms_agree_with_every_gradient(length, decay):
    inputs = make(length, rows=1 if length > 100 else 2, decay=decay)
    state = first_state(inputs, inputs[0].shape[0])
    oracle = with_gradients(quadratic_attention, inputs, state)
    assert worst(with_gradients(chunked_attention, inputs, state), oracle) < EXACT
    if length < 100:
        assert worst(with_gradients(recurrent_attention, inputs, state), oracle) < EXACT


@pytest.mark.parametrize("length", [1000, 4097])
@pytest.mark.parametrize("decay", ["shared", "token"])
def test_long_sequences(length, decay):
    """Many chunks, and several blocks of the scan over their states."""
    inputs = make(length, rows=1, decay=decay)
    state = first_state(inputs, 1)
    wanted = recurrent_attention(*inputs, initial_state=state, output_final_state=True)
    assert worst(flat(chunked_attention(*inputs, initial_state=state, output_final_state=True)), flat(wanted)) < EXACT


@pytest.mark.parametrize("length", [1, 65, 127])
@pytest.mark.parametrize("decay", ["shared", "query", "token"])
def test_normalized_forms_agree_with_every_gradient(length, decay):
    inputs = make(length, decay=decay, features=True)
    state = first_state(inputs, 2, normalize=True)
    oracle = with_gradients(quadratic_attention, inputs, state, normalize=True)
    for form in (chunked_attention, recurrent_attention):
        assert worst(with_gradients(form, inputs, state, normalize=True), oracle) < EXACT


def test_definition_by_hand():
    """Two heads on one key head, three tokens: the sum of the definition written out."""
    q, k, v, log_decay = make(3, rows=1, heads=2, shared=1)
    log_decay = torch.tensor([-0.5], dtype=torch.float64)
    out, _ = chunked_attention(q, k, v, log_decay, scale=0.3)
    for head in range(2):
        weights = [0.3 * torch.exp(log_decay * (2 - s)) * (q[0, 2, head] @ k[0, s, 0]) for s in range(3)]
        torch.testing.assert_close(out[0, 2, head], sum(w * v[0, s, 0] for s, w in enumerate(weights)))


@pytest.mark.parametrize("form", [quadratic_attention, chunked_attention, recurrent_attention])
@pytest.mark.parametrize("decay", ["shared", "query", "token", "token_query"])
def test_shared_heads_equal_repeated_heads(form, decay):
    """Query head h reads key head h // (Hq // Hkv). Tiling the heads instead must be told apart."""
    q, k, v, log_decay = make(70, rows=1, heads=6, shared=2, decay=decay)
    out, _ = form(q, k, v, log_decay)
    full = log_decay if log_decay.shape[-1] == 6 else log_decay.repeat_interleave(3, -1)
    repeated, _ = form(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), full)
    assert worst([out], [repeated]) < EXACT
    tiled, _ = form(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1), full)
    assert worst([out], [tiled]) > 1e-2


@pytest.mark.parametrize("decay", ["shared", "query"])
def test_state_has_the_heads_of_the_decay(decay):
    inputs = make(65, decay=decay)
    for form in (quadratic_attention, chunked_attention, recurrent_attention):
        _, state = form(*inputs, output_final_state=True)
        assert state.shape == (2, 2 if decay == "shared" else 4, 5, 3)
        assert form(*inputs)[1] is None


@pytest.mark.parametrize("decay", ["shared", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pieces_equal_one_pass(decay, normalize):
    q, k, v, log_decay = make(150, decay=decay, features=normalize)
    options = {"normalize": normalize, "output_final_state": True}
    whole = chunked_attention(q, k, v, log_decay, **options)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 70), (70, 134), (134, 150)):
        part = log_decay if log_decay.dim() == 1 else log_decay[:, start:stop]
        piece, state = chunked_attention(
            q[:, start:stop], k[:, start:stop], v[:, start:stop], part, initial_state=state, **options
        )
        pieces.append(piece)
    assert worst(flat((torch.cat(pieces, 1), state)), flat(whole)) < EXACT


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 128, 1000])
@pytest.mark.parametrize("decay", ["shared", "token"])
def test_chunk_size_changes_nothing(chunk_size, decay):
    """Chunks of one token also take the scan over several blocks of states."""
    inputs = make(150, decay=decay)
    state = first_state(inputs, 2)
    wanted = quadratic_attention(*inputs, initial_state=state, output_final_state=True)
    found = chunked_attention(*inputs, initial_state=state, output_final_state=True, chunk_size=chunk_size)
    assert worst(flat(found), flat(wanted)) < EXACT


@pytest.mark.parametrize("decay", ["shared", "token"])
def test_future_tokens_change_nothing(decay):
    q, k, v, log_decay = make(130, decay=decay)
    out, _ = chunked_attention(q, k, v, log_decay)
    k, v = k.clone(), v.clone()
    k[:, 100:] += 1e6
    v[:, 100:] -= 1e6
    later, _ = chunked_attention(q, k, v, log_decay)
    assert torch.equal(out[:, :100], later[:, :100])
    assert not torch.allclose(out[:, 100:], later[:, 100:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_decay_is_exactly_plain_linear_attention(dtype):
    """Small integers are summed without rounding, so that a factor of exactly 1 can be told from almost 1."""
    q, k, v, _ = make(300, rows=1)
    q, k, v = (x.mul(2).round().to(dtype) for x in (q, k, v))
    out, state = chunked_attention(q, k, v, torch.zeros(2), scale=1.0, output_final_state=True)
    seen = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
    assert torch.equal(out, torch.einsum("bthgd,bthde->bthge", q.unflatten(2, (2, 2)), seen).flatten(2, 3))
    assert torch.equal(state, seen[:, -1])


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_all_slopes_are_finite_in_float32(slope, per_token):
    q, k, v, _ = make(300, rows=1, dtype=torch.float32)
    log_decay = torch.full((1, 300, 2) if per_token else (2,), -slope)
    state = first_state((q, k, v, log_decay), 1).float()
    found = with_gradients(chunked_attention, (q, k, v, log_decay), state)
    assert all(x.isfinite().all() for x in found)
    wide = [x.double() for x in (q, k, v, log_decay)]
    wanted, _ = quadratic_attention(*wide, initial_state=state)
    naive, _ = recurrent_attention(q, k, v, log_decay, initial_state=state)
    lost = (naive - wanted).norm() / wanted.norm()
    assert (found[0] - wanted).norm() / wanted.norm() < max(2 * lost, 1e-6)


def masks():
    left, right, middle, none = (torch.ones(2, 90, dtype=torch.bool) for _ in range(4))
    left[0, :70] = False
    right[1, 3:] = False
    middle[0, 10:75] = False
    middle[1, ::3] = False
    none[0] = False
    return {"left": left, "right": right, "middle": middle, "whole row": none}


@pytest.mark.parametrize("where", masks())
@pytest.mark.parametrize("decay", ["shared", "query", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_masked_tokens_are_as_absent(where, decay, normalize):
    """Even NaN in a masked token reaches no output, no state, no gradient."""
    mask = masks()[where]
    inputs = make(90, decay=decay, features=normalize)
    state = first_state(inputs, 2, normalize)
    poisoned = [
        x if x.dim() == 1 else x.masked_fill(~mask.view(2, 90, *[1] * (x.dim() - 2)), torch.nan) for x in inputs
    ]
    for form in (quadratic_attention, chunked_attention, recurrent_attention):
        found = with_gradients(form, poisoned, state, mask=mask, normalize=normalize)
        assert all(x.isfinite().all() for x in found)
        out, states = found[0], found[1 : 3 if normalize else 2]
        for row in range(2):
            real = mask[row]
            alone = [x if x.dim() == 1 else x[row : row + 1, real] for x in inputs]
            start = tuple(x[row : row + 1] for x in state) if normalize else state[row : row + 1]
            wanted = form(*alone, initial_state=start, output_final_state=True, normalize=normalize)
            assert not out[row, ~real].any()
            assert worst([x[row : row + 1] for x in states], flat(wanted)[1:]) < EXACT
            if real.any():
                assert worst([out[row : row + 1, real]], [wanted[0]]) < EXACT


BOUNDARIES = {
    "one": [0, 130],
    "many": [0, 0, 1, 2, 66, 66, 66, 130],
    "short": [0, 1, 2, 3, 4, 70, 129, 130],
    "empty ends": [0, 0, 0, 65, 130, 130, 130],
}


@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES)
@pytest.mark.parametrize("decay", ["shared", "query", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_packed_sequences_equal_each_alone(bounds, decay, normalize):
    q, k, v, log_decay = inputs = make(130, rows=1, decay=decay, features=normalize)
    state = first_state(inputs, len(bounds) - 1, normalize)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "normalize": normalize}
    oracle = with_gradients(quadratic_attention, inputs, state, **options)
    for form in (chunked_attention, recurrent_attention):
        assert worst(with_gradients(form, inputs, state, **options), oracle) < EXACT
    assert worst(with_gradients(chunked_attention, inputs, state, chunk_size=8, **options), oracle) < EXACT
    for i, (start, stop) in enumerate(pairwise(bounds)):
        part = log_decay if log_decay.dim() == 1 else log_decay[:, start:stop]
        own = tuple(x[i : i + 1] for x in state) if normalize else state[i : i + 1]
        alone = chunked_attention(
            q[:, start:stop],
            k[:, start:stop],
            v[:, start:stop],
            part,
            initial_state=own,
            output_final_state=True,
            normalize=normalize,
        )
        states = [x[i : i + 1] for x in oracle[1 : 3 if normalize else 2]]
        assert worst(states, flat(alone)[1:]) < EXACT
        if stop > start:
            assert worst([oracle[0][:, start:stop]], [alone[0]]) < EXACT


def test_packed_without_initial_state_and_with_a_mask():
    inputs = make(130, rows=1)
    bounds = torch.tensor([0, 40, 40, 41, 130])
    mask = torch.arange(130)[None] % 5 != 0
    options = {"cu_seqlens": bounds, "mask": mask, "output_final_state": True}
    wanted = flat(quadratic_attention(*inputs, **options))
    assert worst(flat(chunked_attention(*inputs, **options)), wanted) < EXACT
    assert worst(flat(recurrent_attention(*inputs, **options)), wanted) < EXACT


def test_no_tokens_return_the_state():
    inputs = make(0)
    state = first_state(inputs, 2)
    for form in (quadratic_attention, chunked_attention, recurrent_attention):
        out, final = form(*inputs, initial_state=state, output_final_state=True)
        assert out.shape == (2, 0, 4, 3)
        assert torch.equal(final, state)


def plain_half(q, k, v, log_decay, normalize):
    """What a few lines of PyTorch in half precision give: all weights at once, every product rounded."""
    groups, steps = q.shape[2] // k.shape[2], torch.arange(q.shape[1])
    k, v, log_decay = (
        k.repeat_interleave(groups, 2),
        v.repeat_interleave(groups, 2),
        log_decay.repeat_interleave(groups),
    )
    decay = (log_decay[:, None, None] * (steps[:, None] - steps).clamp(min=0)).exp().tril().to(q.dtype)
    weights = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k) * decay
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    return out / weights.sum(-1).transpose(1, 2)[..., None] if normalize else out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_error(dtype, normalize):
    """Relative error against float64 on the same rounded inputs, at most twice that of the plain form of its kind.

    With float32 matmuls (the CPU) that is the recurrence, which rounds its output only; with matmuls in half precision
    (a GPU) it is the quadratic form written in half precision, for both round their scores and weights.
    """
    inputs = make(300, dim=64, value_dim=64, rows=1, dtype=dtype, features=normalize)
    options = {"normalize": normalize, "output_final_state": True}
    wanted = flat(quadratic_attention(*(x.double() for x in inputs), **options))

    def lost(out):
        assert out.dtype == dtype
        return ((out.double() - wanted[0]).norm() / wanted[0].norm()).item()

    careful = flat(chunked_attention(*inputs, **options))
    assert lost(careful[0]) < 2 * lost(recurrent_attention(*inputs, **options)[0])
    fast = flat(chunked_attention(*inputs, matmul_dtype=dtype, **options))
    assert lost(careful[0]) < lost(fast[0]) < 2 * lost(plain_half(*inputs, normalize))
    for states in (careful[1:], fast[1:]):
        assert all(x.dtype == torch.float32 for x in states)
        assert worst([x.double() for x in states], wanted[1:]) < 1e-5


def test_long_sums_stay_finite_with_float16_matmuls():
    """The state of 200 equal tokens of size 20 is 80000, beyond float16; the output is not."""
    q = torch.full((1, 200, 1, 4), 1e-3, dtype=torch.float16)
    k = v = torch.full((1, 200, 1, 4), 20.0, dtype=torch.float16)
    out, state = chunked_attention(q, k, v, torch.zeros(1), output_final_state=True, matmul_dtype=torch.float16)
    assert out.isfinite().all()
    torch.testing.assert_close(state, torch.full((1, 1, 4, 4), 80000.0))


def test_autocast_leaves_float32_alone():
    inputs = make(100, dtype=torch.float32)
    plain = chunked_attention(*inputs, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst(flat(chunked_attention(*inputs, output_final_state=True)), flat(plain)) == 0


def test_strided_inputs():
    """q, k and v as views of one projection, with the heads before the tokens for good measure."""
    packed = torch.randn(2, 70, 8, 6, dtype=torch.float64)
    q, k, v = packed.split([4, 2, 2], 2)
    log_decay = -torch.rand(2, dtype=torch.float64)
    wanted = chunked_attention(q.contiguous(), k.contiguous(), v.contiguous(), log_decay)
    assert torch.equal(chunked_attention(q, k, v, log_decay)[0], wanted[0])
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(chunked_attention(*turned, log_decay)[0], wanted[0])


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 90),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    decay=st.sampled_from(["shared", "query", "token", "token_query"]),
    chunk_size=st.integers(1, 70),
    normalize=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(length, groups, shared, dims, decay, chunk_size, normalize, masked, seed):
    inputs = make(
        length,
        heads=groups * shared,
        shared=shared,
        dim=dims[0],
        value_dim=dims[1],
        decay=decay,
        features=normalize,
        seed=seed,
    )
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    options = {"mask": mask, "normalize": normalize, "output_final_state": True}
    wanted = flat(quadratic_attention(*inputs, **options))
    assert worst(flat(chunked_attention(*inputs, chunk_size=chunk_size, **options)), wanted) < EXACT
    assert worst(flat(recurrent_attention(*inputs, **options)), wanted) < EXACT


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    chunk_size=st.integers(1, 50),
    decay=st.sampled_from(["shared", "token"]),
)
def test_any_packing(lengths, chunk_size, decay):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(int(bounds[-1]), rows=1, decay=decay)
    options = {"cu_seqlens": bounds, "output_final_state": True, "initial_state": first_state(inputs, len(lengths))}
    wanted = flat(quadratic_attention(*inputs, **options))
    assert worst(flat(chunked_attention(*inputs, chunk_size=chunk_size, **options)), wanted) < EXACT
