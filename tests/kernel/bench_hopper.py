"""Time the sweep for Hopper beside the Triton kernels, and other ways of sharing out its columns and segments.

    python tests/kernel/bench_hopper.py [SHAPE ...] > figures.json

Forward and backward pass of the operators, recorded as CUDA graphs and replayed back to back, medians in ms; "pt" with
a decay for every token and its gradient, "prompt" a forward pass that hands on a state, "sum" with a normalised output
whose sum has a gradient, too. The floor is the time to move q, k, v, o (forward) and also q, k, v, do, dq, dk, dv
(backward) once at the measured speed of a copy. bf16, slopes of ALiBi. Without a GPU, with TRITON_INTERPRET=1 and
SWAPATTN_KERNELS=triton: tiny shapes, to try it out.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import torch
from lightning_attention import hopper, linear_op
from lightning_attention.hopper import Consumers
from lightning_attention.shape import shape_of
from torch import Tensor

from swapattn.kernel_lab import Lab

SHAPES = {  # B, T, Hq, Hkv, D, Dv, and Hs where it is not Hkv
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
    "8x8K, D=256, Dv=128": (8, 8192, 32, 32, 256, 128),
    "8x8K, D=256, Dv=128, 32/8 heads": (8, 8192, 32, 8, 256, 128),
    "32x1K, 9/3 heads, D=128, Dv=64": (32, 1024, 9, 3, 128, 64),
    "4x1K, 36/12 heads with a state each, D=128, Dv=64": (4, 1024, 36, 12, 128, 64, 36),
    "4x2K, 36/12 heads with a state each, D=128, Dv=64": (4, 2048, 36, 12, 128, 64, 36),
    "1x4K, 36/12 heads with a state each, D=128, Dv=64": (1, 4096, 36, 12, 128, 64, 36),
}
CHOICES = {  # consumers, stages, registers, programs of a multiprocessor
    "2, 2 stages": Consumers(2, 2, 168, 1),
    "2, 3 stages": Consumers(2, 3, 168, 1),
    "1, 4 stages": Consumers(1, 4, 168, 1),
}


def measure(lab: Lab, sizes: tuple[int, ...]) -> dict[str, float]:
    """Times of one shape, with what is chosen or patched at the moment, and shares of the floor."""
    shape = lab.shape(*sizes[:5])
    wide, narrow = (shape.rows, shape.length, shape.heads), (shape.rows, shape.length, shape.shared)
    values = shape.dim * sizes[5] // sizes[4]
    q, k = lab.random(*wide, shape.dim).abs(), lab.random(*narrow, shape.dim).abs()
    v, do = lab.random(*narrow, values), lab.random(*wide, values)
    states = shape.heads if len(sizes) > 6 else shape.shared
    decay = lab.decay(states)
    per_token = decay.expand(*wide[:2], states).contiguous()
    d_inverse = lab.random(shape.heads, shape.rows, shape.length).float()
    found = {}
    for name, given, normalize in (
        ("", decay, False), ("pt ", per_token, False), ("sum ", decay, True), ("pt sum ", per_token, True)
    ):  # fmt: skip
        arguments = (q, k, v, given, 1.0 if normalize else shape.dim**-0.5, None, None, False, None, None, normalize, 0)
        found[f"{name}forward"] = lab.time_graph(lambda args=arguments: linear_op._forward(*args))
        prompt = (*arguments[:7], True, *arguments[8:])
        found[f"{name}prompt"] = lab.time_graph(lambda args=prompt: linear_op._forward(*args))
        o, inverse, *_, entering, entering_sum = linear_op._forward(*arguments)
        split = shape_of(q, k, v, given, None, False, normalize).split
        kept = (entering if split else None, entering_sum if split and normalize else None, None, None)
        output = (o, inverse) if normalize else (None, None)

        def back(
            arguments: tuple[Any, ...] = arguments,
            kept: tuple[Tensor | None, ...] = kept,
            output: tuple[Tensor | None, Tensor | None] = output,
        ) -> None:
            given, scale, normalize = arguments[3], arguments[4], arguments[10]
            linear_op._backward(
                q, k, v, do, given, scale, *kept, *output, None, None, 0, False, given.dim() == 3, None,
                d_inverse if normalize else None,
            )  # fmt: skip

        found[f"{name}backward"] = lab.time_graph(back)
    once = sum(x.nbytes for x in (q, k, v))
    there = once + do.nbytes
    found["share forward"] = lab.floor(there) / found["forward"]
    found["share both"] = lab.floor(2 * there + once) / (found["forward"] + found["backward"])
    return {key: round(value, 4) for key, value in found.items()}


def main() -> None:
    """Print the figures of the shapes that are named, else of all."""
    cuda = torch.cuda.is_available()
    lab, usual = Lab("cuda" if cuda else "cpu", peers=False), hopper.consumers
    device = torch.cuda.get_device_name() if cuda else "cpu"
    figures: dict[str, Any] = {"device": device, "copy TB/s": round(lab.bandwidth / 1e12, 3), "rows": {}}

    def add(name: str, choice: str) -> None:
        figures["rows"][f"{name}: {choice}"] = measure(lab, SHAPES[name])
        print(name, choice, figures["rows"][f"{name}: {choice}"], file=sys.stderr, flush=True)

    for name in sys.argv[1:] or SHAPES:
        add(name, "chosen")
        for choice, consumers in CHOICES.items():
            if consumers.number * hopper.CHUNK <= min(SHAPES[name][4:6]) and SHAPES[name][4] < 256:

                def chosen(*sizes: Any, consumers: Consumers = consumers, **options: Any) -> Consumers:
                    """With a fifth tile there is room for two stages of two consumers."""
                    heads = usual(*sizes, **options).heads
                    stages = 2 if options["dots"] and consumers.number == 2 else consumers.stages
                    return consumers._replace(heads=heads, stages=stages)

                with mock.patch.object(hopper, "consumers", chosen):
                    add(name, choice)
        with mock.patch("lightning_attention.shape.CUT_FOR_HOPPER", False):
            add(name, "cut as for Triton")
        with mock.patch.dict(os.environ, {hopper.SWITCH: "0"}):
            add(name, "Triton")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
