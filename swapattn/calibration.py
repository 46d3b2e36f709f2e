"""Closed-form start values of the swapped layers, from the teacher's own attention on a little text.

Measurements on the same text, each with the teacher's softmax deciding what the next layer sees:
1. the decay of each state: its half-life is the mean attention distance of the teacher's heads that share it
   (Taylor-Calibrate, arXiv 2606.16429), or a multiple; the gains of a q/k norm: the mean norm of the heads is kept;
2. where both branches share a denominator, the sum of what the linear one stands for: the least-squares fit of its
   logarithm in the teacher by the query and by the linear branch's own sum;
3. scale of the linear branch, and a constant share of the local one: the least-squares fit of the teacher's output.

Each needs the results of the one before, layer by layer: text that fits into one batch is gone through once, longer
text once for each.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .attention import observing, swaps
from .call import AttentionCall
from .decay import slope_of_distance
from .errors import TrainingError
from .stages import CalibrateStage
from .swap import LightningSwap

SINKS_LEFT_OUT = 4  # first tokens get attention from everywhere and say nothing about distance
SHARE_RANGE = (0.02, 0.98)  # keeps the gradient of the mix alive
SCALE_RANGE = (0.0, 10.0)
BATCH_TOKENS = 4096  # a forward pass: of Llama-7B's shape in fp32, some 600 MB of activations
ROWS = 2  # measured at a time, because the attention distance materialises [rows, Hq, T, T]
CALIBRATED = {"log_slope", "out_scale", "mix", "mix_query", "mix_sum", "q_norm.gain", "k_norm.gain"}
LEAST_WEIGHT = 1e-3  # of a token in the fit of the denominator, where nothing depends on the mix


@dataclass(frozen=True)
class Calibration:
    """What calibration found: relative squared error of the attention output per layer, before anything and after."""

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
    stretch: float = 1.0,
    norms: bool = True,
    output: bool = True,
) -> Calibration:
    """Set decays, gains of q/k norms, output scales and mixes of a model's swapped layers in place.

    Args:
        model: a converted model.
        batches: token ids `[B, T]`; a single one is gone through once, several once for each step.
        decay: set the slopes from the teacher's mean attention distance.
        stretch: half-life of a state over that distance.
        norms: set the gains of q/k norms, where there are any, from the teacher's mean norms.
        output: set scale and mix by least squares.

    Raises:
        TrainingError: a fit is not finite.
    """
    batches = list(batches)
    found = {swap: _Measurement(swap, decay, norms, stretch) for swap in swaps(model).values()}
    layers = list(found.values())
    steps: list[tuple[str, _Step]] = []
    if any(layer.wants_inputs for layer in layers):
        steps.append(("queries and keys", (_Measurement.measure_inputs, _Measurement.set_inputs)))
    if output and any(layer.swap.joint for layer in layers):
        steps.append(("denominator", (_Measurement.measure_sum, _Measurement.set_sum)))
    if output:
        steps.append(("output", (_Measurement.measure_output, _Measurement.set_output)))
    # With one batch each layer takes all steps in its turn, with several all layers take each step in its turn.
    passes = [[step for _, step in steps]] if len(batches) == 1 else [[step] for _, step in steps]
    titles = ["in one pass"] if len(batches) == 1 else [title for title, _ in steps]
    if output:
        passes[0].insert(0, (_Measurement.measure_error, lambda _: None))
    for title, taken in zip(titles, passes, strict=True):
        _run(model, batches, title, found, taken)
    spans = tuple(float(layer.distance.value().mean()) for layer in layers) if decay else ()
    before = tuple(layer.residual / layer.gram.power for layer in layers) if output else ()
    after = tuple(layer.gram.error(layer.swap) for layer in layers) if output else ()
    return Calibration(sum(b.numel() for b in batches), spans, before, after)


class _Measurement:
    """What is measured at one swapped layer, and how its numbers are set by it."""

    def __init__(self, swap: LightningSwap, decay: bool, norms: bool, stretch: float) -> None:
        self.swap = swap
        self.decay = decay
        self.stretch = stretch
        self.norms = [norm for norm in (swap.q_norm, swap.k_norm) if norms and norm is not None]
        self.distance = _Mean()
        self.sizes = (_Mean(), _Mean())
        self.residual = 0.0
        self.sums = _Regression()
        self.gram = _Gram()

    @property
    def wants_inputs(self) -> bool:
        return self.decay or bool(self.norms)

    def measure_error(self, call: AttentionCall, target: torch.Tensor) -> None:
        """Squared error with the numbers that the layer comes with."""
        for part, wanted in _parts(call, target):
            output = self.swap(part)
            self.residual += float((output.double() - wanted.view(output.shape).double()).pow(2).sum())

    def measure_inputs(self, call: AttentionCall, _: torch.Tensor) -> None:
        """Attention distance, and the norms of q and k."""
        for part, _ in _parts(call, call.q):
            tokens = part.q.shape[0] * part.q.shape[1]
            if self.decay:
                self.distance.add(attention_distance(part), tokens)
            for mean, x in zip(self.sizes, (part.linear_q, part.linear_k), strict=True):
                mean.add(mean_norm(x), tokens)

    def set_inputs(self) -> None:
        """Set slopes and gains."""
        for norm, mean in zip(self.norms, self.sizes, strict=False):  # both norms or none
            norm.gain.copy_(mean.value())
        swap = self.swap
        own = swap.log_slope[: swap.log_slope.numel() // swap.linear_branches]  # further half-lives are the recipe's
        if self.decay and bool(own.isfinite().any()):  # without a decay (schedule none) there is none to set
            heads = self.distance.value().log()
            shared = heads.view(own.numel(), -1).mean(1).exp()  # geometric mean over a group
            own.copy_(slope_of_distance(self.stretch * shared).log())

    def measure_sum(self, call: AttentionCall, _: torch.Tensor) -> None:
        """What the linear branch of a joint layer stands for in the teacher's denominator, by query and own sum."""
        swap = self.swap
        if swap.mix_query is None:
            return
        for part, _ in _parts(call, call.q):
            seen = swap.outside(part)
            _, log_sum = swap.linear(part, None, seen)
            _, lse = swap.local(part)
            assert log_sum is not None
            wanted = log_sum_outside(part, swap.window, swap.sinks)
            mass = torch.sigmoid(wanted - lse)
            known = seen.some[..., None] & wanted.isfinite()  # a sliding window of the teacher's may hide it all
            weight = (mass * (1 - mass) + LEAST_WEIGHT) * known
            wanted = wanted if part.lift is None else wanted - part.lift
            features = torch.cat(
                (part.linear_q.float(), torch.ones_like(lse)[..., None], log_sum[..., None].float()), -1
            )
            self.sums.add(features, wanted.masked_fill(~known, 0), weight)

    def set_sum(self) -> None:
        """Set the mix of a joint layer."""
        swap = self.swap
        if swap.mix_query is None or not self.sums.filled:  # text too short to leave the window tells nothing
            return
        fit = self.sums.solve(swap.layer_idx)
        assert swap.mix is not None
        assert swap.mix_sum is not None
        swap.mix_query.copy_(fit[:, :-2])
        swap.mix.copy_(fit[:, -2])
        swap.mix_sum.copy_(fit[:, -1])

    def measure_output(self, call: AttentionCall, target: torch.Tensor) -> None:
        """Both branches against the teacher's output."""
        swap = self.swap
        for part, wanted in _parts(call, target):
            found = swap.parts(part)
            if found.local is not None and found.share is not None and swap.joint:
                window = found.local * found.share
                self.gram.add([found.linear * (1 - found.share)], wanted, window)
            else:
                self.gram.add([x for x in found[:2] if x is not None], wanted)

    def set_output(self) -> None:
        """Set the scale, and a constant mix."""
        fit_output_(self.swap, self.gram)


_Step = tuple[Callable[[_Measurement, AttentionCall, torch.Tensor], None], Callable[[_Measurement], None]]


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


def _run(
    model: Any, batches: list[torch.Tensor], title: str, found: dict[LightningSwap, _Measurement], steps: list[_Step]
) -> None:
    """Measure on all batches, then set; with one batch a layer's steps are carried out one by one."""
    device = next(iter(found)).log_slope.device  # the teacher's own parameters may be on the meta device
    total = len(batches) * len(found)
    with tqdm(desc=f"calibrate, {title}", total=total, unit="layer", file=sys.stderr) as bar:

        def observe(swap: LightningSwap, call: AttentionCall, output: torch.Tensor) -> None:
            for measure, settle in steps:
                measure(found[swap], call, output)
                if len(batches) == 1:
                    settle(found[swap])
            bar.update()

        with observing(model, observe):
            for ids in batches:
                getattr(model, "base_model", model)(input_ids=ids.to(device), use_cache=False)
    if len(batches) > 1:
        for layer in found.values():
            for _, settle in steps:
                settle(layer)


def _scores(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's scores `[B, Hkv, G, T, T]`, with its softcap and within its sliding window, and the distances."""
    batch, length, heads, dim = call.q.shape
    groups = heads // call.k.shape[2]
    q = call.q.float().view(batch, length, -1, groups, dim)
    scores = torch.einsum("btkgd,bskd->bkgts", q, call.k.float()) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    steps = torch.arange(length, device=q.device)
    back = steps[:, None] - steps[None, :]
    return scores.masked_fill((back < 0) | (back >= (call.sliding_window or length)), float("-inf")), back


def log_sum_outside(call: AttentionCall, window: int, sinks: int) -> torch.Tensor:
    """ln of the sum of exp(scores) that the teacher gives to tokens outside of window and sinks, fp32 `[B, T, Hq]`.

    Materialises `[B, Hq, T, T]`.
    """
    scores, back = _scores(call)
    inside = (back < window) | (torch.arange(back.shape[0], device=back.device) < sinks)
    return scores.masked_fill(inside, float("-inf")).logsumexp(-1).flatten(1, 2).transpose(1, 2)


def attention_distance(call: AttentionCall) -> torch.Tensor:
    """Mean distance in tokens that each head's softmax looks back, fp32 `[Hq]`, first tokens left out.

    It is the teacher's softmax, with its softcap, within its sliding window.

    Source: Taylor-Calibrate, arXiv 2606.16429, section 3. Materialises `[B, Hq, T, T]`.
    """
    scores, back = _scores(call)
    p = scores.softmax(-1)
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

    def add(self, value: torch.Tensor, count: int) -> None:
        """The mean `value` of `count` tokens."""
        self.total = self.total + value.cpu() * count
        self.count += count

    def value(self) -> torch.Tensor:
        mean: torch.Tensor = self.total / self.count
        return mean


class _Gram:
    """Inner products per head of the branches and the target, fp64: all that least squares needs."""

    def __init__(self) -> None:
        self.products: Any = 0.0  # [Hq, n + 1, n + 1], the target last
        self.power = 0.0

    def add(self, branches: list[torch.Tensor], target: torch.Tensor, fixed: torch.Tensor | None = None) -> None:
        """Branches, the teacher's output, and a part of the layer's that is not fitted, all `[B, T, Hq, Dv]`."""
        wanted = target.view(branches[0].shape).double()
        left = wanted if fixed is None else wanted - fixed.double()
        stack = torch.stack([*branches, left], dim=-1).double()  # [B, T, H, Dv, n + 1]
        self.products = self.products + torch.einsum("bthdi,bthdj->hij", stack, stack).cpu()
        self.power += float(wanted.pow(2).sum())

    def error(self, swap: LightningSwap) -> float:
        """Squared error over the target's squared norm, of a swap's present scale and mix."""
        weights = torch.cat((_weights(swap), -torch.ones(self.products.shape[0], 1, dtype=torch.float64)), dim=1)
        return float(torch.einsum("hi,hij,hj->", weights, self.products, weights)) / self.power


class _Regression:
    """Weighted least squares per head, fp64."""

    def __init__(self) -> None:
        self.products: Any = 0.0  # [Hq, F, F]
        self.targets: Any = 0.0  # [Hq, F]

    @property
    def filled(self) -> bool:
        """Whether anything had a weight."""
        return bool(torch.as_tensor(self.products).any())

    def add(self, features: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> None:
        """Features `[B, T, Hq, F]`, target and weight `[B, T, Hq]`."""
        features = features.double()
        weighted = features * weight.double()[..., None]
        self.products = self.products + torch.einsum("bthi,bthj->hij", weighted, features).cpu()
        self.targets = self.targets + torch.einsum("bthi,bth->hi", weighted, target.double()).cpu()

    def solve(self, layer: int) -> torch.Tensor:
        """The coefficients `[Hq, F]`."""
        size = self.products.shape[-1]
        ridge = 1e-3 * self.products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(size).double()
        fit: torch.Tensor = torch.linalg.solve(self.products + ridge, self.targets)
        if not torch.isfinite(fit).all():
            raise TrainingError(f"calibration of layer {layer} is not finite: use other text or more tokens")
        return fit


def _weights(swap: LightningSwap) -> torch.Tensor:
    """Weight of each fitted branch per head, `[Hq, n]`, for a scale that is the same in every channel."""
    scale = swap.out_scale.detach().mean(1).double().cpu()
    if swap.mix is None or swap.joint:
        return scale[:, None]
    share = swap.mix.detach().sigmoid().double().cpu()
    return torch.stack(((1 - share) * scale, share), dim=1)


def fit_output_(swap: LightningSwap, gram: _Gram) -> None:
    """Set scale and mix of a layer to the least-squares fit, within the ranges that keep training possible."""
    products = gram.products
    a, b = products[:, :-1, :-1], products[:, :-1, -1]
    ridge = (1e-6 * a.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=torch.finfo(a.dtype).tiny)
    ridge = ridge[:, None, None] * torch.eye(a.shape[1], dtype=a.dtype)
    fit = torch.linalg.solve(a + ridge, b)
    if not torch.isfinite(fit).all():
        raise TrainingError(f"calibration of layer {swap.layer_idx} is not finite: use other text or more tokens")
    if swap.mix is None or swap.joint:
        seen = a.diagonal(dim1=1, dim2=2).amax(1) > 0  # text that never leaves the window tells nothing of the scale
        scale = fit[:, 0].clamp(*SCALE_RANGE).where(seen, swap.out_scale.detach().mean(1).double().cpu())
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
    found = calibrate_(model, batches, decay=stage.decay, stretch=stage.stretch, norms=stage.norms, output=stage.output)
    names = [n for n, _ in model.named_parameters() if n.partition(".swap.")[2] in CALIBRATED]
    seconds = time.monotonic() - start
    figures: dict[str, Any] = {"stage": "calibrate", "tokens": found.tokens, "seconds": round(seconds, 2)}
    figures["tokens_per_second"] = round(found.tokens / max(seconds, 1e-9), 1)
    if found.error_before:
        figures["error_before"] = sum(found.error_before) / len(found.error_before)
        figures["error_after"] = sum(found.error_after) / len(found.error_after)
    figures["distance"] = list(found.distance)
    return figures | {"trained": names}
