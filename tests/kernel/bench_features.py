"""Time `hedgehog_features` on a GPU: the kernels beside the plain form, launched one by one and compiled.

    python tests/kernel/bench_features.py [--sweep] [--json FILE]

Everything is recorded as CUDA graphs and replayed, so that the host is no limit; bf16, errors against fp64. `--sweep`
times other launch parameters too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning_attention import features, features_op, hedgehog_features
from lightning_attention.features_op import FeaturesConfig
from torch import Tensor

# rows, tokens, heads of x, features of each, D: queries and keys of SmolLM2-135M in a step of `short`, queries of
# `standard-pure`, a layer of a 7B model
SHAPES = {
    "32 x 1K, 9 heads of 64": (32, 1024, 9, 1, 64),
    "32 x 1K, 3 heads of 64": (32, 1024, 3, 1, 64),
    "4 x 1K, 4 x 9 heads of 64": (4, 1024, 9, 4, 64),
    "8 x 2K, 32 heads of 128": (8, 2048, 32, 1, 128),
}
SWEEP = {  # tokens of a tile, hidden dimensions, warps, stages
    ("forward", False): [(64, 128, 4, 1), (64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (32, 128, 4, 2)],
    ("input", False): [(128, 128, 8, 2), (64, 128, 4, 1), (32, 128, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)],
    ("matrices", False): [(64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (128, 64, 4, 2), (64, 128, 8, 2)],
    ("forward", True): [(64, 64, 4, 2), (64, 64, 8, 1), (128, 64, 8, 1), (64, 32, 4, 2)],
    ("input", True): [(32, 64, 4, 1), (64, 64, 8, 1), (32, 64, 8, 1), (64, 32, 8, 1)],
    ("matrices", True): [(64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)],
}


def microseconds(function: Callable[[], Any]) -> float:
    """Of one call, the median of five replays of ten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            function()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 100)
    return statistics.median(times[1:])


def forms(inputs: Sequence[Tensor], do: Tensor, scale: float) -> dict[str, dict[str, float]]:
    """Forward, and with the backward pass, of each form."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = {}
    for name, largest, function in (
        ("kernels", 128, hedgehog_features),
        ("plain", 0, hedgehog_features),
        ("compiled", 0, torch.compile(hedgehog_features, dynamic=False)),
    ):

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(*inputs, scale=scale)

        def both(function: Callable[..., Tensor] = function) -> Any:
            return torch.autograd.grad(function(*leaves, scale=scale), leaves, do)

        with mock.patch.object(features, "LARGEST_DIM", largest):
            found[name] = {"forward": microseconds(forward), "both": microseconds(both)}
    return found


def worst(inputs: Sequence[Tensor], do: Tensor, scale: float) -> dict[str, float]:
    """Largest relative error against fp64, of features and gradients of the first row."""

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        out = hedgehog_features(*leaves, scale=scale)
        return [out.detach(), *torch.autograd.grad(out, leaves, do[:1].to(out.dtype))]

    x, *matrices = inputs
    own = run([x[:1], *matrices])
    with mock.patch.object(features, "LARGEST_DIM", 0):
        plain, exact = run([x[:1], *matrices]), run([y.double() for y in (x[:1], *matrices)])
    return {
        name: max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        for name, found in (("kernels", own), ("plain", plain))
    }


def sweep(inputs: Sequence[Tensor], do: Tensor, scale: float) -> dict[str, dict[str, float]]:
    """Microseconds of the forward pass ("forward") and of the backward pass (the others) by launch parameters."""
    chosen, matrices = features_op.features_config, [*inputs[1:], None, None][:3]
    found: dict[str, dict[str, float]] = {}
    for (kind, wide), programs in itertools.product(SWEEP, (1, 2, 3, 4)):
        if wide is not (inputs[0].shape[3] > 64):
            continue
        for parameters in SWEEP[kind, wide]:
            config = FeaturesConfig(*parameters, programs)

            def pick(asked: str, *rest: Any, kind: str = kind, config: FeaturesConfig = config) -> FeaturesConfig:
                return config if asked == kind else chosen(asked, *rest)

            with mock.patch.object(features_op, "features_config", pick):
                if kind == "forward":
                    time = microseconds(lambda: features_op._features(inputs[0], *matrices, scale))
                else:
                    time = microseconds(lambda: features_op._backward(do, inputs[0], *matrices, scale, True))
            found.setdefault(kind, {})[str(tuple(config))] = time
    return found


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    name = torch.cuda.get_device_name()
    found: dict[str, Any] = {"hardware": name, "torch": torch.__version__, "command": "tests/kernel/bench_features.py"}
    print(f"{name}, microseconds: forward; with the backward pass")
    for title, (rows, length, heads, branches, dim) in SHAPES.items():
        sizes = ((dim, dim), (dim, 2 * dim), (2 * dim, dim))
        inputs = [
            random(rows, length, heads, dim).bfloat16(),
            *(random(branches * heads, *size) / size[0] ** 0.5 for size in sizes),
        ]
        do, scale = random(rows, length, branches * heads, 2 * dim).bfloat16(), dim**-0.25
        row: dict[str, Any] = {"error": worst(inputs, do, scale), **forms(inputs, do, scale)}
        times = ", ".join(f"{form} {row[form]['forward']:.0f}; {row[form]['both']:.0f}" for form in list(row)[1:])
        print(f"{title}: {times}; error {row['error']['kernels']:.1e} (plain {row['error']['plain']:.1e})", flush=True)
        if options.sweep:
            row["sweep"] = sweep(inputs, do, scale)
            for kind, by in row["sweep"].items():
                best = sorted((time, config) for config, time in by.items())[:5]
                print(f"  {kind}: " + ", ".join(f"{config} {time:.0f}" for time, config in best), flush=True)
        found[title] = row
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
