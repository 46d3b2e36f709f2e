"""Time the sweep for Hopper beside the Triton kernels, and other ways of sharing out its columns.

    python tests/kernel/bench_hopper.py [SHAPE ...] > figures.json

Forward and backward pass of the operators, each recorded as a CUDA graph and replayed back to back, medians of 20 in
ms; "pt" with a decay for every token and its gradient. The floor is the time to move q, k, v, o (forward) and also q,
k, v, do, dq, dk, dv (backward) once at the measured speed of a copy. bf16, slopes of ALiBi.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from lightning_attention import backward, forward, hopper, linear_op
from lightning_attention.hopper import Consumers
from lightning_attention.shape import shape_of
from torch import Tensor

SHAPES = {  # B, T, Hq, Hkv, D, Dv
    "8x8K": (8, 8192, 32, 32, 128, 128),
    "64x1K": (64, 1024, 32, 32, 128, 128),
    "16x4K": (16, 4096, 32, 32, 128, 128),
    "2x32K": (2, 32768, 32, 32, 128, 128),
    "1x64K": (1, 65536, 32, 32, 128, 128),
    "1x128K": (1, 131072, 32, 32, 128, 128),
    "1x32K, H=8": (1, 32768, 8, 8, 128, 128),
    "1x2K": (1, 2048, 32, 32, 128, 128),
    "8x8K, 32/8 heads": (8, 8192, 32, 8, 128, 128),
    "8x8K, Dv=64": (8, 8192, 32, 32, 128, 64),
}
CHOICES = {  # consumers, stages, registers, programs of a multiprocessor
    "chosen": None,
    "2, 2 stages": Consumers(2, 2, 168, 1),
    "2, 3 stages": Consumers(2, 3, 168, 1),
    "1, 4 stages": Consumers(1, 4, 168, 1),
}


def timed(call: Callable[[], Any]) -> float:
    """Median milliseconds of a replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(24)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairwise(events[3:]))[10]


def copy_speed() -> float:
    """Bytes read and written in a millisecond."""
    source, target = (torch.zeros(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        event.record()
        target.copy_(source)
    torch.cuda.synchronize()
    return 2**32 / sorted(a.elapsed_time(b) for a, b in pairwise(events[1:]))[5]


def measure(sizes: tuple[int, ...], speed: float) -> dict[str, float]:
    """Times of one shape, with what is chosen or patched at the moment, and shares of the floor."""
    rows, length, heads, shared, dim, value_dim = sizes
    torch.manual_seed(0)
    tensors = ((heads, dim), (shared, dim), (shared, value_dim), (heads, value_dim))
    q, k, v, do = (torch.randn(rows, length, *size, device="cuda", dtype=torch.bfloat16) for size in tensors)
    decay = -(2.0 ** (-8 * (torch.arange(shared, device="cuda") + 1) / shared))
    found = {}
    for name, given in (("", decay), ("pt ", decay.expand(rows, length, shared).contiguous())):
        arguments = (q, k, v, given, dim**-0.5, None, None, False, None, None, False, 0)
        found[f"{name}forward"] = timed(lambda args=arguments: linear_op._forward(*args))
        shape = shape_of(q, k, v, given, None, False, False)
        entering = linear_op._forward(*arguments)[4] if shape.split else None

        def back(given: Tensor = given, entering: Tensor | None = entering) -> None:
            linear_op._backward(
                q, k, v, do, given, dim**-0.5, entering, None, None, None, None, None, None, None, 0, False,
                given.dim() == 3, None, None,
            )  # fmt: skip

        found[f"{name}backward"] = timed(back)
    once = 2 * sum(x.numel() for x in (q, k, v))
    there = (once + 2 * do.numel()) / speed
    found["share forward"] = there / found["forward"]
    found["share both"] = (2 * there + once / speed) / (found["forward"] + found["backward"])
    return {key: round(value, 4) for key, value in found.items()}


def main() -> None:
    """Print the figures of the shapes that are named, else of all."""
    speed = copy_speed()
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy TB/s": round(speed / 1e9, 3), "rows": {}}
    for name in sys.argv[1:] or SHAPES:
        for choice, consumers in CHOICES.items():
            given = hopper.consumers if consumers is None else lambda *_, found=consumers: found
            if consumers is not None and consumers.number * 64 > SHAPES[name][5]:
                continue
            with mock.patch.object(hopper, "consumers", given):
                figures["rows"][f"{name}: {choice}"] = measure(SHAPES[name], speed)
            print(name, choice, figures["rows"][f"{name}: {choice}"], file=sys.stderr, flush=True)
        with (
            mock.patch.object(forward, "fits_hopper", return_value=False),
            mock.patch.object(backward, "fits_hopper", return_value=False),
        ):
            figures["rows"][f"{name}: Triton"] = measure(SHAPES[name], speed)
        print(name, "Triton", figures["rows"][f"{name}: Triton"], file=sys.stderr, flush=True)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
