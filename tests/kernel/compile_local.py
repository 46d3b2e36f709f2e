"""Compile the kernels of `local_attention` for GPUs that are not here: shared memory, registers and stack of each.

    python tests/kernel/compile_local.py [--arch 90 ...] [--dtype bf16 ...] [--dim 64 128:64 ...]

Exit code 1 if a kernel needs more shared memory than a block can have, or multiplies without tensor cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from lightning_attention import local_kernels, local_op
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("forward", "backward", "sink", "cached")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(kind: str, dtype: str, dim: int, value_dim: int, arch: int, hidden: bool) -> tuple[Any, Any]:
    """The compiled kernel and its launch parameters; pointers and strides count as divisible by 16."""
    kernel = getattr(local_kernels, f"{kind}_kernel")
    types = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("begin", "owner", "starts", "place"), "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("lse", "near", "far"), "*fp32") | dict.fromkeys(("q_position", "k_position"), "*i64")
    q, v = (torch.empty(1, 1, 1, size, dtype=DTYPES[dtype]) for size in (dim, value_dim))
    config = local_op.local_config("forward" if kind == "forward" else "backward", dim, value_dim, q.dtype)
    if kind == "cached":
        config = local_op.cached_config(4, dim, value_dim, q.dtype)
    table = q if hidden else None
    values = local_op._constants(q, v, config, table, table, 4) | {"PARTS": 16, "COLUMNS": 128}
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name.startswith("stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), config


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_MEMORY)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--dim", nargs="+", default=["64", "80", "96", "128", "192:128", "256"], help="D or D:Dv")
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    failed = 0
    for arch in options.arch:
        for dtype in options.dtype:
            for size in options.dim:
                dim, value_dim = (int(x) for x in (size.split(":") * 2)[:2])
                for kind in options.kind:
                    for hidden in (False, True)[: 1 if kind == "cached" else 2]:
                        built, config = build(kind, dtype, dim, value_dim, arch, hidden)
                        shared = built.metadata.shared
                        tensor_cores = kind == "sink" or dtype == "fp32" or "mma" in built.asm["ptx"]
                        good = shared <= SHARED_MEMORY[arch] and tensor_cores
                        failed += not good
                        name = f"sm_{arch} {dtype} {dim}:{value_dim} {kind}{' hidden' if hidden else ''}"
                        use = f"shared {shared / 1024:.0f} KiB {resources(built.asm['cubin'])}"
                        print(f"{name} {tuple(config[:4])} {use}{'' if good else ' FAILED'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
