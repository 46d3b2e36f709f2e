"""The Triton kernels of the softmax window: in the interpreter, and on a GPU."""

import os
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning_attention import local_attention, local_attention_cached, local_op, merged_local_attention

EXAMPLES = int(os.environ.get("SWAPATTN_EXAMPLES", "3"))  # a second each, so none is made smaller


def make(length, *, rows=1, heads=2, shared=1, dim=16, value_dim=16, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (shared, dim), (shared, value_dim), (heads, value_dim))
    return [torch.randn(rows, length, *shape, generator=generator).to(device, dtype) for shape in shapes]


def numbers(rows, length, cu_seqlens, mask):
    """Sequence of each token and its number among the real ones, `[B, T]`; -1 for hidden tokens."""
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask.cpu()
    owner = torch.arange(rows)[:, None].expand(rows, length).clone()
    if cu_seqlens is not None:
        for sequence, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            owner[0, start:stop] = sequence
    number = torch.full((rows, length), -1)
    for row in range(rows):
        seen = {}
        for t in range(length):
            if real[row, t]:
                number[row, t] = seen.setdefault(int(owner[row, t]), 0)
                seen[int(owner[row, t])] += 1
    return owner, number


def quadratic(q, k, v, window, sinks, scale=None, cu_seqlens=None, mask=None, return_lse=False):
    """The definition with all T x T scores; needs finite inputs."""
    owner, number = numbers(*q.shape[:2], cu_seqlens, mask)
    distance = number[:, :, None] - number[:, None]
    seen = (owner[:, :, None] == owner[:, None]) & (number >= 0)[:, :, None] & (number >= 0)[:, None]
    seen &= (distance >= 0) & ((distance < window) | (number < sinks)[:, None])
    seen = seen.to(q.device)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    blind = ~seen.any(-1)
    scores = scores.masked_fill(~(seen | blind[..., None])[:, None], -torch.inf)
    out = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).masked_fill(blind[..., None, None], 0)
    lse = scores.logsumexp(-1).transpose(1, 2).masked_fill(blind[..., None], 0)
    return (out, lse) if return_lse else out


def with_gradients(function, inputs, **options):
    """o, dq, dk, dv and, where it is asked for, lse, whose gradient is taken from do."""
    q, k, v, do = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    found = function(*leaves, **options)
    out, *lse = found if options.get("return_lse") else (found,)
    gradients = torch.autograd.grad([out, *lse], leaves, [do, *(do[..., 0].to(x.dtype) for x in lse)])
    return [out.detach(), *gradients, *(x.detach() for x in lse)]


def compare(function, inputs, *, limit, **options):
    """Output and gradients within `limit` of the definition in float64, relative L2; hidden tokens exactly 0."""
    mask = options.get("mask")
    found = with_gradients(function, inputs, **options)
    clean = [x if mask is None else x.masked_fill(~mask[..., None, None], 0) for x in inputs]
    wanted = with_gradients(quadratic, [x.double() for x in clean], **options)
    likes = [inputs[3], *inputs[:3]]
    if options.get("return_lse"):
        likes.append(inputs[0][..., 0].float())
    for name, x, y, like in zip(("o", "dq", "dk", "dv", "lse"), found, wanted, likes, strict=False):
        assert x.dtype == like.dtype
        assert x.shape == like.shape
        assert (x - y).norm() <= limit * max(y.norm(), like.nan_to_num().norm() / 4), name  # a gradient may be 0
        assert mask is None or not x[~mask].any(), name


def make_other(inputs, *, dtype=None, seed=1):
    """Of another attention: output, logarithm of its weight, -inf for the first tokens, and scale."""
    q, v = inputs[0], inputs[2]
    generator = torch.Generator().manual_seed(seed)
    other, log_sum, scale = (
        torch.randn(*shape, generator=generator)
        for shape in ((*q.shape[:3], v.shape[3]), q.shape[:3], (q.shape[2], v.shape[3]))
    )
    log_sum[:, :7] = -torch.inf
    return [other.to(q.device, dtype or q.dtype), (2 * log_sum).to(q.device), scale.to(q.device)]


def quadratic_merged(q, k, v, other, log_sum, scale, **options):
    """The definition; a hidden token's operands are finite."""
    local, lse = quadratic(q, k, v, **options, return_lse=True)
    both = torch.logaddexp(lse, log_sum)
    out = (lse - both).exp()[..., None] * local + (log_sum - both).exp()[..., None] * scale * other
    mask = options.get("mask")
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)


def merged_with_gradients(function, tensors, do, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def compare_merged(inputs, others, *, limit, function=merged_local_attention, **options):
    """As `compare`, in all six gradients; what has no weight is NaN and ignored."""
    *tensors, do = inputs
    mask = options.get("mask")
    other, log_sum, scale = others
    poisoned = other.masked_fill((log_sum == -torch.inf)[..., None], torch.nan)
    if mask is not None:
        poisoned, log_sum = (x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), torch.nan)
                             for x in (poisoned, log_sum))  # fmt: skip
    found = merged_with_gradients(function, [*tensors, poisoned, log_sum, scale], do, **options)
    clean = [*tensors, *others[:2], do]
    if mask is not None:
        clean = [x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0) for x in clean]
    *clean, do = (x.double() for x in clean)
    wanted = merged_with_gradients(quadratic_merged, [*clean, scale.double()], do, **options)
    names = ("o", "dq", "dk", "dv", "d_other", "d_log_sum", "d_scale")
    for name, x, y, like in zip(names, found, wanted, [inputs[3], *tensors, *others], strict=True):
        assert (x.dtype, x.shape) == (like.dtype, like.shape), name
        assert (x - y).norm() <= limit * max(y.norm(), like.nan_to_num(0, 0, 0).norm() / 4), name
        assert mask is None or name == "d_scale" or not x[~mask].any(), name
    assert not found[5][others[1] == -torch.inf].any()


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels on the CPU. float32 and float16 only: the interpreter multiplies bfloat16 as integers."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled, not interpreted")
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")


SIZES = [
    (1, 1, 4),
    (2, 16, 4),
    (63, 64, 0),
    (64, 64, 4),
    (65, 1, 0),
    (65, 1, 4),
    (130, 100, 16),
    (130, 16, 4),
    pytest.param(300, 64, 4, marks=pytest.mark.slow),
    pytest.param(200, 100, 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("length", "window", "sinks"), SIZES)
@pytest.mark.usefixtures("interpreted")
def test_equals_the_definition(length, window, sinks):
    compare(local_attention, make(length, dim=16, value_dim=32), window=window, sinks=sinks, limit=2e-6)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("interpreted")
def test_bulk_copies(packed, monkeypatch):
    """Half precision reads by descriptors: shared heads, sizes that are no power of 2, NaN behind the last token."""
    monkeypatch.setattr(local_op, "SMALLEST_BULK", 1)
    inputs = make(130, rows=1 if packed else 2, heads=4, shared=2, dim=80, value_dim=24, dtype=torch.float16)
    rooms = [torch.full((x.shape[0], 200, *x.shape[2:]), torch.nan, dtype=x.dtype) for x in inputs]
    views = [room[:, :130].copy_(x) for room, x in zip(rooms, inputs, strict=True)]
    assert local_op._bulk(None, *views)
    bounds = torch.tensor([0, 0, 1, 2, 66, 130]) if packed else None
    for window, sinks in ((20, 4), (64, 4), (100, 0)):
        compare(local_attention, views, window=window, sinks=sinks, cu_seqlens=bounds, limit=1e-3)


@pytest.mark.parametrize(
    ("length", "window", "sinks", "dtype"),
    [
        (1, 1, 4, torch.float32),
        (65, 300, 0, torch.float16),
        pytest.param(1, 1, 4, torch.float16, marks=pytest.mark.slow),
        pytest.param(65, 300, 0, torch.float32, marks=pytest.mark.slow),
        *(pytest.param(150, 64, 4, dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16)),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_log_sum_exp(length, window, sinks, dtype):
    """Beside an unchanged output; both, and then only one of them, have a gradient."""
    inputs = make(length, rows=2, heads=2, dtype=dtype)
    sizes = {"window": window, "sinks": sinks}
    compare(local_attention, inputs, return_lse=True, limit=DTYPES[dtype], **sizes)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, wanted = local_attention(*leaves, return_lse=True, **sizes), quadratic(*exact, return_lse=True, **sizes)
    assert torch.equal(found[0], local_attention(*leaves, **sizes))
    for out, like in zip(found, wanted, strict=True):
        gradients, expected = (
            torch.autograd.grad(x.sum(), of, retain_graph=True, materialize_grads=True)
            for x, of in ((out, leaves), (like, exact))
        )
        for x, y in zip(gradients, expected, strict=True):
            assert (x - y).norm() <= DTYPES[dtype] * max(y.norm(), length**0.5)


@pytest.mark.parametrize(
    ("length", "window", "sinks"), [(65, 16, 4), (150, 64, 0), pytest.param(200, 64, 4, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("interpreted")
def test_half_precision_loses_no_more_than_plain_torch(length, window, sinks):
    inputs = make(length, dim=32, value_dim=32, dtype=torch.float16)
    sizes = {"window": window, "sinks": sinks}
    compare(local_attention, inputs, limit=1e-3, **sizes)
    wanted = with_gradients(quadratic, [x.double() for x in inputs], **sizes)
    plain = with_gradients(quadratic, inputs, **sizes)
    for x, y, z in zip(with_gradients(local_attention, inputs, **sizes), plain, wanted, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


@pytest.mark.parametrize(
    ("heads", "shared", "dim", "value_dim"), [(4, 2, 80, 24), pytest.param(6, 1, 16, 16, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("interpreted")
def test_shared_heads_and_sizes_that_are_no_power_of_two(heads, shared, dim, value_dim):
    inputs = make(100, rows=2, heads=heads, shared=shared, dim=dim, value_dim=value_dim)
    compare(local_attention, inputs, window=20, sinks=3, scale=0.3, limit=2e-6)


def masks(length):
    left, right, holes, none = (torch.ones(2, length, dtype=torch.bool) for _ in range(4))
    left[0, :70] = False
    right[1, 40:] = False
    holes[0, 10:75] = False
    holes[1, ::3] = False
    none[0] = False
    return {"left": left, "right": right, "holes": holes, "whole row": none}


@pytest.mark.parametrize(
    ("where", "window", "sinks"),
    [("left", 8, 3), ("right", 40, 0), ("holes", 8, 3), ("holes", 40, 0), ("whole row", 40, 3)],
)
@pytest.mark.usefixtures("interpreted")
def test_masked_tokens_are_as_absent(where, window, sinks):
    mask = masks(110)[where]
    inputs = [x.masked_fill(~mask[..., None, None], torch.nan) for x in make(110, rows=2)]
    compare(local_attention, inputs, window=window, sinks=sinks, mask=mask, return_lse=True, limit=2e-6)


@pytest.mark.parametrize(
    ("bounds", "holes"), [([0, 0, 1, 2, 66, 66, 130], False), ([0, 5, 9, 100, 101, 130, 130], True), ([0, 130], True)]
)
@pytest.mark.usefixtures("interpreted")
def test_packed_sequences(bounds, holes):
    mask = torch.arange(130)[None] % 4 != 0 if holes else None
    options = {"cu_seqlens": torch.tensor(bounds), "mask": mask, "window": 20, "sinks": 4, "return_lse": True}
    compare(local_attention, make(130), limit=2e-6, **options)


@pytest.mark.usefixtures("interpreted")
def test_views_of_one_projection_and_nan_around_them():
    """q, k, v are slices of one tensor whose rows go on with NaN behind the last token."""
    heads, dim, length = 2, 16, 70
    packed = torch.full((2, length + 30, 3 * heads * dim + 16), torch.nan)
    views = [torch.unflatten(packed[:, :length, i * 32 : i * 32 + 32], 2, (heads, dim)) for i in range(3)]
    for view, x in zip(views, make(length, rows=2, shared=2), strict=False):
        view.copy_(x)
    do = make(length, rows=2)[3].transpose(1, 2).contiguous().transpose(1, 2)
    compare(local_attention, [*views, do], window=16, sinks=2, limit=2e-6)


@pytest.mark.usefixtures("interpreted")
def test_gradients_are_equal_bit_for_bit_between_runs():
    inputs = make(100, heads=4)
    first, second = (with_gradients(local_attention, inputs, window=16, sinks=4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.usefixtures("interpreted")
def test_causal_to_the_bit():
    """Neither later tokens nor those between the sinks and the window change a bit."""
    q, k, v, _ = make(150)
    out = local_attention(q, k, v, window=30, sinks=3)
    k[:, 100:], v[:, 100:] = 9, -9
    assert torch.equal(local_attention(q, k, v, window=30, sinks=3)[:, :100], out[:, :100])
    k[:, 3:30], v[:, 3:30] = 9, -9
    changed = local_attention(q, k, v, window=30, sinks=3)
    assert torch.equal(changed[:, 60:100], out[:, 60:100])
    assert not torch.equal(changed[:, :60], out[:, :60])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 3, phases=[Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3).filter(any),
    window=st.integers(1, 70),
    sinks=st.integers(0, 20),
    group=st.integers(1, 3),
    dims=st.tuples(st.sampled_from([8, 16, 33]), st.sampled_from([1, 16, 40])),
    packed=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.5, 0.95]),
    return_lse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_call_and_its_gradients(lengths, window, sinks, group, dims, packed, share, return_lse, seed):
    length = sum(lengths) if packed else max(lengths)
    inputs = make(length, rows=1 if packed else 2, heads=2 * group, shared=2, dim=dims[0], value_dim=dims[1], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = None if share is None else torch.rand(inputs[0].shape[:2], generator=generator) < share
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    if mask is not None:
        inputs = [x.masked_fill(~mask[..., None, None], torch.nan) for x in inputs]
    with mock.patch.dict(os.environ, SWAPATTN_KERNELS="triton"):
        options = {"mask": mask, "cu_seqlens": bounds, "return_lse": return_lse}
        compare(local_attention, inputs, window=window, sinks=sinks, limit=1e-5, **options)
        if not return_lse:
            del options["return_lse"]
            compare_merged(inputs, make_other(inputs), window=window, sinks=sinks, limit=1e-5, **options)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.usefixtures("interpreted")
def test_cached_form_equals_full_form(step):
    """Some tokens at a time from a ring whose empty slots hold NaN; row 0 is left-padded by two tokens."""
    window, sinks, length = 5, 3, 18
    q, k, v, _ = make(length, rows=2, heads=4, shared=2, dim=24)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :2] = False
    wanted = quadratic(q.double(), k.double(), v.double(), window, sinks, mask=mask, return_lse=True)
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
    slots = sinks + window + step
    held_k, held_v = (torch.full((2, slots, *x.shape[2:]), torch.nan) for x in (k, v))
    held = torch.full((2, slots), -1)
    for t in range(0, length, step):
        now = slice(t, t + step)
        found = local_attention_cached(
            q[:, now],
            torch.cat([held_k, k[:, now]], 1),
            torch.cat([held_v, v[:, now]], 1),
            k_positions=torch.cat([held, positions[:, now]], 1),
            q_positions=positions[:, now],
            window=window,
            sinks=sinks,
            return_lse=True,
        )
        for x, y in zip(found, wanted, strict=True):
            assert (x - y[:, now]).abs().max() <= 2e-6
        assert not found[1][positions[:, now] < 0].any()
        for row in range(2):
            for new in range(t, t + step):
                p = int(positions[row, new])
                if p >= 0:
                    place = p if p < sinks else sinks + p % (window + step)
                    held_k[row, place], held_v[row, place], held[row, place] = k[row, new], v[row, new], p


@pytest.mark.parametrize(
    ("length", "window", "sinks", "dtype"),
    [
        (1, 1, 4, torch.float32),
        (150, 20, 0, torch.float32),
        (65, 300, 4, torch.float16),
        *(
            pytest.param(*sizes, torch.float32, marks=pytest.mark.slow)
            for sizes in ((40, 64, 0), (65, 300, 4), (150, 64, 4))
        ),
        *(
            pytest.param(*sizes, torch.float16, marks=pytest.mark.slow)
            for sizes in ((1, 1, 4), (40, 64, 0), (150, 64, 4), (150, 20, 0))
        ),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_merged_with_other_attention(length, window, sinks, dtype):
    inputs = make(length, rows=2, heads=4, shared=2, value_dim=24, dtype=dtype)
    sizes = {"window": window, "sinks": sinks, "limit": DTYPES[dtype]}
    compare_merged(inputs, make_other(inputs), **sizes)
    if dtype == torch.float16:
        compare_merged(inputs, make_other(inputs, dtype=torch.float32), **sizes)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(
    ("bounds", "where"),
    [
        (None, "left"),
        pytest.param(None, "holes", marks=pytest.mark.slow),
        pytest.param(None, "whole row", marks=pytest.mark.slow),
        pytest.param([0, 0, 1, 2, 66, 66, 130], None, marks=pytest.mark.slow),
        ([0, 5, 9, 130], "every"),
    ],
)
def test_merged_where_tokens_are_hidden_or_packed(bounds, where, form, interpreted, monkeypatch):
    monkeypatch.setenv("SWAPATTN_KERNELS", form)
    options = {"window": 20, "sinks": 4, "limit": 2e-6}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds)
        options["mask"] = torch.arange(130)[None] % 4 != 0 if where else None
    else:
        options["mask"] = masks(130)[where]
    inputs = make(130, rows=1 if bounds else 2, heads=4, shared=2)
    others = make_other(inputs)
    if options["mask"] is not None:
        inputs = [x.masked_fill(~options["mask"][..., None, None], torch.nan) for x in inputs]
    compare_merged(inputs, others, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_merged_takes_views_and_gives_no_more_gradients_than_wanted():
    """Bit for bit the same from tensors laid otherwise, without a gradient of the scale, and again."""
    inputs = make(100, rows=2, heads=4, shared=2)
    *tensors, do = inputs
    other, log_sum, scale = make_other(inputs)
    sizes = {"window": 16, "sinks": 2}
    first = merged_with_gradients(merged_local_attention, [*tensors, other, log_sum, scale], do, **sizes)
    room = torch.full((2, 4, 130, 40), torch.nan)
    view = room[:, :, :100, 8:24].transpose(1, 2).copy_(other)
    turned, wide = log_sum.permute(2, 1, 0).contiguous().permute(2, 1, 0), torch.stack((scale, scale), 1)[:, 1]
    second = merged_with_gradients(merged_local_attention, [*tensors, view, turned, wide], do, **sizes)
    assert all(map(torch.equal, first, second))
    leaves = [x.detach().requires_grad_() for x in (*tensors, view, turned)]
    found = torch.autograd.grad(merged_local_attention(*leaves, wide, **sizes), leaves, do)
    assert all(map(torch.equal, first[1:6], found))


def test_operators_are_traceable(interpreted):
    """Fake implementations, autograd, and one graph for torch.compile."""
    from lightning_attention import local_cached
    from lightning_attention import local_op as module

    q, k, v, do = make(40)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.arange(40)[None] > 3
    for table in ((None,) * 4, tuple(module.stream_of(1, 40, None, mask, q.device))):
        for test in ("test_faketensor", "test_autograd_registration"):
            for asked in (False, True):
                torch.library.opcheck(module._forward, (*leaves, *table, 0.25, 8, 2, asked), test_utils=test)
        others = make_other((q, k, v, do))
        for other in (others, [x.requires_grad_() for x in others]):
            arguments = (*leaves, other[0], other[1][0].T, other[2], *table, 0.25, 8, 2)
            for test in ("test_faketensor", "test_autograd_registration"):
                torch.library.opcheck(module._merged, arguments, test_utils=test)
    compiled = torch.compile(merged_local_attention, fullgraph=True, backend="aot_eager")
    options, tensors = {"window": 8, "sinks": 2, "mask": mask}, (q, k, v, *others)
    found, wanted = (merged_with_gradients(x, tensors, do, **options) for x in (compiled, merged_local_attention))
    assert all(map(torch.equal, found, wanted))
    positions = torch.arange(40)[None]
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    for asked in (False, True):
        arguments = (q, k, v, positions, positions, 0.25, 8, 2, asked)
        torch.library.opcheck(local_cached._cached, arguments, test_utils="test_faketensor")
        options = {"window": 8, "sinks": 2, "mask": mask, "return_lse": asked}
        found = with_gradients(compiled, (q, k, v, do), **options)
        wanted = with_gradients(local_attention, (q, k, v, do), **options)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_switch(monkeypatch):
    q, k, v, _ = make(8)
    monkeypatch.setenv("SWAPATTN_KERNELS", "fast")
    with pytest.raises(ValueError, match="SWAPATTN_KERNELS: expected torch, triton or auto, found fast"):
        local_attention(q, k, v, window=4, sinks=1)
    monkeypatch.setenv("SWAPATTN_KERNELS", "triton")
    with pytest.raises(ValueError, match="SWAPATTN_KERNELS=triton: the kernels cannot take this call: float64"):
        local_attention(q.double(), k.double(), v.double(), window=4, sinks=1)


DTYPES = {torch.bfloat16: 7e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_on_gpu(dtype, dim, value_dim, bulk, monkeypatch):
    monkeypatch.setattr(local_op, "SMALLEST_BULK", 1 if bulk else 2**40)
    inputs = make(1000, rows=2, heads=4, shared=2, dim=dim, value_dim=value_dim, dtype=dtype, device="cuda")
    for window, sinks in ((64, 4), (1, 0), (100, 16), (1024, 4)):
        for asked in (False, True):
            options = {"window": window, "sinks": sinks, "return_lse": asked}
            compare(local_attention, inputs, limit=DTYPES[dtype], **options)
    compare(local_attention, inputs, window=64, sinks=4, scale=1.0, limit=DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 1000])
def test_on_gpu_any_length_mask_and_packing(length, return_lse, monkeypatch):
    monkeypatch.setattr(local_op, "SMALLEST_BULK", 1)
    inputs = make(length, rows=2, heads=4, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    options = {"window": 64, "sinks": 4, "return_lse": return_lse, "limit": DTYPES[torch.bfloat16]}
    for mask in masks(length).values():
        poisoned = [x.masked_fill(~mask.cuda()[..., None, None], torch.nan) for x in inputs]
        compare(local_attention, poisoned, mask=mask.cuda(), **options)
    bounds = sorted({0, length // 3, length // 2, length})
    cu_seqlens = torch.tensor([0, *bounds, length], device="cuda")
    compare(local_attention, [x[:1] for x in inputs], cu_seqlens=cu_seqlens, **options)


@pytest.mark.gpu
def test_on_gpu_runs_are_equal_and_independent_of_what_lies_behind(monkeypatch):
    monkeypatch.setattr(local_op, "SMALLEST_BULK", 1)
    inputs = make(4097, rows=2, heads=4, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    room = [torch.full((2, 4200, *x.shape[2:]), torch.nan, dtype=x.dtype, device="cuda") for x in inputs]
    for space, x in zip(room, inputs, strict=True):
        space[:, :4097] = x
    views = [space[:, :4097] for space in room]
    first, second, third = (with_gradients(local_attention, x, window=64, sinks=4) for x in (inputs, inputs, views))
    for x, y, z in zip(first, second, third, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.gpu
@pytest.mark.parametrize("return_lse", [False, True])
def test_on_gpu_graph_capture_and_compile(return_lse):
    q, k, v, do = make(500, rows=2, heads=4, dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda")
    mask = masks(500)["left"].cuda()
    options = {"window": 64, "sinks": 4, "mask": mask, "return_lse": return_lse}
    wanted = with_gradients(local_attention, (q, k, v, do), **options)
    found = with_gradients(torch.compile(local_attention, fullgraph=True), (q, k, v, do), **options)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(local_attention, (q, k, v, do), **options)
    mask.copy_(masks(500)["holes"])
    graph.replay()
    wanted = with_gradients(local_attention, (q, k, v, do), **options)
    assert all(torch.equal(x, y) for x, y in zip(captured, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (96, 96), (128, 128), (192, 128)])
def test_on_gpu_merged(dtype, dim, value_dim, bulk, monkeypatch):
    monkeypatch.setattr(local_op, "SMALLEST_BULK", 1 if bulk else 2**40)
    inputs = make(1000, rows=2, heads=4, shared=2, dim=dim, value_dim=value_dim, dtype=dtype, device="cuda")
    for window, sinks in ((64, 4), (100, 0), (1024, 4)):
        for of_other in {dtype, torch.float32}:
            others = make_other(inputs, dtype=of_other)
            compare_merged(inputs, others, window=window, sinks=sinks, limit=DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 65, 1000])
def test_on_gpu_merged_any_length_mask_and_packing(length):
    inputs = make(length, rows=2, heads=4, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    options = {"window": 64, "sinks": 4, "limit": DTYPES[torch.bfloat16]}
    for mask in masks(length).values():
        poisoned = [x.masked_fill(~mask.cuda()[..., None, None], torch.nan) for x in inputs]
        compare_merged(poisoned, make_other(inputs), mask=mask.cuda(), **options)
    bounds = torch.tensor([0, length // 3, length // 2, length, length], device="cuda")
    compare_merged([x[:1] for x in inputs], make_other([x[:1] for x in inputs]), cu_seqlens=bounds, **options)


@pytest.mark.gpu
def test_on_gpu_merged_graph_capture_and_compile():
    """A compiled and a captured call give the same bits, and so do two runs."""
    inputs = make(500, rows=2, heads=4, dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda")
    *tensors, do = inputs
    tensors += make_other(inputs)
    mask = masks(500)["left"].cuda()
    options = {"window": 64, "sinks": 4, "mask": mask}
    wanted = merged_with_gradients(merged_local_attention, tensors, do, **options)
    for form in (merged_local_attention, torch.compile(merged_local_attention, fullgraph=True)):
        found = merged_with_gradients(form, tensors, do, **options)
        assert all(map(torch.equal, found, wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merged_with_gradients(merged_local_attention, tensors, do, **options)
    mask.copy_(masks(500)["holes"])
    graph.replay()
    wanted = merged_with_gradients(merged_local_attention, tensors, do, **options)
    assert all(map(torch.equal, captured, wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 32])
def test_on_gpu_cached_form(heads):
    q, k, v, _ = make(80, rows=3, heads=heads, shared=8, dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(80, device="cuda").expand(3, 80).clone()
    positions[1] -= 11
    positions.clamp_(min=-1)
    mask = positions >= 0
    wanted = quadratic(q.double(), k.double(), v.double(), 64, 4, mask=mask, return_lse=True)
    order = torch.randperm(80, device="cuda")
    for start in (79, 60):
        found = local_attention_cached(
            q[:, start:],
            k[:, order],
            v[:, order],
            k_positions=positions[:, order],
            q_positions=positions[:, start:],
            window=64,
            sinks=4,
            return_lse=True,
        )
        for x, y in zip(found, wanted, strict=True):
            assert (x - y[:, start:]).norm() <= 6e-3 * y[:, start:].norm()
