"""Compile every kernel for GPUs that are not here: shared memory, registers and stack of each.

    python tests/kernel/compile_kernels.py [--arch 90 ...] [--dtype bf16 ...] [--dim 64 128:64 ...] [--call plain ...]

The launchers run on small tensors under a driver that compiles what they launch and launches nothing, so that
parameters, constants and alignment are those of real calls. Exit code 1 if a kernel needs more shared memory than a
block can have, or multiplies half precision without tensor cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from lightning_attention import (
    bulk,
    hedgehog_features,
    hopper,
    lightning_attention_step,
    local_attention,
    local_attention_cached,
    local_op,
    merged_local_attention,
)
from lightning_attention import launch as launch_parameters
from lightning_attention.features import largest_dim
from lightning_attention.linear_op import lightning_attention_kernel
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = ("64", "96", "128", "192", "256", "128:64", "256:128")
FOR_HOPPER = {"128", "256", "128:64", "256:128"}  # those of `hopper.TAKEN` in DIMS
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WITHOUT_PRODUCTS = tuple(f"{name}_kernel" for name in ("scan", "delta", "decay", "row", "sink", "step", "loss", "sums"))


class Target:
    """What Triton asks of a driver to compile a kernel for an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: each architecture has its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, tuple[str, Any]]]:
    """Compile what is launched; yields the kernels by hash, with the names of their functions."""
    found: dict[str, tuple[str, Any]] = {}
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if "EARLY" in options:
            options["EARLY"] = arch >= 90  # as `dependent_launch`
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = self.__name__, kernel
        return kernel

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.dict(os.environ, SWAPATTN_KERNELS="triton", SWAPATTN_HOPPER="1"))
        for module in (launch_parameters, bulk, local_op):
            patches.enter_context(mock.patch.object(module, "has_bulk_copies", return_value=arch >= 90))
        patches.enter_context(mock.patch.object(hopper, "available", return_value=arch == 90))
        memory = SHARED_MEMORY[arch]
        patches.enter_context(mock.patch.object(launch_parameters, "shared_memory", return_value=memory))
        driver.set_active(Target(arch))
        yield found


def linear(dtype: torch.dtype, dim: int, value_dim: int, *, group: int = 1, backward: bool = True, full: bool = False,
           segment: int | None = 256, rows: int = 1, length: int = 512) -> None:  # fmt: skip
    """Forward and backward pass; `full`: normalised, with a mask and a decay for every token."""
    heads = 2

    def random(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    q, k, v = (
        random(rows, length, heads * group, dim),
        random(rows, length, heads, dim),
        random(rows, length, heads, value_dim),
    )
    log_decay = torch.zeros((rows, length, heads) if full else (heads,), requires_grad=full)
    state: Any = torch.zeros(rows, heads, dim, value_dim, requires_grad=True)
    out, final = lightning_attention_kernel(
        q, k, v, log_decay, segment=segment, normalize=full, output_final_state=True,
        initial_state=(state, torch.zeros(rows, heads, dim)) if full else state,
        mask=torch.ones(rows, length, dtype=torch.bool) if full else None,
    )  # fmt: skip
    if backward:
        states = final[0] if full else final
        (out.sum() + states.sum()).backward()


def hopper_sweeps(dtype: torch.dtype, dim: int, value_dim: int, *, rows: int = 70, group: int = 1, full: bool = False,
                  packed: bool = False, normalize: bool = False) -> None:  # fmt: skip
    """Forward and backward pass as they are trained; `full`: in segments, with a decay for every token."""
    length, heads = 512, 2
    q, k, v = (
        torch.zeros(rows, length, h, d, dtype=dtype, requires_grad=True)
        for h, d in ((heads * group, dim), (heads, dim), (heads, value_dim))
    )
    log_decay = torch.zeros((rows, length, heads) if full else (heads,), requires_grad=full)
    bounds = torch.arange(0, length + 1, 4, dtype=torch.int32) if packed else None
    with mock.patch.object(hopper, "SMALLEST", 0):
        out, _ = lightning_attention_kernel(
            q, k, v, log_decay, segment=256 if full else length, cu_seqlens=bounds, normalize=normalize
        )
        out.sum().backward()


def hopper_prompts(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    """Forward passes that hand on a state, with one warpgroup that multiplies and with two."""
    for rows, normalize in ((1, False), (1, True), (70, True)):
        q, k, v = (torch.zeros(rows, 512, 4, d, dtype=dtype) for d in (dim, dim, value_dim))
        with mock.patch.object(hopper, "SMALLEST", 0), torch.no_grad():
            lightning_attention_kernel(
                q, k, v, torch.zeros(4), normalize=normalize, output_final_state=True, segment=512
            )


def step(dtype: torch.dtype, dim: int, value_dim: int, *, rows: int = 64, length: int = 1) -> None:
    """Decoding, with a state for each head and with one for four."""
    for heads, shared, normalize in ((4, 4, False), (8, 2, True), (8, 2, False)):
        q, k, v = (torch.zeros(rows, length, h, d, dtype=dtype)
                   for h, d in ((heads, dim), (shared, dim), (shared, value_dim)))  # fmt: skip
        pools = torch.zeros(rows, shared, dim, value_dim), torch.zeros(rows, shared, dim)
        slots = torch.arange(rows)
        lightning_attention_step(
            q, k, v, torch.zeros(shared), pools if normalize else pools[0], slots=slots, normalize=normalize
        )


def window(
    dtype: torch.dtype, dim: int, value_dim: int, *, rows: int = 2, length: int = 256, return_lse: bool = False,
    heads: tuple[int, int] = (4, 2),
) -> None:  # fmt: skip
    """The softmax window, its backward pass, with hidden tokens, and on a cache."""
    q, k, v = (
        torch.zeros(rows, length, h, d, dtype=dtype)
        for h, d in ((heads[0], dim), (heads[1], dim), (heads[1], value_dim))
    )
    for mask, smallest in ((None, 1), (None, 2**40), (torch.ones(rows, length, dtype=torch.bool), 1)):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with mock.patch.object(local_op, "SMALLEST_BULK", smallest):
            found: Any = local_attention(*leaves, window=64, sinks=4, mask=mask, return_lse=return_lse)
            sum(x.sum() for x in (found if return_lse else [found])).backward()
    positions = torch.arange(length).expand(rows, length)
    with torch.no_grad():
        local_attention_cached(
            q[:, -2:], k, v, k_positions=positions, q_positions=positions[:, -2:].clone(), window=64, sinks=4,
            return_lse=return_lse,
        )  # fmt: skip


def merged(
    dtype: torch.dtype, dim: int, value_dim: int, *, rows: int = 2, length: int = 256, heads: tuple[int, int] = (4, 2)
) -> None:
    """The softmax window merged with another attention, and its backward pass, also with hidden tokens."""
    sizes = (heads[0], dim), (heads[1], dim), (heads[1], value_dim), (heads[0], value_dim)
    leaves = [torch.zeros(rows, length, *size, dtype=dtype, requires_grad=True) for size in sizes]
    log_sum, scale = torch.zeros(rows, length, heads[0], requires_grad=True), torch.zeros(heads[0], value_dim)
    for mask, smallest in ((None, 1), (None, 2**40), (torch.ones(rows, length, dtype=torch.bool), 1)):
        with mock.patch.object(local_op, "SMALLEST_BULK", smallest):
            for trained in (False, True):
                factor = scale.detach().requires_grad_(trained)
                merged_local_attention(*leaves, log_sum, factor, window=64, sinks=4, mask=mask).sum().backward()


def features(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    """The learnt features of queries and keys, with and without hidden dimensions, and their backward pass."""
    if dim > largest_dim(dtype):
        return
    for hidden in (0, 2 * dim):
        x = torch.zeros(2, 256, 2, dim, dtype=dtype, requires_grad=True)
        sizes = [(dim, dim)] if not hidden else [(dim, dim), (dim, hidden), (hidden, dim)]
        hedgehog_features(x, *(torch.zeros(4, *size, requires_grad=True) for size in sizes), scale=0.5).sum().backward()


def losses(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    """The losses of `swapattn`: the usual one, and all at once."""
    from swapattn.loss_kernel import launch
    from swapattn.losses import Mixture

    student, teacher, weights = torch.zeros(2, 320, dtype=dtype), torch.zeros(2, 320, dtype=dtype), torch.ones(2)
    launch(student, teacher, None, weights, None, Mixture(), (1.0, 0.0, 1.0, 0.0), gradient=True)
    everything = Mixture(1.0, 1.0, 1.0, 1.0)
    labels = torch.zeros(2, dtype=torch.int64)
    launch(student, teacher, labels, weights, weights, everything, (1.0, 30.0, 1.0, 30.0), gradient=True)


CALLS: dict[str, Callable[[torch.dtype, int, int], None]] = {
    "plain": linear,
    "full": lambda dtype, dim, value_dim: linear(dtype, dim, value_dim, group=2, full=True),
    "grouped": lambda dtype, dim, value_dim: linear(dtype, dim, value_dim, group=2, backward=False, segment=512),
    "groups of 8": lambda dtype, dim, value_dim: linear(dtype, dim, value_dim, group=8),
    "step": step,
    "window": window,
    "lse": lambda dtype, dim, value_dim: window(dtype, dim, value_dim, return_lse=True),
    "merged": merged,
    "features": features,
    "losses": losses,
    "hopper": hopper_sweeps,
    "hopper_full": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, full=True),
    "hopper_grouped": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, rows=1, group=4),
    "hopper_together": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, rows=64, group=4),
    "hopper_packed": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, rows=1, packed=True),
    "hopper_sum": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, normalize=True),
    "hopper_sum_full": lambda dtype, dim, value_dim: hopper_sweeps(dtype, dim, value_dim, normalize=True, full=True),
    "hopper_sum_grouped": lambda dtype, dim, value_dim: hopper_sweeps(
        dtype, dim, value_dim, rows=1, group=4, normalize=True
    ),
    "hopper_prompts": hopper_prompts,
}


def resources(cubin: bytes) -> str:
    """Registers and bytes of stack of a thread, where the tool that reads them is at hand."""
    if not CUOBJDUMP.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return " ".join(re.findall(r"(?:REG|STACK):\d+", text))


def report(arch: int, dtype: str, size: str, call: str) -> Iterator[tuple[str, int, bool]]:
    """A line, the bytes of shared memory and whether all is well, for each kernel that a call launches."""
    dim, value_dim = (int(x) for x in (size.split(":") * 2)[:2])
    with compiling(arch) as kernels:
        CALLS[call](DTYPES[dtype], dim, value_dim)
    for name, kernel in kernels.values():
        shared = kernel.metadata.shared
        tensor_cores = name in WITHOUT_PRODUCTS or dtype == "fp32" or "mma" in kernel.asm["ptx"]
        good = shared <= SHARED_MEMORY[arch] and tensor_cores
        line = f"sm_{arch} {dtype} {dim}:{value_dim} {call} {name} shared {shared} {resources(kernel.asm['cubin'])}"
        yield line + ("" if good else " FAILED"), shared, good


def main() -> int:
    """Compile what was asked for and print a line for each kernel, and the largest of each architecture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=SHARED_MEMORY)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--dim", nargs="+", default=list(DIMS), help="D or D:Dv")
    parser.add_argument("--call", nargs="+", default=list(CALLS), choices=CALLS, help="[default: all]")
    options = parser.parse_args()
    failed = 0
    for arch in options.arch:
        seen: list[int] = []
        for dtype in options.dtype:
            for size in options.dim:
                for call in options.call:
                    if call == "losses" and size != options.dim[0]:
                        continue  # there is no D in them
                    if call.startswith("hopper") and (arch, dtype, size in FOR_HOPPER) != (90, "bf16", True):
                        continue
                    for line, shared, good in report(arch, dtype, size, call):
                        print(line, flush=True)
                        seen.append(shared)
                        failed += not good
        most = max(seen, default=0)
        print(f"sm_{arch}: {len(seen)} kernels, at most {most} of {SHARED_MEMORY[arch]} bytes shared", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
