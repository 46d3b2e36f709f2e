"""Time `local_attention` on a GPU: the kernels beside PyTorch's flex_attention, the plain form and the floor.

    python tests/kernel/bench_local.py [--rows 8] [--length 8192] [--heads 32] [--shared 32] [--dim 128] [--sweep]

The floor is the time to move q, k, v, o (forward) and also do, dq, dk, dv (backward) once at the measured speed of a
copy. Medians of GPU time with a cold L2 cache. `--sweep` times other launch parameters too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lightning_attention import local_op
from lightning_attention.local import local_attention
from lightning_attention.local_op import LocalConfig, local_attention_kernel
from torch import Tensor

SWEEPS = {
    "forward": [
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 128, 4, 1),
        (64, 64, 8, 1),
        (64, 64, 8, 2),
        (128, 64, 4, 1),
        (128, 64, 8, 1),
        (128, 64, 8, 2),
        (128, 128, 8, 1),
        (128, 32, 8, 3),
        (32, 64, 4, 2),
    ],
    "backward": [
        (64, 32, 4, 1),
        (64, 32, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 8, 1),
        (64, 64, 8, 2),
        (64, 32, 8, 1),
        (128, 32, 8, 1),
        (128, 64, 8, 1),
        (128, 64, 8, 2),
        (32, 32, 4, 1),
    ],
}


@cache
def _flex(length: int, window: int, sinks: int) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < sinks))

    mask = create_block_mask(seen, None, None, length, length, device="cuda", _compile=True)
    return torch.compile(flex_attention, fullgraph=True, dynamic=False), mask


def flex_local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scale: float | None = None
) -> Tensor:
    """`local_attention` of whole rows by PyTorch's flex_attention; its block mask is made once per length."""
    function, mask = _flex(q.shape[1], window, sinks)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return function(*heads_first, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def milliseconds(function: Callable[[], Any]) -> float:
    import triton.testing

    return float(triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median"))


def speed_of_copy() -> float:
    """Bytes per millisecond, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x))


def times(function: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> tuple[float, float]:
    """Forward alone, forward and backward."""
    q, k, v, do = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        forward = milliseconds(lambda: function(q, k, v, **options))
    return forward, milliseconds(lambda: torch.autograd.grad(function(*leaves, **options), leaves, do))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("rows", 8), ("length", 8192), ("heads", 32), ("shared", 32), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--sweep", action="store_true", help="time other launch parameters too")
    a = parser.parse_args()
    shapes = [(a.rows, a.length, heads, a.dim) for heads in (a.heads, a.shared, a.shared, a.heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    sizes = {"window": a.window, "sinks": a.sinks}
    nbytes = [x.numel() * x.element_size() for x in inputs]
    speed = speed_of_copy()
    forward_floor = (sum(nbytes[:3]) + nbytes[3]) / speed
    both_floor = forward_floor + (sum(nbytes) + nbytes[3] + sum(nbytes[:3])) / speed
    print(f"{a} on {torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e9:.2f} TB/s")
    print(f"floor            forward {forward_floor:.3f} ms, with backward {both_floor:.3f} ms")

    def report(name: str, function: Callable[..., Tensor]) -> None:
        try:
            forward, both = times(function, inputs, **sizes)
        except Exception as error:  # another form's failure must not hide the figures of the rest
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return
        shares = f"{forward_floor / forward:.0%}, {both_floor / both:.0%}"
        print(f"{name:16s} forward {forward:.3f} ms, with backward {both:.3f} ms: {shares} of the floor", flush=True)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = local_attention_kernel(*leaves, **sizes)
    torch.autograd.grad(out, leaves, inputs[3])
    extra = torch.cuda.max_memory_allocated() - before - nbytes[3] - sum(nbytes[:3])
    print(f"memory beyond inputs, output and gradients: {extra / 2**20:.0f} MiB")
    report("kernels", local_attention_kernel)
    report("flex_attention", flex_local_attention)
    if a.length * a.rows <= 65536:
        import os

        os.environ["SWAPATTN_KERNELS"] = "torch"
        report("plain form", local_attention)
    if a.sweep:
        chosen = local_op.local_config
        for kind, configs in SWEEPS.items():
            for config in configs:
                local_op.local_config = lambda which, *rest, kind=kind, config=config: (
                    LocalConfig(*config) if which == kind else chosen(which, *rest)
                )
                report(f"{kind} {config}", local_attention_kernel)
        local_op.local_config = chosen


if __name__ == "__main__":
    main()
