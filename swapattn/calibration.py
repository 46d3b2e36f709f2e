"""Closed-form start values of the swapped layers, from the teacher's own attention on a little text.

Two measurements on the same text, each with the teacher's softmax deciding what the next layer sees:
1. the decay of each state: its half-life is the mean attention distance of the teacher's heads that share it
   (Taylor-Calibrate, arXiv 2606.16429); the gains of a q/k norm: the mean norm of the teacher's heads is kept;
2. scale of the linear branch and share of the local one: the least-squares fit of the teacher's output by both.

The second needs the results of the first, layer by layer: text that fits into one batch is gone through once, longer
text twice.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .attention import LightningSwap, Observer, observing, swaps
from .call import AttentionCall
from .decay import slope_of_distance
from .errors import TrainingError
from .stages import CalibrateStage

SINKS_LEFT_OUT = 4  # first tokens get attention from everywhere and say nothing about distance
SHARE_RANGE = (0.02, 0.98)  # keeps the gradient of the mix alive
SCALE_RANGE = (0.0, 10.0)
BATCH_TOKENS = 4096  # a forward pass: of Llama-7B's shape in fp32, some 600 MB of activations
ROWS = 2  # measured at a time, because the attention distance materialises [rows, Hq, T, T]
CALIBRATED = {"log_slope", "out_scale", "mix", "q_norm.gain", "k_norm.gain"}


@dataclass(frozen=True)
class Calibration:
    """What calibration found: relative squared error of the attention output per layer, before and after."""

    tokens: int
    distance: tuple[float, ...]
    error_before: tuple[float, ...]
    error_after: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record."""
        return {name: getattr(self, name) for name in ("tokens", "distance", "error_before", "error_after")}


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    *,
    decay: bool = True,
    norms: bool = True,
    output: bool = True,
) -> Calibration:
    """Set decays, gains of q/k norms, output scales and mixes of a model's swapped layers in place.

    Args:
        model: a converted model.
        batches: token ids `[B, T]`; a single one is gone through once, several twice.
        decay: set the slopes from the teacher's mean attention distance.
        norms: set the gains of q/k norms, where there are any, from the teacher's mean norms.
        output: set scale and mix by least squares.

    Raises:
        TrainingError: a fit is not finite.
    """
    batches = list(batches)
    found = {swap: _Measurement(swap, decay, norms) for swap in swaps(model).values()}
    steps: list[tuple[str, Observer]] = []
    if any(layer.wants_inputs for layer in found.values()):
        steps.append(("queries and keys", lambda swap, call, _: found[swap].measure_inputs(call)))
    if output:
        steps.append(("output", lambda swap, call, target: found[swap].measure_output(call, target)))
    if len(steps) == 2 and len(batches) == 1:

        def both(swap: LightningSwap, call: AttentionCall, target: torch.Tensor) -> None:
            found[swap].measure_inputs(call)
            found[swap].set_inputs()
            found[swap].measure_output(call, target)

        steps = [("in one pass", both)]
    for title, observer in steps:
        _run(model, batches, title, observer)
        if title == "queries and keys":
            for layer in found.values():
                layer.set_inputs()
    if output:
        for swap, layer in found.items():
            fit_output_(swap, layer.gram)
    layers = list(found.values())
    spans = tuple(float(layer.distance.value().mean()) for layer in layers) if decay else ()
    before = tuple(layer.gram.error() for layer in layers) if output else ()
    after = tuple(layer.gram.error(layer.swap) for layer in layers) if output else ()
    return Calibration(sum(b.numel() for b in batches), spans, before, after)


class _Measurement:
    """What is measured at one swapped layer, and how its numbers are set by it."""

    def __init__(self, swap: LightningSwap, decay: bool, norms: bool) -> None:
        self.swap = swap
        self.decay = decay
        self.norms = [norm for norm in (swap.q_norm, swap.k_norm) if norms and norm is not None]
        self.distance = _Mean()
        self.sizes = (_Mean(), _Mean())
        self.gram = _Gram()

    @property
    def wants_inputs(self) -> bool:
        return self.decay or bool(self.norms)

    def measure_inputs(self, call: AttentionCall) -> None:
        """Attention distance, and the norms of q and k."""
        for part, _ in _parts(call, call.q):
            if self.decay:
                self.distance.add(attention_distance(part))
            for mean, x in zip(self.sizes, (part.linear_q, part.linear_k), strict=True):
                mean.add(mean_norm(x))

    def set_inputs(self) -> None:
        """Set slopes and gains."""
        for norm, mean in zip(self.norms, self.sizes, strict=False):  # both norms or none
            norm.gain.copy_(mean.value())
        swap = self.swap
        if self.decay and bool(swap.log_decay.any()):  # without a decay (schedule none) there is none to set
            heads = self.distance.value().log()
            shared = heads.view(swap.log_slope.numel(), -1).mean(1).exp()  # geometric mean over a group
            swap.log_slope.copy_(slope_of_distance(shared).log())

    def measure_output(self, call: AttentionCall, target: torch.Tensor) -> None:
        """Both branches against the teacher's output."""
        swap = self.swap
        for part, wanted in _parts(call, target):
            branches = [swap.linear(part)] + ([swap.local(part)] if swap.mix is not None else [])
            self.gram.add(branches, wanted, swap(part))


def _parts(call: AttentionCall, target: torch.Tensor) -> Iterator[tuple[AttentionCall, torch.Tensor]]:
    """A call and its output, a few rows at a time."""
    if call.cu_seqlens is not None or call.q.shape[0] <= ROWS:
        yield call, target
        return
    for start in range(0, call.q.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        part = copy.copy(call)
        for name, value in vars(call).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value[rows])
        yield part, target[rows]


def _run(model: Any, batches: list[torch.Tensor], title: str, observer: Observer) -> None:
    layers = swaps(model).values()
    device = next(iter(layers)).log_slope.device  # the teacher's own parameters may be on the meta device
    total = len(batches) * len(layers)
    with tqdm(desc=f"calibrate, {title}", total=total, unit="layer", file=sys.stderr) as bar:

        def observe(swap: LightningSwap, call: AttentionCall, output: torch.Tensor) -> None:
            observer(swap, call, output)
            bar.update()

        with observing(model, observe):
            for ids in batches:
                getattr(model, "base_model", model)(input_ids=ids.to(device), use_cache=False)


def attention_distance(call: AttentionCall) -> torch.Tensor:
    """Mean distance in tokens that each head's softmax looks back, fp32 `[Hq]`, first tokens left out.

    It is the teacher's softmax, with its softcap, within its sliding window.

    Source: Taylor-Calibrate, arXiv 2606.16429, section 3. Materialises `[B, Hq, T, T]`.
    """
    batch, length, heads, dim = call.q.shape
    groups = heads // call.k.shape[2]
    q = call.q.float().view(batch, length, -1, groups, dim)
    scores = torch.einsum("btkgd,bskd->bkgts", q, call.k.float()) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    steps = torch.arange(length, device=q.device)
    back = steps[:, None] - steps[None, :]
    hidden = (back < 0) | (back >= (call.sliding_window or length))
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    p = p[..., SINKS_LEFT_OUT:]
    back = back[:, SINKS_LEFT_OUT:].clamp(min=0).float()
    mass = p.sum(dim=(0, 3, 4))
    return ((p * back).sum(dim=(0, 3, 4)) / mass.clamp(min=1e-9)).flatten().clamp(min=1.0)


def mean_norm(x: torch.Tensor) -> torch.Tensor:
    """Mean Euclidean norm of each head of `[B, T, H, D]` in units of √D, fp32 `[H]`: the gain that keeps it."""
    mean: torch.Tensor = x.float().norm(dim=-1).mean((0, 1)) / x.shape[-1] ** 0.5
    return mean


class _Mean:
    def __init__(self) -> None:
        self.total: Any = 0.0
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        self.total = self.total + value.cpu()
        self.count += 1

    def value(self) -> torch.Tensor:
        mean: torch.Tensor = self.total / self.count
        return mean


class _Gram:
    """Inner products per head of the branches and the target, fp64: all that least squares needs."""

    def __init__(self) -> None:
        self.products: Any = 0.0  # [Hq, n + 1, n + 1], the target last
        self.residual = 0.0

    def add(self, branches: list[torch.Tensor], target: torch.Tensor, output: torch.Tensor) -> None:
        target = target.view(output.shape)
        stack = torch.stack([*branches, target], dim=-1).double()  # [B, T, H, Dv, n + 1]
        self.products = self.products + torch.einsum("bthdi,bthdj->hij", stack, stack).cpu()
        self.residual += float((output.double() - target.double()).pow(2).sum())

    def error(self, swap: LightningSwap | None = None) -> float:
        """Squared error over the target's squared norm: as measured, or of a swap's present scale and mix."""
        power = float(self.products[:, -1, -1].sum())
        if swap is None:
            return self.residual / power
        weights = torch.cat((_weights(swap), -torch.ones(self.products.shape[0], 1, dtype=torch.float64)), dim=1)
        return float(torch.einsum("hi,hij,hj->", weights, self.products, weights)) / power


def _weights(swap: LightningSwap) -> torch.Tensor:
    """Weight of each branch per head, `[Hq, n]`, for a scale that is the same in every channel."""
    scale = swap.out_scale.detach().mean(1).double().cpu()
    if swap.mix is None:
        return scale[:, None]
    share = swap.mix.detach().sigmoid().double().cpu()
    return torch.stack(((1 - share) * scale, share), dim=1)


def fit_output_(swap: LightningSwap, gram: _Gram) -> None:
    """Set scale and mix of a layer to the least-squares fit, within the ranges that keep training possible."""
    products = gram.products
    a, b = products[:, :-1, :-1], products[:, :-1, -1]
    ridge = 1e-6 * a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(a.shape[1], dtype=a.dtype)
    fit = torch.linalg.solve(a + ridge, b)
    if not torch.isfinite(fit).all():
        raise TrainingError(f"calibration of layer {swap.layer_idx} is not finite: use other text or more tokens")
    if swap.mix is None:
        scale = fit[:, 0].clamp(*SCALE_RANGE)
    else:
        linear, share = _within_ranges(a + ridge, b, fit).unbind(1)
        scale = linear / (1 - share)
        swap.mix.copy_(torch.logit(share).to(swap.mix))
    swap.out_scale.copy_(scale[:, None].expand_as(swap.out_scale).to(swap.out_scale))


def _within_ranges(a: torch.Tensor, b: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Best weights `[Hq, 2]` of both branches within the ranges: the free fit, or the best point of their border."""
    (low, high), top = SHARE_RANGE, SCALE_RANGE[1]
    inside = (fit[:, 1] >= low) & (fit[:, 1] <= high) & (fit[:, 0] >= 0) & (fit[:, 0] <= top * (1 - fit[:, 1]))
    corners = a.new_tensor([[0, low], [0, high], [top * (1 - high), high], [top * (1 - low), low]])
    points = [fit]
    for start, end in zip(corners, corners.roll(-1, 0), strict=True):
        way = end - start
        step = ((b - a @ start) @ way / (a @ way @ way)).clamp(0, 1)
        points.append(start + step[:, None] * way)
    found = torch.stack(points, 1)
    error = torch.einsum("hci,hij,hcj->hc", found, a, found) - 2 * torch.einsum("hci,hi->hc", found, b)
    error[:, 0].masked_fill_(~inside, torch.inf)
    return found[torch.arange(found.shape[0]), error.argmin(1)]


def calibrate_stage(model: Any, stage: CalibrateStage, data: Iterable[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Run the closed-form stage on the first `stage.tokens` tokens; returns its figures and what it set."""
    start = time.monotonic()
    count = max(1, stage.tokens // stage.length)
    windows = torch.stack([item["input_ids"] for item in islice(data, count)])
    batches = torch.split(windows, max(1, BATCH_TOKENS // stage.length))
    found = calibrate_(model, batches, decay=stage.decay, norms=stage.norms, output=stage.output)
    names = [n for n, _ in model.named_parameters() if n.partition(".swap.")[2] in CALIBRATED]
    seconds = time.monotonic() - start
    figures: dict[str, Any] = {"stage": "calibrate", "tokens": found.tokens, "seconds": round(seconds, 2)}
    figures["tokens_per_second"] = round(found.tokens / max(seconds, 1e-9), 1)
    if found.error_before:
        figures["error_before"] = sum(found.error_before) / len(found.error_before)
        figures["error_after"] = sum(found.error_after) / len(found.error_after)
    figures["distance"] = list(found.distance)
    return figures | {"trained": names}
