"""Compile the kernels of the linear branch for GPUs that are not here: shared memory, registers and stack of each.

    python tests/kernel/compile_linear.py [--arch 90 ...] [--dtype bf16 ...] [--dim 64 128:64 ...]

Exit code 1 if a kernel needs more shared memory than a block can have.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from compile_local import DTYPES, SHARED_MEMORY, resources
from lightning_attention import backward, forward, states
from lightning_attention.launch import sweep_config
from lightning_attention.shape import padded, precision
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KINDS = {
    "forward": forward.forward_kernel,
    "dq": backward.backward_kernel,
    "dkv": backward.backward_kernel,
    "states": states.segment_kernel,
}
OPERANDS = ("q", "k", "v", "o", "x", "y", "do", "dq", "dk", "dv")


def build(kind: str, dtype: str, dim: int, value_dim: int, arch: int, normalize: bool) -> Any:
    """The compiled kernel; pointers and strides count as divisible by 16."""
    kernel = KINDS[kind]
    config = sweep_config("forward" if kind == "states" else kind, dim, value_dim, DTYPES[dtype], normalize)
    columns = min(config.columns, padded(value_dim))
    given = {
        "D": dim, "V": value_dim, "BD": padded(dim), "BV": padded(value_dim) if kind in ("dq", "dkv") else columns,
        "TD": min(config.columns, padded(dim)), "TV": columns, "C": config.chunk, "GROUP": 1, "REVERSE": False,
        "PER_TOKEN": False, "MASKED": False, "NORMALIZE": normalize, "ENTERING": True, "BEHIND": True, "FIRST": True,
        "FINAL": True, "DOTS": False, "SEQUENCES": 0, "PRECISION": precision(DTYPES[dtype]), "DIRECT": kind == "dq",
        "BULK": arch >= 90, "EXACT": True,
    }  # fmt: skip
    constants = {name: value for name, value in given.items() if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in OPERANDS:
            signature[name] = f"*{dtype}"
        elif name.startswith("steps"):
            signature[name] = ("i32", "i32")
        elif name in ("hidden", "cu_seqlens"):
            signature[name] = "*u8" if name == "hidden" else "*i64"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            whole = ("length", "segment", "segments", "sequences", "heads", "shared", "query_heads")
            signature[name] = "i32" if name in whole or name.startswith("stride") else "*fp32"
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name.startswith("stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options)


def main() -> int:
    """Compile what was asked for and print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    parser.add_argument("--dim", nargs="+", default=["64", "96", "128", "192", "256", "128:64"])
    options = parser.parse_args()
    failed = False
    for arch in options.arch:
        for dtype in options.dtype:
            for size in options.dim:
                dim, value_dim = (int(x) for x in (size.split(":") * 2)[:2])
                for normalize in (False, True):
                    for kind in KINDS:
                        kernel = build(kind, dtype, dim, value_dim, arch, normalize)
                        shared = kernel.metadata.shared
                        fits = shared <= SHARED_MEMORY[arch]
                        failed = failed or not fits
                        name = f"sm_{arch} {dtype} {dim}:{value_dim} {'normalised ' * normalize}{kind}"
                        note = "" if fits else " TOO MUCH"
                        print(f"{name}: {shared} bytes shared, {resources(kernel.asm['cubin'])}{note}", flush=True)
    return int(failed)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
