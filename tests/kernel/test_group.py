"""One sequence over three processes equals one process: outputs, final state and every gradient."""

import os
import subprocess
import sys

import pytest
import torch
from lightning_attention import lightning_attention

BOUNDS = (0, 20, 21, 37)
CASES = {
    "fixed": {},
    "state of its own for each query head": {"heads": 4},
    "decay for every token": {"per_token": True, "mask": True},
    "normalised": {"normalize": True, "mask": True},
    "kernels": {"heads": 1, "kernels": True, "per_token": True},
}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(heads=2, per_token=False, mask=False, normalize=False, kernels=False):
    """Tensors along the tokens, tensors that all processes hold, options."""
    generator = torch.Generator().manual_seed(0)
    dtype, length = torch.float32 if kernels else torch.float64, BOUNDS[-1]
    rows, shared, queries = (1, 1, 2) if kernels else (2, 2, 4)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    split = [random(rows, length, *size) for size in ((queries, 6), (shared, 6), (shared, 3), (queries, 3))]
    decay = -random(rows, length, heads) if per_token else -torch.tensor([0.0, 0.1, 0.9, 7.9], dtype=dtype)[:heads]
    whole = [random(rows, heads, 6, 3), *([random(rows, heads, 6)] if normalize else [])]
    hidden = torch.rand(rows, length, generator=generator) > 0.3 if mask else None
    return split, decay, whole, hidden


def results(name, start=0, stop=BOUNDS[-1], group=None, last=True):
    """Output, final states and gradients of a loss on the output and, on one process, the final states."""
    case = CASES[name]
    if group is not None:
        os.environ["SWAPATTN_KERNELS"] = "triton" if case.get("kernels") else "torch"
    split, decay, whole, hidden = make(**case)
    *leaves, do = (x[:, start:stop].clone() for x in split)
    leaves += [decay[:, start:stop].clone() if decay.dim() == 3 else decay, *whole]
    leaves = [x.requires_grad_() for x in leaves]
    out, final = lightning_attention(
        *leaves[:4],
        initial_state=tuple(leaves[4:]) if len(whole) > 1 else leaves[4],
        output_final_state=True,
        mask=None if hidden is None else hidden[:, start:stop],
        normalize=case.get("normalize", False),
        group=group,
    )
    finals = final if isinstance(final, tuple) else (final,)
    loss = (out * do).sum() + sum(x.sin().sum() for x in finals) * last
    return [x.detach() for x in (out, *finals, *torch.autograd.grad(loss, leaves))]


def work(rank, folder):
    count = len(BOUNDS) - 1
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=count, rank=rank)
    group = torch.distributed.group.WORLD
    found = {name: results(name, *BOUNDS[rank : rank + 2], group, rank == count - 1) for name in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """What each of the processes found."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("gloo is not there")
    folder = tmp_path_factory.mktemp("group")
    ranks = range(len(BOUNDS) - 1)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in ranks]
    assert [process.wait(timeout=300) for process in started] == [0 for _ in ranks]
    return [torch.load(folder / f"{rank}.pt") for rank in ranks]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(split, name):
    wanted = results(name)
    states = len(make(**CASES[name])[2])
    for i, (whole, *parts) in enumerate(zip(wanted, *(found[name] for found in split), strict=True)):
        if 1 <= i <= states:
            joined = parts
        elif whole.shape[1:2] == BOUNDS[-1:]:
            joined = [torch.cat(parts, 1)]
        else:
            joined = [sum(parts)]
        for x in joined:
            assert (x - whole).norm() <= EXACT[whole.dtype] * whole.norm(), i


def test_packed_sequences_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "ProcessGroup", str)
    x = torch.rand(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"group: packed sequences .* cannot be split over processes"):
        lightning_attention(x, x, x, torch.zeros(1), cu_seqlens=torch.tensor([0, 4]), group="group")


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
