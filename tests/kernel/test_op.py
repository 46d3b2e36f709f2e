"""The public functions: checks, states in place, and what they promise about the host."""

import ast
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import lightning_attention as package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_attention import lightning_attention, lightning_attention_step
from lightning_attention.reference import recurrent_attention

EXACT = 1e-10


def make(length, *, rows=2, heads=4, shared=2, dim=5, value_dim=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (shared, dim), (shared, value_dim))
    q, k, v = [torch.rand(rows, length, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    log_decay = -torch.rand(shared, generator=generator, dtype=torch.float64)
    return q, k, v, log_decay if dtype == torch.float64 else log_decay.float()


def copies(state):
    return tuple(x.clone() for x in state) if isinstance(state, tuple) else state.clone()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=EXACT, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_prefill_then_steps_equals_prefill(normalize, per_token):
    q, k, v, log_decay = make(75)
    if per_token:
        log_decay = log_decay * torch.rand(2, 75, 1, dtype=torch.float64)
    wanted, final = lightning_attention(q, k, v, log_decay, normalize=normalize, output_final_state=True)

    def part(x, start, stop):
        return x if x.dim() == 1 else x[:, start:stop]

    first = [part(x, 0, 66) for x in (q, k, v, log_decay)]
    out, state = lightning_attention(*first, normalize=normalize, output_final_state=True)
    pieces = [out]
    for start, stop in ((66, 67), (67, 68), (68, 71), (71, 75)):
        new = [part(x, start, stop) for x in (q, k, v, log_decay)]
        pieces.append(lightning_attention_step(*new, state, normalize=normalize))
    close(torch.cat(pieces, 1), wanted)
    close(state, final)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("slots", [[4, 1, 0], [-1, 0, 3], [0, -1, 3], [-1, -1, 2], [-1, -1, -1], []])
def test_slots_of_a_pool(normalize, slots):
    """Padding rows may hold NaN and share the call with slot 0; slots that are not named keep every bit."""
    q, k, v, log_decay = make(2, rows=len(slots))
    pool = torch.rand(5, 2, 5, 3, dtype=torch.float64)
    pool = (pool, torch.rand(5, 2, 5, dtype=torch.float64)) if normalize else pool
    before = copies(pool)
    slots = torch.tensor(slots, dtype=torch.long)
    empty = slots < 0
    for x in (q, k, v):
        x[empty] = torch.nan
    out = lightning_attention_step(q, k, v, log_decay, pool, slots=slots, normalize=normalize)
    wanted = copies(before)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not out[row].any()
            continue
        own = tuple(x[slot : slot + 1] for x in before) if normalize else before[slot : slot + 1]
        alone = [x[row : row + 1] for x in (q, k, v)]
        options = {"initial_state": own, "normalize": normalize, "output_final_state": True}
        result, state = recurrent_attention(*alone, log_decay, **options)
        close(out[row : row + 1], result)
        for full, new in zip(wanted if normalize else [wanted], state if normalize else [state], strict=True):
            full[slot] = new[0]
    for found, full in zip(pool if normalize else [pool], wanted if normalize else [wanted], strict=True):
        assert torch.equal(found, full)


def test_step_with_a_mask_leaves_the_state_bit_for_bit():
    q, k, v, log_decay = make(3)
    pool = torch.rand(2, 2, 5, 3, dtype=torch.float64)
    before = pool.clone()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = lightning_attention_step(q, k, v, log_decay, pool, mask=mask)
    wanted, final = lightning_attention(q, k, v, log_decay, initial_state=before, output_final_state=True, mask=mask)
    close(out, wanted)
    close(pool, final)
    assert torch.equal(pool[1], before[1])


def test_step_is_not_differentiable():
    q, k, v, log_decay = make(1)
    out = lightning_attention_step(q.requires_grad_(), k, v, log_decay, torch.zeros(2, 2, 5, 3, dtype=torch.float64))
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    inputs = make(70, dtype=dtype)
    out, state = lightning_attention(*inputs, output_final_state=True)
    assert out.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lightning_attention_step(*(x[:, :1] if x.dim() == 4 else x for x in inputs), state).dtype == dtype


def test_output_has_the_dtype_of_v():
    q, k, v, log_decay = make(70, dtype=torch.float32)
    out, _ = lightning_attention(q, k, v.bfloat16(), log_decay)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("packed", [False, True])
def test_no_value_is_read_on_the_host(packed):
    """Tensors of the meta device have shapes but no values: reading one raises."""
    q, k, v, log_decay = (x.to("meta") for x in make(70, rows=1))
    bounds = torch.zeros(4, dtype=torch.int32, device="meta") if packed else None
    mask = torch.ones(1, 70, dtype=torch.bool, device="meta")
    out, _ = lightning_attention(q, k, v, log_decay, cu_seqlens=bounds, mask=mask, normalize=True)
    assert out.shape == (1, 70, 4, 3)
    out = package.local_attention(q, k, v, window=8, sinks=2, cu_seqlens=bounds, mask=mask)
    assert out.shape == (1, 70, 4, 3)
    slots = torch.zeros(1, dtype=torch.long, device="meta")
    pool = torch.zeros(3, 2, 5, 3, dtype=torch.float64, device="meta")
    assert lightning_attention_step(q, k, v, log_decay, pool, slots=slots).shape == (1, 70, 4, 3)


def test_packed_sequences_compile_into_one_graph():
    q, k, v, log_decay = make(20, rows=1)
    bounds = torch.tensor([0, 7, 7, 20])
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    wanted, _ = lightning_attention(q, k, v, log_decay, cu_seqlens=bounds)
    close(compiled(q, k, v, log_decay, cu_seqlens=bounds)[0], wanted)


Q, K, V, DECAY = make(6, dtype=torch.float32)
STATE = torch.zeros(2, 2, 5, 3)
ERRORS = [
    ({"group": object()}, "group: expected a process group of torch.distributed, found object"),
    ({"q": Q[0]}, r"q: expected 4 dimensions .* found shape \[6, 4, 5\]"),
    ({"q": Q.int()}, "q: expected a floating dtype, found torch.int32"),
    ({"q": Q[:, :, :3]}, "q: expected a number of heads that is a multiple of the 2 of k, found 3"),
    ({"k": K[:, :5]}, r"k: expected shape \[2, 6, 2, 5\], found \[2, 5, 2, 5\]"),
    ({"k": K[..., :4]}, r"k: expected shape \[2, 6, 2, 5\], found \[2, 6, 2, 4\]"),
    ({"v": V[:, :, :1]}, r"v: expected shape \[2, 6, 2, 3\], found \[2, 6, 1, 3\]"),
    ({"v": V.to("meta")}, "v: expected device cpu as q, found meta"),
    ({"log_decay": DECAY.bfloat16()}, "log_decay: expected float32 or float64, found torch.bfloat16"),
    ({"log_decay": DECAY.to("meta")}, "log_decay: expected device cpu"),
    ({"log_decay": torch.zeros(3)}, r"log_decay: expected shape \[2\] or \[4\], .* found \[3\]"),
    ({"log_decay": torch.zeros(2, 5, 2)}, r"log_decay: .* after \[2, 6\], found \[2, 5, 2\]"),
    ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask: expected shape \[2, 6\], found \[2, 5\]"),
    ({"mask": torch.ones(2, 6)}, "mask: expected torch.bool, found torch.float32"),
    ({"mask": torch.ones(2, 6, dtype=torch.bool, device="meta")}, "mask: expected device cpu as q, found meta"),
    ({"initial_state": STATE.to("meta")}, "state: expected device cpu as q, found meta"),
    ({"initial_state": STATE[:1]}, r"initial_state: expected shape \[2, 2, 5, 3\], found \[1, 2, 5, 3\]"),
    ({"initial_state": (STATE, STATE[..., 0])}, "initial_state: expected a tensor with normalize=False, found a pair"),
    ({"initial_state": STATE, "normalize": True}, "initial_state: expected a pair with normalize=True"),
    ({"initial_state": (STATE, STATE), "normalize": True}, r"initial_state\[1\]: expected shape \[2, 2, 5\]"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "q: expected one row beside cu_seqlens, found 2"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_argument_errors(change, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(**({"q": Q, "k": K, "v": V, "log_decay": DECAY} | change))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0]), r"cu_seqlens: expected shape \[N \+ 1\]"),
        (torch.tensor([0.0, 6.0]), "cu_seqlens: expected int32 or int64"),
        (torch.tensor([1, 6]), "cu_seqlens: expected values rising from 0 to T = 6"),
        (torch.tensor([0, 5]), "cu_seqlens: expected values rising"),
        (torch.tensor([0, 4, 2, 6]), "cu_seqlens: expected values rising"),
    ],
)
def test_boundary_errors(bounds, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(Q[:1], K[:1], V[:1], DECAY, cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": STATE[:1]}, r"state: expected shape \[2, 2, 5, 3\], found \[1, 2, 5, 3\]"),
        ({"state": STATE.double()}, "state: expected torch.float32, found torch.float64"),
        ({"state": STATE[..., :2], "slots": torch.tensor([0, 1])}, r"state: expected shape \[2, 2, 5, 3\]"),
        ({"slots": torch.tensor([0])}, r"slots: expected shape \[2\], found \[1\]"),
        ({"slots": torch.tensor([0.0, 1.0])}, "slots: expected int32 or int64"),
    ],
)
def test_step_argument_errors(change, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention_step(**({"q": Q, "k": K, "v": V, "log_decay": DECAY, "state": STATE} | change))


def test_sources_import_only_torch_triton_and_the_standard_library():
    """They are copied beside saved models and imported there as siblings.

    triton only in a try block: transformers demands whatever such files import outside one.
    """
    for path in Path(package.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level == 1 else [node.module.split(".")[0]]
            else:
                continue
            allowed = {"torch", *sys.stdlib_module_names, *(["triton"] if id(node) in tried else [])}
            assert allowed.issuperset(names), (path, names)


def test_package_works_without_triton():
    """Neither the import nor a call on the CPU needs it."""
    script = (
        "import sys; sys.modules['triton'] = None; import torch, lightning_attention as package;"
        "x = torch.ones(1, 3, 1, 2); print(package.local_attention(x, x, x, window=2, sinks=1).shape)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert all(callable(getattr(package, name)) for name in package.__all__)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), normalize=st.booleans(), seed=st.integers(0, 1000))
def test_any_split_gives_the_same(cuts, normalize, seed):
    q, k, v, log_decay = make(60, seed=seed)
    options = {"normalize": normalize, "output_final_state": True}
    wanted, final = lightning_attention(q, k, v, log_decay, **options)
    bounds, state, pieces = [0, *sorted(cuts), 60], None, []
    for start, stop in pairwise(bounds):
        part = [x[:, start:stop] for x in (q, k, v)]
        out, state = lightning_attention(*part, log_decay, initial_state=state, **options)
        pieces.append(out)
    close(torch.cat(pieces, 1), wanted)
    close(state, final)
