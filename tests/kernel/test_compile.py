"""Every kernel compiled for GPUs that are not here, in processes of their own in which nothing is interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS_OF_A_DIM = 50
OF_GROUPS = 7  # of 8 heads
WITH_BULK = 6  # of the window in half precision, with bulk copies and without
KERNELS_OF_LOSSES = 2
CALLS = ("plain", "full", "grouped", "step", "window", "lse", "merged", "losses")
OF_HOPPER = {
    "128": 75,
    "128:64": 79,
    "256": 75,
    "256:128": 80,
}  # kernels that the sweep for Hopper is made of and needs


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=SCRIPT.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_for_hopper():
    lines = python(str(SCRIPT), "--arch", "90", "--dtype", "bf16", "--dim", "64", "128", "--call", *CALLS)
    assert len(lines) == 2 * (KERNELS_OF_A_DIM + WITH_BULK) + KERNELS_OF_LOSSES + 1
    assert {line.split()[4] for line in lines[:-1]} == {
        *("forward_kernel", "backward_kernel", "segment_kernel", "scan_kernel", "delta_kernel", "step_kernel"),
        *("row_kernel", "sink_kernel", "cached_kernel", "loss_kernel", "decay_kernel"),
    }


@pytest.mark.slow
def test_the_sweep_for_hopper():
    """Whole warpgroups multiply, asynchronously, and most of what they hold stays in registers."""
    options = "--arch", "90", "--dtype", "bf16", "--dim", "128", "--call", "hopper_sum"
    lines = [line for line in python(str(SCRIPT), *options) if "hopper_kernel" in line]
    assert len(lines) == 4
    assert max(int(line.split("STACK:")[1]) for line in lines) <= 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"), [("128, rows=1", 64), ("128, rows=48", 128), ("64, rows=48, normalize=True", 160)]
)
def test_the_sweep_for_hopper_does_not_spill_where_the_stages_divide_a_group(options, most):
    """A stage that is a constant for each of three heads made 300 to 400 bytes a thread of spilled registers.

    With many rows o and dq, too, are computed by programs of three heads.
    """
    call = (
        "from compile_kernels import compiling, hopper_sweeps, resources\nimport torch\nwith compiling(90) as found:\n"
    )
    call += f"    hopper_sweeps(torch.bfloat16, 128, {options}, group=3)\n"
    call += "print(*(resources(kernel.asm['cubin']) for name, kernel in found.values() if name == 'hopper_kernel'))"
    stacks = [int(x.split(":")[1]) for x in python("-W", "ignore", "-c", call)[0].split() if x.startswith("STACK")]
    assert len(stacks) >= 3
    assert max(stacks) <= most


@pytest.mark.slow
def test_the_window_spills_few_registers():
    """On GPUs before Hopper, too, whose loads take more of them."""
    lines = python(str(SCRIPT), "--arch", "80", "--dtype", "bf16", "--dim", "128", "--call", "window", "merged")
    stacks = [int(line.split("STACK:")[1]) for line in lines[:-1]]
    assert len(stacks) > 10
    assert max(stacks) <= 512


def test_one_head_compiles():
    """Triton makes a constant of an argument that is 1."""
    call = "from compile_kernels import compiling, merged, window\nimport torch\nwith compiling(90) as found:\n"
    call += "    window(torch.bfloat16, 64, 64, heads=(1, 1))\n    merged(torch.bfloat16, 64, 64, heads=(1, 1))\n"
    assert int(python("-W", "ignore", "-c", call + "print(len(found))")[0]) >= 17


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_for_every_gpu(arch):
    lines = python(str(SCRIPT), "--arch", arch)
    twice = 0 if arch == "80" else 2 * 7 * WITH_BULK
    hopper = sum(OF_HOPPER.values()) if arch == "90" else 0
    assert len(lines) == 3 * 7 * (KERNELS_OF_A_DIM + OF_GROUPS) + twice + 3 * KERNELS_OF_LOSSES + hopper + 1


LENGTHS = """
import torch
from compile_kernels import compiling, linear, merged, step, window

def kernels(call, known, new, **options):
    with compiling(90) as found:
        for sizes in known:
            call(torch.bfloat16, 64, 64, **sizes, **options)
        before = set(found)
        for sizes in new:
            call(torch.bfloat16, 64, 64, **sizes, **options)
    print(call.__name__, len(before), *(found[x][0] for x in found.keys() - before))

sizes = (1, 1), (3, 2), (3, 15), (1, 16), (2, 63), (3, 64), (2, 1000)
new = [{"rows": rows, "length": length} for rows, length in sizes]
kernels(linear, [{"length": 40}, {"length": 512}], new)
kernels(linear, [{"length": 40}, {"length": 512}], new, group=2, full=True)
known = [{"rows": rows} for rows in (1, 64, 120, 200, 2100)]  # of a step the number of states counts
kernels(step, known, [{"rows": 3, "length": 2}, {"rows": 100, "length": 16}, {"rows": 300}, {"rows": 3000}])
kernels(window, [{"length": 100}], new)
kernels(window, [{"length": 100}], new, return_lse=True)
kernels(merged, [{"length": 100}], new)
"""


def test_no_new_length_or_batch_compiles_anew():
    """One length below and one above that of a segment, few and many states of a step: all others find their kernel."""
    assert python("-W", "ignore", "-c", LENGTHS) == [
        "linear 7",
        "linear 11",
        "step 8",
        "window 11",
        "window 11",
        "merged 12",
    ]
