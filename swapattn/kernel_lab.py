"""What `bench kernel` measures with: device, inputs, clock, copy bandwidth, peers and the check of their results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning_attention import lightning_attention, lightning_attention_step
from lightning_attention.reference import recurrent_attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .environment import say

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Peer = TypeVar("Peer")
AUTHORS = "authors"  # of Lightning Attention-2
_WORST_ERROR = 2e-2  # relative L2, of output and gradients, of an implementation that is right in bf16


@dataclass(frozen=True)
class Shape:
    """A problem: B rows of T tokens, Hq query and Hkv key/value heads of D features."""

    rows: int
    length: int
    heads: int = 32
    shared: int = 32
    dim: int = 128

    def bytes(self, size: int, *, backward: bool) -> int:
        """What must move once, with `size` bytes an element."""
        wide, narrow = (self.rows * self.length * heads * self.dim * size for heads in (self.heads, self.shared))
        forward = 2 * wide + 2 * narrow
        return forward + 3 * wide + 4 * narrow if backward else forward


class Lab:
    """The device with its inputs, clock, copy bandwidth and peers."""

    def __init__(self, device: str, *, peers: bool = True) -> None:
        self.device = torch.device(device)
        self.small = self.device.type == "cpu"
        self.dtype = torch.float32 if self.small else torch.bfloat16
        self.size = self.dtype.itemsize
        self.linear, self.softmax, self.recurrent = _peers(self.device) if peers else ({}, {}, None)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.bandwidth = self._copy_bandwidth()

    def shape(self, rows: int, length: int, heads: int = 32, shared: int | None = None, dim: int = 128) -> Shape:
        """The shape, on a CPU a tiny one of the same proportions."""
        shared = shared or heads
        if self.small:
            rows, length, heads, shared, dim = min(rows, 2), max(2, length // 1024), heads // 8, shared // 8, dim // 16
        return Shape(rows, length, heads, shared, dim)

    def inputs(self, shape: Shape, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v."""
        return tuple(  # type: ignore[return-value]
            self.random(shape.rows, shape.length, heads, shape.dim).requires_grad_(grad)
            for heads in (shape.heads, shape.shared, shape.shared)
        )

    def random(self, *size: int) -> Tensor:
        """Standard normal numbers in the dtype of the run."""
        return torch.randn(*size, device=self.device, dtype=self.dtype, generator=self.generator)

    def decay(self, heads: int) -> Tensor:
        """Log decays `[heads]`, the slopes of ALiBi, as the paper has them."""
        return -torch.exp2(-8 * torch.arange(1, heads + 1, device=self.device) / heads)

    def time(self, work: Callable[[], object]) -> float:
        """Median milliseconds of a call, the L2 cache cleared before each."""
        if self.small:
            return _clocked(work)
        from triton.testing import do_bench

        return float(do_bench(work, warmup=5, rep=40, return_mode="median"))

    def time_graph(self, work: Callable[[], object]) -> float:
        """Median milliseconds of a call within a CUDA graph: no launch cost; `work` must see to a cold cache itself."""
        if self.small:
            return _clocked(work)
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(work, rep=10, return_mode="median"))

    def floor(self, moved: int) -> float:
        """Milliseconds in which a copy moves `moved` bytes, read and written ones together."""
        return 1000 * moved / self.bandwidth

    def _copy_bandwidth(self) -> float:
        count = 2**16 if self.small else 2**30
        source = torch.zeros(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * count / (self.time(lambda: target.copy_(source)) / 1000)

    def against(self, peers: Mapping[str, Peer], measure: Callable[[Peer], float]) -> dict[str, float | str]:
        """The figure of every peer, or why there is none."""
        found: dict[str, float | str] = {}
        for name, peer in peers.items():
            say(f"  {name}")  # one that tunes itself may take minutes
            try:
                found[name] = measure(peer)
            except Exception as error:  # a peer that fails is a finding, not our failure
                found[name] = first_line(error)
        return found

    def check(self) -> dict[str, float | str]:
        """Largest relative L2 error of output and gradients against fp64; a wrong peer is left out from here on."""
        shape = Shape(2, 24 if self.small else 300, 4, 4, 8 if self.small else 64)
        q, k, v = self.inputs(shape, grad=True)
        decay, gradient = self.decay(shape.heads), self.random(shape.rows, shape.length, shape.heads, shape.dim)

        def results(attend: Forward, double: bool = False) -> list[Tensor]:
            tensors = [x.double() if double else x for x in (q, k, v, decay)]
            out = attend(*tensors)
            return [out, *torch.autograd.grad(out, tensors[:3], gradient.to(out.dtype))]

        def error(attend: Forward, exact: list[Tensor]) -> float:
            errors = [_error(x, y) for x, y in zip(results(attend), exact, strict=True)]
            return float(torch.tensor(errors).max())  # unlike the built-in max, NaN wins

        exact = results(lambda q, k, v, decay: recurrent_attention(q, k, v, decay)[0], True)
        softmax = results(_backend(SDPBackend.MATH), True)
        errors = self.against({"swapattn": own_attention, **self.linear}, lambda attend: error(attend, exact))
        errors |= self.against(self.softmax, lambda attend: error(attend, softmax))
        for peers in (self.linear, self.softmax):
            for name in [name for name in peers if not _right(errors[name])]:
                del peers[name]
        return errors | self.against({"swapattn step": self._check_step}, lambda check: check())

    def _check_step(self) -> float:
        shape = Shape(2, 1, 4, 4, 8 if self.small else 64)
        q, k, v = self.inputs(shape)
        decay = self.decay(shape.heads)
        state = torch.randn(2, 4, shape.dim, shape.dim, device=self.device, generator=self.generator)
        wide = q.double(), k.double(), v.double()
        exact = recurrent_attention(*wide, decay.double(), initial_state=state.double())[0]
        return _error(lightning_attention_step(q, k, v, decay, state), exact)


def _clocked(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def _right(error: float | str) -> bool:
    return isinstance(error, float) and error < _WORST_ERROR


def own_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The output of `lightning_attention`, called as the peers are."""
    o: Tensor = lightning_attention(q, k, v, decay)[0]
    return o


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _backend(backend: SDPBackend) -> Forward:
    def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _softmax(q, k, v)

    return attention


def _peers(device: torch.device) -> tuple[dict[str, Forward], dict[str, Forward], Callable[..., Any] | None]:
    """Linear attention of others, softmax attention, and fla's decoding step."""
    if device.type == "cpu":
        return {}, {"math": _backend(SDPBackend.MATH)}, None
    softmax = {"FA2": _backend(SDPBackend.FLASH_ATTENTION), "cuDNN": _backend(SDPBackend.CUDNN_ATTENTION)}
    linear: dict[str, Forward] = {}
    recurrent = None
    try:  # an import may fail in any way on a foreign stack; the rows go on without it
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla

        linear["fla"] = lambda q, k, v, decay: chunk_simple_gla(q, k, v, g_gamma=decay)[0]
        linear["fla fused"] = lambda q, k, v, decay: fused_chunk_simple_gla(q, k, v, g_gamma=decay)[0]
        recurrent = fused_recurrent_simple_gla
    except Exception as error:
        say(f"no fla beside ours: {first_line(error)}")
    try:
        from lightning_attn.ops import lightning_attn_func

        linear[AUTHORS] = lambda *tensors: _heads_first(lightning_attn_func, *tensors)
    except Exception as error:
        say(f"no kernels of the authors of Lightning Attention-2 beside ours: {first_line(error)}")
    return linear, softmax, recurrent


def _heads_first(attend: Forward, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The authors' function, which takes `[B, H, T, D]` (it copies what lies otherwise), slopes, and no scale."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o: Tensor = attend(q, k, v, -decay).transpose(1, 2) * q.shape[-1] ** -0.5
    return o


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
