"""Call every kernel on small shapes, for NVIDIA's compute-sanitizer, which looks for stray accesses and races.

    python tests/kernel/sanitize.py  # compiles, so that the others need not
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernel/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/kernel/sanitize.py

Without PyTorch's cache every tensor is an allocation of its own, so that a read behind its end is seen. Lengths are no
multiples of a chunk. Prints one line a case; results are compared by the other tests. An argument such as bfloat16-64
takes this type and this number of features alone.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from lightning_attention import (
    hopper,
    lightning_attention,
    lightning_attention_step,
    local_attention,
    local_attention_cached,
    merged_local_attention,
)
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUTS = [0, 1, 1, 70, 197]  # of packed sequences, one of them empty
LINEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "group": {"shared": 2},
    "group, state each": {"shared": 2, "states": 4},
    "decay per token": {"gated": True},
    "normalised": {"normalize": True, "return_log_sum": True},
    "masked, with states": {"mask": True, "output_final_state": True, "normalize": True, "shared": 1},
    "packed": {"packed": True, "shared": 2},
    "packed, normalised": {"packed": True, "shared": 2, "normalize": True, "return_log_sum": True},
    "segments": {"length": 2085, "output_final_state": True},
    "prompt, normalised": {"output_final_state": True, "normalize": True, "shared": 2},
    "segments, decay per token": {"length": 2085, "gated": True, "shared": 1},
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.rand(shape, device=DEVICE).sub_(0.3).to(dtype).requires_grad_(grad)


def linear(dtype: torch.dtype, dim: int, values: int, **case: Any) -> None:
    length, heads, shared = case.pop("length", 197), 4, case.pop("shared", 4)
    packed, states = case.pop("packed", False), case.pop("states", shared)
    rows = 1 if packed or length > 1000 else 2
    q = randn(rows, length, heads, dim, dtype=dtype, grad=True)
    k = randn(rows, length, shared, dim, dtype=dtype, grad=True)
    v = randn(rows, length, shared, values, dtype=dtype, grad=True)
    shape = (rows, length, states) if case.pop("gated", False) else (states,)
    decay = (-torch.rand(shape, device=DEVICE)).requires_grad_()
    if case.get("mask"):
        case["mask"] = torch.rand(rows, length, device=DEVICE) > 0.2
    if packed:
        case["cu_seqlens"] = torch.tensor(CUTS, device=DEVICE, dtype=torch.int32)
    out, *more = lightning_attention(q, k, v, decay, **case)
    loss = out.float().square().sum() + sum(x.sum() for x in more if isinstance(x, Tensor))
    torch.autograd.grad(loss, (q, k, v, decay))


def step(dtype: torch.dtype, dim: int, values: int, shared: int, length: int, normalize: bool) -> None:
    rows, slots = 3, torch.tensor([4, -1, 0], device=DEVICE)
    q, k, v = (randn(rows, length, h, d, dtype=dtype) for h, d in ((4, dim), (shared, dim), (shared, values)))
    state, sums = randn(5, shared, dim, values), randn(5, shared, dim)
    pool: Any = (state, sums) if normalize else state
    with torch.no_grad():
        lightning_attention_step(q, k, v, -torch.rand(shared, device=DEVICE), pool, slots=slots, normalize=normalize)


def window(dtype: torch.dtype, dim: int, shared: int, kind: str) -> None:
    rows = 1 if kind == "packed" else 2
    q = randn(rows, 197, 4, dim, dtype=dtype, grad=True)
    k, v = (randn(rows, 197, shared, dim, dtype=dtype, grad=True) for _ in range(2))
    options: dict[str, Any] = {"window": 37, "sinks": 3}
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor(CUTS, device=DEVICE, dtype=torch.int32)
    if kind == "masked":
        options["mask"] = torch.rand(rows, 197, device=DEVICE) > 0.2
    out, lse = local_attention(q, k, v, return_lse=True, **options)
    torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))
    other, log_sum = randn(rows, 197, 4, dim, dtype=dtype, grad=True), randn(rows, 197, 4, grad=True)
    leaves = q, k, v, other, log_sum, randn(4, dim, grad=True)
    torch.autograd.grad(merged_local_attention(*leaves, **options).float().square().sum(), leaves)


def ring(dtype: torch.dtype, dim: int, shared: int) -> None:
    q, k, v = (randn(2, n, h, dim, dtype=dtype) for n, h in ((2, 4), (43, shared), (43, shared)))
    positions = torch.arange(43, device=DEVICE).expand(2, 43).flip(1)
    with torch.no_grad():
        local_attention_cached(q, k, v, k_positions=positions, q_positions=positions[:, :2], window=37, sinks=3)


def main() -> None:
    count, hopper.SMALLEST = 0, 0  # small calls go to Hopper's sweep, too
    types = [*itertools.product((torch.bfloat16, torch.float32), (64, 128)), (torch.bfloat16, 256)]
    chosen = {f"{str(dtype).removeprefix('torch.')}-{dim}": (dtype, dim) for dtype, dim in types}
    unknown = set(sys.argv[1:]) - chosen.keys()
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: expected {', '.join(chosen)}")
    for dtype, dim in (chosen[name] for name in sys.argv[1:] or chosen):
        sizes = sorted({max(64, dim // 2), dim})  # of the values
        for (name, case), values in itertools.product(LINEAR.items(), sizes):
            linear(dtype, dim, values, **case)
            print(f"linear, {name}: {dtype}, {dim} x {values}", flush=True)
        for shared, length, normalize in itertools.product((4, 1), (1, 3), (False, True)):
            step(dtype, dim, 64, shared, length, normalize)
        for shared, kind in itertools.product((4, 2), ("whole", "packed", "masked")):
            window(dtype, dim, shared, kind)
        ring(dtype, dim, 2)
        print(f"step and window: {dtype}, {dim}", flush=True)
        count += len(LINEAR) * len(sizes) + 8 + 6 + 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases on {DEVICE}")


if __name__ == "__main__":
    main()
