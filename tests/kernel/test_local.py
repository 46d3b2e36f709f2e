"""The softmax window with sinks against a dense softmax that walks over queries one by one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_attention import local_attention, local_attention_cached, merged_local_attention

EXACT = 1e-10


def make(length, *, rows=2, heads=4, shared=2, dim=5, value_dim=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (shared, dim), (shared, value_dim))
    return [torch.randn(rows, length, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, window, sinks, scale=None, return_lse=False):
    """One sequence without padding: for every query the set of keys it sees, each once."""
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, sums = [], []
    for t in range(q.shape[1]):
        seen = sorted(set(range(max(0, t - window + 1), t + 1)) | set(range(min(sinks, t + 1))))
        keys, values = (x[:, seen].repeat_interleave(groups, 2) for x in (k, v))
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], keys) * scale
        rows.append(torch.einsum("bhs,bshe->bhe", scores.softmax(-1), values))
        sums.append(scores.exp().sum(-1).log())
    return (torch.stack(rows, 1), torch.stack(sums, 1)) if return_lse else torch.stack(rows, 1)


def gradients(outs, leaves):
    generator = torch.Generator().manual_seed(1)
    outs = [outs] if torch.is_tensor(outs) else outs
    weights = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outs]
    return torch.autograd.grad(sum((x * y).sum() for x, y in zip(outs, weights, strict=True)), leaves)


@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 65, 130])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (4, 4), (33, 0), (40, 2), (64, 4), (200, 5), (3, 70)])
def test_equals_dense_softmax_with_gradients(length, window, sinks):
    leaves = [x.requires_grad_() for x in make(length, rows=1)]
    found = local_attention(*leaves, window=window, sinks=sinks, return_lse=True)
    wanted = dense(*leaves, window, sinks, return_lse=True)
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=0)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves), atol=EXACT, rtol=0)
    assert torch.equal(local_attention(*leaves, window=window, sinks=sinks), found[0])


def test_wide_window_is_plain_causal_attention():
    q, k, v = make(70)
    full = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True, scale=0.7
    )
    found = local_attention(q, k, v, window=70, sinks=2, scale=0.7)
    torch.testing.assert_close(found, full.transpose(1, 2), atol=EXACT, rtol=0)


def test_heads_are_shared_in_groups():
    q, k, v = make(70, heads=6, shared=2)
    found = local_attention(q, k, v, window=8, sinks=2)
    repeated = local_attention(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), window=8, sinks=2)
    torch.testing.assert_close(found, repeated, atol=EXACT, rtol=0)
    tiled = local_attention(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1), window=8, sinks=2)
    assert (found - tiled).abs().max() > 1e-2


def test_window_and_sinks_see_nothing_else():
    """Keys and values outside the window that are no sinks change no bit of the output, nor do later ones."""
    q, k, v = make(200, rows=1)
    out = local_attention(q, k, v, window=32, sinks=2)
    k[:, 2:64] = 1e3
    v[:, 2:64] = -1e3
    assert torch.equal(local_attention(q, k, v, window=32, sinks=2)[:, 128:], out[:, 128:])
    k[:, 150:] = 7
    assert torch.equal(local_attention(q, k, v, window=32, sinks=2)[:, 128:150], out[:, 128:150])


def masks():
    left, right, middle, none = (torch.ones(2, 90, dtype=torch.bool) for _ in range(4))
    left[0, :70] = False
    right[1, 3:] = False
    middle[0, 10:75] = False
    middle[1, ::3] = False
    none[0] = False
    return {"left": left, "right": right, "middle": middle, "whole row": none}


@pytest.mark.parametrize("where", masks())
@pytest.mark.parametrize(("window", "sinks"), [(8, 3), (40, 4), (100, 0)])
def test_masked_tokens_are_as_absent(where, window, sinks):
    mask = masks()[where]
    clean = make(90)
    leaves = [x.masked_fill(~mask[..., None, None], torch.nan).requires_grad_() for x in clean]
    out, lse = local_attention(*leaves, window=window, sinks=sinks, mask=mask, return_lse=True)
    assert not out[~mask].any()
    assert not lse[~mask].any()
    for grad in gradients((out, lse), leaves):
        assert grad.isfinite().all()
        assert not grad[~mask].any()
    for row in range(2):
        if mask[row].any():
            alone = dense(*(x[row : row + 1, mask[row]] for x in clean), window, sinks, return_lse=True)
            found = tuple(x[row : row + 1, mask[row]] for x in (out, lse))
            torch.testing.assert_close(found, alone, atol=EXACT, rtol=0)


@pytest.mark.parametrize("bounds", [[0, 130], [0, 0, 1, 2, 66, 66, 130], [0, 0, 0, 65, 130, 130, 130]])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(8, 3), (40, 4)])
def test_packed_sequences_equal_each_alone(bounds, holes, window, sinks):
    leaves = [x.requires_grad_() for x in make(130, rows=1)]
    mask = torch.arange(130)[None] % 4 != 0 if holes else None
    options = {"cu_seqlens": torch.tensor(bounds), "mask": mask, "return_lse": True}
    found = local_attention(*leaves, window=window, sinks=sinks, **options)
    real = torch.ones(1, 130, dtype=torch.bool) if mask is None else mask
    wanted = tuple(torch.zeros_like(x) for x in found)
    for start, stop in pairwise(bounds):
        places = torch.arange(start, stop)[real[0, start:stop]]
        if len(places):
            alone = dense(*(x[:, places] for x in leaves), window, sinks, return_lse=True)
            wanted = tuple(x.index_copy(1, places, y) for x, y in zip(wanted, alone, strict=True))
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=0)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves), atol=EXACT, rtol=0)


def test_cached_form_equals_full_form():
    """Decode token by token from a ring of `window` tokens and the sinks; row 0 is left-padded by two tokens."""
    window, sinks, length = 5, 3, 20
    q, k, v = make(length)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :2] = False
    wanted = local_attention(q, k, v, window=window, sinks=sinks, mask=mask, return_lse=True)
    positions = mask.cumsum(1) - 1
    positions[~mask] = -1
    held_k, held_v = (torch.full((2, sinks + window, *x.shape[2:]), torch.nan, dtype=x.dtype) for x in (k, v))
    held = torch.full((2, sinks + window), -1)
    for t in range(length):
        now = positions[:, t : t + 1]
        found = local_attention_cached(
            q[:, t : t + 1],
            torch.cat([held_k, k[:, t : t + 1]], 1),
            torch.cat([held_v, v[:, t : t + 1]], 1),
            k_positions=torch.cat([held, now], 1),
            q_positions=now,
            window=window,
            sinks=sinks,
            return_lse=True,
        )
        torch.testing.assert_close(found, tuple(x[:, t : t + 1] for x in wanted), atol=EXACT, rtol=0)
        for row in range(2):
            p = int(now[row])
            if p >= 0:
                place = p if p < sinks else sinks + p % window
                held_k[row, place], held_v[row, place], held[row, place] = k[row, t], v[row, t], p


def test_cached_form_with_all_tokens_at_once():
    q, k, v = leaves = [x.requires_grad_() for x in make(50)]
    mask = masks()["middle"][:, :50]
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    found = local_attention_cached(
        q,
        k[:, order],
        v[:, order],
        k_positions=positions[:, order],
        q_positions=positions,
        window=9,
        sinks=2,
        return_lse=True,
    )
    wanted = local_attention(q, k, v, window=9, sinks=2, mask=mask, return_lse=True)
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=0)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves), atol=EXACT, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = make(130, dim=16, value_dim=16, dtype=dtype)
    out, lse = local_attention(q, k, v, window=40, sinks=4, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    wanted, exact = dense(q.double(), k.double(), v.double(), 40, 4, return_lse=True)
    assert (lse - exact).abs().max() <= 2e-6
    plain = dense(q, k, v, 40, 4)
    assert (out - wanted).norm() <= 2 * (plain - wanted).norm()


def test_autocast_leaves_float32_alone():
    q, k, v = make(70, dtype=torch.float32)
    options = {"window": 8, "sinks": 2, "return_lse": True}
    plain = local_attention(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, local_attention(q, k, v, **options), plain))


def test_no_tokens():
    assert local_attention(*make(0), window=4, sinks=1).shape == (2, 0, 4, 3)
    assert local_attention(*make(0), window=4, sinks=1, return_lse=True)[1].shape == (2, 0, 4)
    nobody = [x[:0] for x in make(5)]
    assert local_attention(*nobody, window=4, sinks=1).shape == (0, 5, 4, 3)


def test_cached_query_that_sees_no_key():
    q, k, v = make(2)
    positions = torch.tensor([[5, -1], [0, 9]])
    out, lse = local_attention_cached(
        q, k, v, k_positions=torch.tensor([[-1, -1], [1, 2]]), q_positions=positions, window=3, sinks=0, return_lse=True
    )
    assert not out.any()
    assert not lse.any()


def test_memory_grows_with_the_length_not_its_square():
    """16384 tokens: dense scores of one head alone would take 1 GiB."""
    q, k, v = make(16384, rows=1, heads=1, shared=1, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        local_attention(q, k, v, window=64, sinks=4)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 100 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window: expected at least 1, found 0"),
        ({"sinks": -1}, "sinks: expected at least 0, found -1"),
        ({"q": torch.zeros(2, 6, 4)}, r"q: expected 4 dimensions .* \[2, 6, 4\]"),
        ({"k": torch.zeros(2, 6, 3, 5)}, r"k: expected .* found \[2, 6, 3, 5\]"),
        ({"v": torch.zeros(2, 7, 2, 3)}, r"v: expected .* found shape \[2, 7, 2, 3\]"),
        ({"k": torch.zeros(2, 5, 2, 5), "v": torch.zeros(2, 5, 2, 3)}, "k: expected 6 tokens as q, found 5"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask: expected shape \[2, 6\], found \[2, 5\]"),
        ({"mask": torch.ones(2, 6, dtype=torch.long)}, "mask: expected torch.bool, found torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "q: expected one row"),
        ({"cu_seqlens": torch.tensor([0, 4]), "rows": 1}, "cu_seqlens: expected values rising from 0 to T = 6"),
    ],
)
def test_argument_errors(change, message):
    rows = change.get("rows", 2)
    change = {key: value for key, value in change.items() if key != "rows"}
    q, k, v = (x[:rows] for x in make(6, dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        local_attention(**({"q": q, "k": k, "v": v, "window": 4, "sinks": 1} | change))


@pytest.mark.parametrize("length", [1, 33, 130])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (40, 2)])
def test_merged_is_one_softmax_over_the_keys_of_both(length, window, sinks):
    """The other attention has keys of its own, none for the first tokens, where its output is ignored."""
    q, k, v = make(length, rows=1)
    generator = torch.Generator().manual_seed(2)
    far_k, far_v = (torch.randn(1, 9, *x.shape[2:], generator=generator, dtype=x.dtype) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v, far_k, far_v)]
    scale = torch.full((4, 3), 0.5, dtype=q.dtype)
    none = (torch.arange(length) < 20)[None, :, None]

    def of_others():
        scores = torch.einsum("bthd,bshd->bths", q, far_k.repeat_interleave(2, 2)) * q.shape[-1] ** -0.5
        far = torch.einsum("bths,bshe->bthe", scores.softmax(-1), far_v.repeat_interleave(2, 2))
        return far, scores.logsumexp(-1).masked_fill(none, -torch.inf)

    far, log_sum = of_others()
    other = (far / scale).masked_fill(none[..., None], torch.nan)
    found = merged_local_attention(q, k, v, other, log_sum, scale, window=window, sinks=sinks)
    local, lse = dense(q, k, v, window, sinks, return_lse=True)
    far, log_sum = of_others()
    far_weight, weight = (x.exp()[..., None] for x in (log_sum, lse))
    wanted = (weight * local + far_weight * far) / (weight + far_weight)
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=0)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves), atol=EXACT, rtol=0)


def test_merged_without_tokens_and_with_wrong_shapes():
    q, k, v = make(6)
    others = {"other": v.new_zeros(2, 6, 4, 3), "other_log_sum": v.new_zeros(2, 6, 4), "other_scale": v.new_ones(4, 3)}
    sizes = {"window": 4, "sinks": 1}
    empty = {name: x if name == "other_scale" else x[:, :0] for name, x in others.items()}
    assert merged_local_attention(q[:, :0], k[:, :0], v[:, :0], **empty, **sizes).shape == (2, 0, 4, 3)
    for name, x in others.items():
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[.*\], found \[.*1\]"):
            merged_local_attention(q, k, v, **(others | {name: x[..., :1]}), **sizes)
    with pytest.raises(ValueError, match="k: expected 6 tokens as q, found 4"):
        merged_local_attention(q, k[:, 2:], v[:, 2:], **others, **sizes)
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 6\], found \[2, 5\]"):
        merged_local_attention(q, k, v, **others, **sizes, mask=torch.ones(2, 5, dtype=torch.bool))


def test_cached_argument_errors():
    q, k, v = make(6)
    positions = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"k_positions: expected shape \[2, 6\], found \[2, 5\]"):
        local_attention_cached(q, k, v, k_positions=positions[:, 1:], q_positions=positions, window=4, sinks=1)
    with pytest.raises(ValueError, match=r"q_positions: expected shape \[2, 6\], found \[1, 6\]"):
        local_attention_cached(q, k, v, k_positions=positions, q_positions=positions[:1], window=4, sinks=1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 80),
    window=st.integers(1, 90),
    sinks=st.integers(0, 10),
    groups=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_mask(length, window, sinks, groups, share, seed):
    q, k, v = make(length, heads=2 * groups, seed=seed)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) <= share
    found = local_attention(q, k, v, window=window, sinks=sinks, mask=mask)
    for row in range(2):
        real = mask[row]
        assert not found[row, ~real].any()
        if real.any():
            alone = dense(*(x[row : row + 1, real] for x in (q, k, v)), window, sinks)
            torch.testing.assert_close(found[row : row + 1, real], alone, atol=EXACT, rtol=0)
