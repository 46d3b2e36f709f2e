"""Closed-form start values of the swapped layers, from the teacher's own attention on a little text.

Two passes over the same text, each with the teacher's softmax deciding what the next layer sees:
1. the decay of each state: its half-life is the mean attention distance of the teacher's heads that share it
   (Taylor-Calibrate, arXiv 2606.16429); the gains of a q/k norm: the mean norm of the teacher's heads is kept;
2. scale of the linear branch and share of the local one: the least-squares fit of the teacher's output by both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .attention import AttentionCall, LightningSwap, observing, swaps
from .decay import slope_of_distance
from .errors import TrainingError
from .recipe import CalibrateStage

SINKS_LEFT_OUT = 4  # first tokens get attention from everywhere and say nothing about distance
SHARE_RANGE = (0.02, 0.98)  # keeps the gradient of the mix alive
SCALE_RANGE = (0.0, 10.0)
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
        batches: token ids `[B, T]`, gone through twice.
        decay: set the slopes from the teacher's mean attention distance.
        norms: set the gains of q/k norms, where there are any, from the teacher's mean norms.
        output: set scale and mix by least squares.

    Raises:
        TrainingError: a fit is not finite.
    """
    batches = list(batches)
    layers = list(swaps(model).values())
    norms = norms and any(swap.q_norm is not None for swap in layers)
    distance = {swap: _Mean() for swap in layers}
    size = {swap: (_Mean(), _Mean()) for swap in layers}
    gram = {swap: _Gram() for swap in layers}

    def measure_inputs(swap: LightningSwap, call: AttentionCall, _: torch.Tensor) -> None:
        if decay:
            distance[swap].add(attention_distance(call))
        for mean, x in zip(size[swap], (call.linear_q, call.linear_k), strict=True):
            mean.add(mean_norm(x))

    def measure_output(swap: LightningSwap, call: AttentionCall, target: torch.Tensor) -> None:
        branches = [swap.linear(call)] + ([swap.local(call)] if swap.mix is not None else [])
        gram[swap].add(branches, target, swap(call))

    if decay or norms:
        _run(model, batches, "queries and keys", measure_inputs)
    for swap in layers:
        if norms:
            _set_gains(swap, size[swap])
        if decay and bool(swap.log_decay.any()):  # without a decay (schedule none) there is none to set
            heads = distance[swap].value().log()
            shared = heads.view(swap.log_slope.numel(), -1).mean(1).exp()  # geometric mean over a group
            swap.log_slope.copy_(slope_of_distance(shared).log())
    if output:
        _run(model, batches, "output", measure_output)
        for swap in layers:
            fit_output_(swap, gram[swap])
    spans = tuple(float(distance[swap].value().mean()) for swap in layers) if decay else ()
    before = tuple(gram[swap].error() for swap in layers) if output else ()
    after = tuple(gram[swap].error(swap) for swap in layers) if output else ()
    return Calibration(sum(b.numel() for b in batches), spans, before, after)


def _set_gains(swap: LightningSwap, means: tuple[_Mean, _Mean]) -> None:
    for norm, mean in zip((swap.q_norm, swap.k_norm), means, strict=True):
        if norm is not None:
            norm.gain.copy_(mean.value())


def _run(model: Any, batches: list[torch.Tensor], title: str, observer: Any) -> None:
    device = next(model.parameters()).device
    with observing(model, observer):
        for ids in tqdm(batches, desc=f"calibrate, {title}", unit="batch", file=sys.stderr):
            model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)


def attention_distance(call: AttentionCall) -> torch.Tensor:
    """Mean distance in tokens that each head's softmax looks back, fp32 `[Hq]`, first tokens left out.

    Source: Taylor-Calibrate, arXiv 2606.16429, section 3. Materialises `[B, Hq, T, T]`.
    """
    batch, length, heads, dim = call.q.shape
    groups = heads // call.k.shape[2]
    q = call.q.float().view(batch, length, -1, groups, dim)
    scores = torch.einsum("btkgd,bskd->bkgts", q, call.k.float()) * call.scaling
    steps = torch.arange(length, device=q.device)
    back = steps[:, None] - steps[None, :]
    p = scores.masked_fill(back < 0, float("-inf")).softmax(-1)
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
    found = calibrate_(model, torch.split(windows, 2), decay=stage.decay, norms=stage.norms, output=stage.output)
    names = [n for n, _ in model.named_parameters() if n.partition(".swap.")[2] in CALIBRATED]
    seconds = time.monotonic() - start
    figures: dict[str, Any] = {"stage": "calibrate", "tokens": found.tokens, "seconds": round(seconds, 2)}
    figures["tokens_per_second"] = round(found.tokens / max(seconds, 1e-9), 1)
    if found.error_before:
        figures["error_before"] = sum(found.error_before) / len(found.error_before)
        figures["error_after"] = sum(found.error_after) / len(found.error_after)
    figures["distance"] = list(found.distance)
    return figures | {"trained": names}
