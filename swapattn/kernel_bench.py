"""`bench kernel`: the attention kernels alone, beside the memory's speed and the peers that can be imported.

A floor is the time in which the measured copy bandwidth moves the bytes that must move once: q, k, v and o forward;
q, k, v, do, dq, dk, dv backward; the state read and written for a decoding step. Times are medians.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    local_attention,
    merged_local_attention,
)
from torch import Tensor
from torch.nn import functional as F

from .environment import default_device, hardware, say, versions
from .errors import UsageError
from .kernel_lab import AUTHORS, Forward, Lab, Shape, first_line, own_attention

GROUPS = ("forward", "backward", "few", "decay", "both", "gqa", "dims", "varlen", "decode", "memory")
_TOKENS = 65536
_CACHE_BYTES = 256 * 2**20  # inputs taken in turn that hold this much leave nothing of each other in the L2 cache
_LONGEST_SLOW = 8192  # tokens for which peers are timed that take seconds beyond: softmax, and a program a head
_WINDOW, _SINKS = 64, 4


@dataclass(frozen=True)
class Target:
    """What a row must reach: a share of the floor (at least), or a ratio, microseconds or MiB (at most)."""

    value: float
    kind: str = "share"
    fla: float | None = None  # least speed-up over fla's chunk kernel

    def reached(self, figure: float) -> bool:
        """Whether `figure` is good enough."""
        return figure >= self.value if self.kind == "share" else figure <= self.value

    def text(self, figure: float) -> str:
        """`figure` in the unit of the target."""
        units = {"share": f"{figure:.1%}", "ratio": f"{figure:.2f}x", "us": f"{figure:.1f} us"}
        return units.get(self.kind, f"{figure:.0f} MiB")


@dataclass(frozen=True)
class Found:
    """One measurement: milliseconds of ours (None for memory), the figure to hold against the target, peers' times."""

    milliseconds: float | None
    figure: float
    peers: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row to be: its group, name, target and the function that measures it."""

    group: str
    name: str
    target: Target
    run: Callable[[], Found]


@dataclass(frozen=True)
class KernelTable:
    """What `measure_kernels` found."""

    hardware: str
    bandwidth: float
    commit: str | None
    errors: dict[str, float | str]
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "versions": versions()}

    def to_table(self) -> str:
        """The same as text."""
        width = max([len(row["row"]) for row in self.rows] + [3])
        lines = [
            f"{'row':<{width}}{'ms':>10}{'figure':>11}{'target':>11}{'reached':>9}{'fla ms':>9}{'x fla':>14}  peers"
        ]
        for row in self.rows:
            if row["error"]:
                lines.append(f"{row['row']:<{width}}  {row['error']}")
                continue
            speedup, wanted = row["fla_speedup"], row["fla_target"]
            against = "-" if speedup is None else f"{speedup:.2f}" + (f" (>= {wanted:g})" if wanted else "")
            ours, fla = row["milliseconds"], row["peers"].get("fla")
            others = [f"{name} {_milliseconds(ms)}" for name, ms in row["peers"].items() if name != "fla"]
            lines.append(
                f"{row['row']:<{width}}{'-' if ours is None else _milliseconds(ours):>10}{row['figure_text']:>11}"
                f"{row['target_text']:>11}{'yes' if row['reached'] else 'no':>9}"
                f"{_milliseconds(fla) if isinstance(fla, float) else '-':>9}{against:>14}  {', '.join(others)}".rstrip()
            )
        errors = ", ".join(
            f"{name} {e:.1e}" if isinstance(e, float) else f"{name} {e}" for name, e in self.errors.items()
        )
        commit = f", commit {self.commit}" if self.commit else ""
        found = versions()
        return "\n".join(
            [
                *lines,
                "",
                f"largest relative L2 error of o, dq, dk, dv against fp64: {errors}",
                f"{self.hardware}, copy {self.bandwidth / 1e12:.2f} TB/s, torch {found['torch']}, "
                f"triton {found.get('triton', '-')}{commit}",
            ]
        )


def _milliseconds(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def measure_kernels(
    groups: Sequence[str] = GROUPS, *, seconds: float = 120, device: str | None = None, peers: bool = True
) -> KernelTable:
    """Time the kernels of `lightning_attention` and their peers.

    Args:
        groups: of `GROUPS`, which rows.
        seconds: rows not begun by then are reported as not run, as are those behind a Ctrl-C.
        device: "cuda" or "cpu", by default the GPU if there is one; on a CPU the shapes are tiny and in float32, to
            try the rows, and the figures say nothing about the kernels.
        peers: also time other implementations; fla tunes itself anew for every shape, which takes most of the time.

    Raises:
        UsageError: an unknown group, or no such device.
    """
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise UsageError(f"unknown rows {', '.join(unknown)}: choose from {', '.join(GROUPS)}")
    device = device or default_device()
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"no device {device} here: PyTorch sees no GPU; use --device cpu to try the rows")
    lab = Lab(device, peers=peers)
    say(f"checking the kernels {'and the peers ' if peers else ''}against float64")
    errors = lab.check()
    bandwidth = lab.bandwidth
    begun = time.perf_counter()  # the check compiles the kernels of all peers, which may take minutes
    rows, missing = [], ""
    for case in cases(lab):
        if case.group not in groups:
            continue
        if not missing and time.perf_counter() - begun > seconds:
            missing = f"not run: more than {seconds:g} s had passed"
        try:
            rows.append(_row(case, missing))
        except KeyboardInterrupt:
            missing = "not run: interrupted"
            rows.append(_row(case, missing))
        if device != "cpu":
            torch.cuda.empty_cache()
    return KernelTable(hardware(device), bandwidth, _commit(), errors, tuple(rows))


def _row(case: Case, missing: str) -> dict[str, Any]:
    row: dict[str, Any] = {"group": case.group, "row": case.name, "target": case.target.value, "kind": case.target.kind}
    row |= {"target_text": case.target.text(case.target.value), "fla_target": case.target.fla, "error": None}
    row |= {"milliseconds": None, "figure": None, "reached": False, "fla_speedup": None, "peers": {}}
    if missing:
        return row | {"error": missing}
    say(case.name)
    try:
        found = case.run()
    except Exception as error:  # one kernel that fails must not hide the figures of the others
        return row | {"error": first_line(error)}
    fla = found.peers.get("fla")
    row |= {"milliseconds": found.milliseconds, "figure": found.figure, "peers": found.peers}
    row |= {"figure_text": case.target.text(found.figure), "reached": case.target.reached(found.figure)}
    if isinstance(fla, float) and found.milliseconds:
        row["fla_speedup"] = fla / found.milliseconds
    others = "".join(f"; {name} {_milliseconds(ms)}" for name, ms in found.peers.items())
    ours = "" if found.milliseconds is None else f"{_milliseconds(found.milliseconds)} ms, "
    say(f"  {ours}{row['figure_text']}, target {row['target_text']}{others}")
    return row


def _commit() -> str | None:
    """Commit of the checkout that this file lies in, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed.stdout.strip() else "")


def cases(lab: Lab) -> Iterator[Case]:
    """All rows with the targets they must reach."""
    for length in (1024, 4096, 8192, 32768):
        shape, name = lab.shape(_TOKENS // length, length), f"{_TOKENS // length} x {length // 1024}K"
        yield _timed(lab, "forward", f"forward {name}", shape, Target(0.9, fla=2.3))
        yield _timed(lab, "backward", f"forward + backward {name}", shape, Target(0.7, fla=3.0), backward=True)
    for length, heads, least in ((65536, 32, 0.7), (131072, 32, 0.7), (32768, 8, 0.7)):
        shape, name = lab.shape(1, length, heads), f"1 x {length // 1024}K, H={heads}"
        yield _timed(lab, "few", f"forward {name}", shape, Target(least), graph=True)
        yield _timed(lab, "few", f"forward + backward {name}", shape, Target(0.5), backward=True, graph=True)
    yield Case("few", "forward 1 x 2K, H=32, cold", Target(36, "us"), lambda: _cold(lab))
    for backward, most in ((False, 1.15), (True, 1.3)):
        yield Case(
            "decay", f"{_kind(backward)} decay per token to fixed", Target(most, "ratio"), _decays(lab, backward)
        )
    for backward, most in ((False, 1.8), (True, 2.2)):
        yield Case("both", f"{_kind(backward)} both branches to linear", Target(most, "ratio"), _both(lab, backward))
    for backward in (False, True):
        shape = lab.shape(8, 8192, 32, 8)
        yield _timed(lab, "gqa", f"{_kind(backward)} 8 x 8K, 32/8 heads", shape, Target(0.75), backward=backward)
    for heads, dim, least in ((32, 64, 0.75), (16, 256, 0.6)):
        yield _timed(
            lab, "dims", f"forward 8 x 8K, H={heads}, D={dim}", lab.shape(8, 8192, heads, dim=dim), Target(least)
        )
    for backward in (False, True):
        yield Case("varlen", f"{_kind(backward)} 64 lengths to equal", Target(1.15, "ratio"), _lengths(lab, backward))
    for rows, target in ((1, Target(5, "us")), (16, Target(0.85)), (64, Target(0.92)), (256, Target(0.95))):
        yield Case("decode", f"decode B={rows}, 32 states", target, _decode(lab, rows, 32))
    for rows, least in ((16, 0.8), (64, 0.88), (256, 0.92)):
        yield Case("decode", f"decode B={rows}, 8 shared states", Target(least), _decode(lab, rows, 8))
    yield Case("memory", "extra memory of forward + backward", Target(128, "MiB"), lambda: _memory(lab))


def _kind(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _work(lab: Lab, attend: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    """A call of `attend` on the tensors, with the gradients of those that want one."""
    if not backward:
        return torch.no_grad()(lambda: attend(*tensors))
    wanted = [x for x in tensors if x.requires_grad]
    with torch.no_grad():
        gradient = lab.random(*attend(*tensors).shape)
    return lambda: torch.autograd.grad(attend(*tensors), wanted, gradient)


def _timed(
    lab: Lab, group: str, name: str, shape: Shape, target: Target, *, backward: bool = False, graph: bool = False
) -> Case:
    """A row of linear attention with a fixed decay: its share of the floor, with the peers."""

    def run() -> Found:
        tensors = (*lab.inputs(shape, grad=backward), lab.decay(shape.shared))
        clock = lab.time_graph if graph else lab.time

        def measure(attend: Forward) -> float:
            return clock(_work(lab, attend, tensors, backward))

        ours = measure(own_attention)
        # fla's chunk form has as many key/value heads as query heads.
        peers = dict(lab.linear) if shape.heads == shape.shared else {}
        if shape.length > _LONGEST_SLOW:
            peers.pop(AUTHORS, None)
        elif group in ("forward", "backward", "gqa"):
            peers |= lab.softmax
        floor = lab.floor(shape.bytes(lab.size, backward=backward))
        return Found(ours, floor / ours, lab.against(peers, measure))

    return Case(group, name, target, run)


def _cold(lab: Lab) -> Found:
    shape = lab.shape(1, 2048)
    held = shape.bytes(lab.size, backward=False)
    turns = 2 if lab.small else 1 + _CACHE_BYTES // held
    sets = [lab.inputs(shape) for _ in range(turns)]
    decay = lab.decay(shape.heads)

    def measure(attend: Forward) -> float:
        turn = itertools.cycle(sets)
        return lab.time_graph(torch.no_grad()(lambda: attend(*next(turn), decay)))

    ours = measure(own_attention)
    return Found(ours, 1000 * ours, lab.against({**lab.linear, **lab.softmax}, measure))


def _decays(lab: Lab, backward: bool) -> Callable[[], Found]:
    def run() -> Found:
        shape = lab.shape(8, 8192)
        tensors = lab.inputs(shape, grad=backward)
        fixed = lab.decay(shape.heads)
        step = torch.rand(shape.rows, shape.length, shape.heads, device=lab.device, generator=lab.generator)
        moving = (fixed * 2 * step).requires_grad_(backward)  # its gradient is a part of the work
        times = [lab.time(_work(lab, own_attention, (*tensors, decay), backward)) for decay in (fixed, moving)]
        return Found(times[1], times[1] / times[0], {"fixed": times[0]})

    return run


def _both(lab: Lab, backward: bool) -> Callable[[], Found]:
    def run() -> Found:
        shape = lab.shape(8, 8192)
        tensors = lab.inputs(shape, grad=backward)
        decay = lab.decay(shape.heads)
        # As in a joint layer; its parameters are float32 and get gradients.
        log_sum = torch.randn(shape.rows, shape.length, shape.heads, device=lab.device, generator=lab.generator)
        scale = torch.ones(shape.heads, shape.dim, device=lab.device)
        work = (*tensors, *(x.requires_grad_(backward) for x in (log_sum, scale)))
        mix = _mix if lab.small else torch.compile(_mix, dynamic=False)
        sizes: dict[str, Any] = {"window": _WINDOW, "sinks": _SINKS}

        def merged(q: Tensor, k: Tensor, v: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
            return merged_local_attention(q, k, v, own_attention(q, k, v, decay), log_sum, scale, **sizes)

        def separate(q: Tensor, k: Tensor, v: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
            window, lse = local_attention(q, k, v, return_lse=True, **sizes)
            return mix(own_attention(q, k, v, decay), window, lse - log_sum, scale)

        alone, together, apart = (
            lab.time(_work(lab, attend, operands, backward))
            for attend, operands in ((own_attention, (*tensors, decay)), (merged, work), (separate, work))
        )
        return Found(together, together / alone, {"linear alone": alone, "separate": apart})

    return run


def _mix(linear: Tensor, local: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    share = torch.sigmoid(share)[..., None]
    return (linear * ((1 - share) * scale) + local * share).to(linear.dtype)


def _lengths(lab: Lab, backward: bool) -> Callable[[], Found]:
    def run() -> Found:
        count, low, high = (4, 2, 9) if lab.small else (64, 100, 4001)
        chosen = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(0))
        chosen[chosen.argmax()] -= chosen.sum() % count
        total = int(chosen.sum())
        whole = lab.shape(1, 1)
        shape = Shape(1, total, whole.heads, whole.shared, whole.dim)
        tensors, decay = lab.inputs(shape, grad=backward), lab.decay(shape.heads)

        def measure(lengths: Tensor) -> float:
            bounds = F.pad(lengths.cumsum(0), (1, 0)).to(lab.device, torch.int32)

            def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                o: Tensor = lightning_attention(q, k, v, decay, cu_seqlens=bounds)[0]
                return o

            return lab.time(_work(lab, packed, tensors, backward))

        ours = measure(chosen)
        rows = [x.detach().view(count, -1, *x.shape[2:]).requires_grad_(backward) for x in tensors]
        equal: dict[str, float | str] = {
            "equal packed": measure(torch.full((count,), total // count)),
            "equal rows": lab.time(_work(lab, own_attention, (*rows, decay), backward)),
        }
        return Found(ours, ours / min(ms for ms in equal.values() if isinstance(ms, float)), equal)

    return run


def _decode(lab: Lab, rows: int, shared: int) -> Callable[[], Found]:
    def run() -> Found:
        shape = lab.shape(rows, 1024, 32, shared)
        shape = Shape(shape.rows, 1, shape.heads, shape.shared, shape.dim)
        q, k, v = lab.inputs(shape)
        decay = lab.decay(shape.shared)
        size = 4 * shape.rows * shape.shared * shape.dim**2
        turns = 2 if lab.small else 1 + _CACHE_BYTES // size  # the layers of a model: each step finds another state
        states = torch.zeros(turns, shape.rows, shape.shared, shape.dim, shape.dim, device=lab.device)

        def measure(step: Callable[[Tensor], object]) -> float:
            turn = itertools.cycle(states)
            return lab.time_graph(torch.no_grad()(lambda: step(next(turn))))

        ours = measure(lambda state: lightning_attention_step(q, k, v, decay, state))
        peers: dict[str, Callable[[Tensor], object]] = {}
        recurrent = lab.recurrent
        if recurrent is not None and shape.heads == shape.shared:
            peers["fla"] = lambda state: recurrent(q, k, v, g_gamma=decay, initial_state=state, output_final_state=True)
        peers["softmax over 512"] = _cached_softmax(lab, shape)
        peers["state scaled in place"] = lambda state: state.mul_(0.5)  # the same traffic and nothing else
        figure = 1000 * ours if rows == 1 else lab.floor(2 * size) / ours
        return Found(ours, figure, lab.against(peers, measure))

    return run


def _cached_softmax(lab: Lab, shape: Shape) -> Callable[[Tensor], object]:
    """A decoding step of grouped-query softmax over a cache of 512 tokens with a quarter of the heads."""
    tokens, heads = (8, 1) if lab.small else (512, shape.heads // 4)
    held = 2 * shape.rows * heads * tokens * shape.dim * lab.size
    turns = 2 if lab.small else 1 + _CACHE_BYTES // held
    caches = itertools.cycle(lab.random(turns, 2, shape.rows, heads, tokens, shape.dim))
    query = lab.random(shape.rows, shape.heads, 1, shape.dim)

    def step(_: Tensor) -> Tensor:
        keys, values = next(caches)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


def _memory(lab: Lab) -> Found:
    if lab.small:
        raise UsageError("peak memory is measured on a GPU only")
    shape = lab.shape(8, 8192)
    tensors = (*lab.inputs(shape, grad=True), lab.decay(shape.heads))

    def extra(attend: Forward) -> float:
        work = _work(lab, attend, tensors, True)
        work()  # compiled, autotuned
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        kept = 4 * tensors[0].numel() * lab.size  # output and gradients
        return (torch.cuda.max_memory_allocated() - before - kept) / 2**20

    ours = extra(own_attention)
    others = lab.against({**lab.linear, **lab.softmax}, extra)
    return Found(None, ours, {n: f"{m:.0f} MiB" if isinstance(m, float) else m for n, m in others.items()})
