"""`select`: which layers to keep softmax, by what swapping (or restoring) each one costs on a little text.

The cost is the KL from the teacher's next-token distribution, as in KL-guided layer selection (arXiv 2512.20569,
which restores each layer and trains in between; here nothing is trained). On the text of the recipe it says which
layers a short context needs; on documents that ask for something far back, where only the answers count, which ones
look it up (HALO, arXiv 2601.22156, chooses by recall, too).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import sources
from .attention import observing, swaps
from .calibration import calibrate_stage
from .checkpoint import RECORD, check_folder, read
from .conversion import of_convert
from .data import PackedTokens, heldout_windows
from .environment import default_device, say
from .errors import CheckpointError, UsageError
from .loading import load, load_teacher
from .losses import Mixture, divergence
from .perplexity import heldout_perplexity
from .recall import passkey_documents, recall_documents
from .recipe import KeepSpec, Recipe, load_recipe, restated
from .score_store import fingerprint
from .surgery import apply_, plan

SCORES, CHART, FRAGMENT = "scores.jsonl", "ranking.png", "keep.yaml"
_ALL = -1  # stands for no layer: nothing swapped alone, nothing restored
HELDOUT = (12, 512)  # windows and their length, for `compare`


@dataclass(frozen=True)
class Selection:
    """Layers by their cost.

    Attributes:
        folder: where scores, chart and recipe fragment lie.
        restore: whether layers were restored in an all-swapped model, else swapped alone.
        costs: position among the attention layers -> nats per token that softmax saves there; of several kinds of
            text the mean share of what it saves in all layers.
        all_swapped: KL of the model with every layer swapped; None if it was not measured.
        kept: positions that the fragment keeps softmax, ascending.
        tokens: measured on.
        on: the kinds of text, of "text" and "recall".
        compared: rows of `compare`.
    """

    folder: Path
    restore: bool
    costs: dict[int, float]
    all_swapped: float | None
    kept: tuple[int, ...]
    tokens: int
    on: tuple[str, ...] = ("text",)
    compared: tuple[dict[str, Any], ...] = ()

    @property
    def ranking(self) -> list[int]:
        """Positions, the most costly to swap first."""
        return sorted(self.costs, key=lambda position: -self.costs[position])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        names = ("folder", "restore", "on", "all_swapped", "kept", "tokens", "compared")
        ranked = [{"layer": position, "kl": self.costs[position]} for position in self.ranking]
        return {name: getattr(self, name) for name in names} | {"ranking": ranked}

    def to_table(self) -> str:
        """The ranking, the comparison, and what to do with it."""
        what = "restored alone, KL saved" if self.restore else "swapped alone, KL"
        unit = "in nats a token" if len(self.on) == 1 else "as a mean share"
        lines = [f"layer  {what} {unit} ({self.tokens:,} tokens of {' and '.join(self.on)})"]
        lines += [f"{p:>5}  {self.costs[p]:.5f}{'  kept' if p in self.kept else ''}" for p in self.ranking]
        if self.compared:
            lines += ["", f"{'kept layers':<24} {'perplexity':>10} {'KL':>8}  which"]
            lines += [
                f"{row['name']:<24} {row['perplexity']:>10.2f} {row['kl']:>8.4f}  {', '.join(map(str, row['kept']))}"
                for row in self.compared
            ]
        lines += ["", f"fragment  {self.folder / FRAGMENT}", f"chart     {self.folder / CHART}"]
        return "\n".join([*lines, f"use it    --set 'convert.keep_softmax={list(self.kept)}'"])


def select(
    model: str | Path,
    output: str | Path | None = None,
    *,
    restore: bool = False,
    count: int | None = None,
    share: float | None = None,
    tokens: int = 2048,
    length: int | None = None,
    on: Sequence[str] = ("text",),
    compare: bool = False,
    recipe: str | Recipe = "smoke",
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> Selection:
    """Rank the layers of a model and write which of them to keep softmax.

    Every measurement is written as it is made; an interrupted run goes on where it stopped.

    Args:
        model: a checkpoint, or an alias, hub id, folder or GGUF file, which is converted in memory and calibrated.
        output: folder, default `NAME-select` in the current directory.
        restore: restore each layer in an all-swapped model instead of swapping each alone.
        count, share: how many layers to keep, those that a checkpoint keeps already among them; default a quarter.
        tokens: of the windows of each kind.
        length: of a window; None = 256, of recall 512.
        on: "text" = every token of the recipe's text, "recall" = the answers in documents of `swapattn.recall`; of
            both, each layer's mean share counts.
        compare: also measure uniformly spread, end-protected and ranked layers on held-out text.
        recipe, overrides: convert section and calibration (of a model that is no checkpoint) and text.
        overwrite: drop the measurements of an earlier run with other settings.

    Raises:
        UsageError: the folder holds measurements of another run or cannot be written, the number of layers does not
            fit, windows lie within the softmax window, the overrides would convert a checkpoint otherwise, or the
            tokenizer or length allows no document for recall.
        SwapattnError: as `convert` and `load` do.
    """
    resolved = load_recipe(recipe, overrides)
    if not on or isinstance(on, str) or not set(on) <= _KINDS.keys():
        raise UsageError(f"on {on!r}: expected one or more of {', '.join(_KINDS)}")
    keep = KeepSpec(count=count, share=share if share is not None or count is not None else 0.25)
    check_folder(Path(output or "."))
    subject = _subject(str(model), resolved, overrides)
    total = len(subject.positions) + len(subject.kept)
    chosen = len(keep.positions(total)) - len(subject.kept)
    if not 0 < chosen < len(subject.positions):
        raise UsageError(f"{chosen + len(subject.kept)} of {total} layers cannot be chosen: nothing is left to rank")
    on = tuple(kind for kind in _KINDS if kind in on)
    folder = Path(output) if output is not None else Path(f"{subject.name}-select")
    windows = {kind: _KINDS[kind](subject, resolved, tokens, length) for kind in on}
    _check_reach(subject, windows)
    header = {
        "version": 3, "model": fingerprint(subject.folder), "restore": restore, "tokens": tokens, "length": length,
        "recipe": resolved.to_dict() if subject.converted else None, "text": resolved.distill.text.describe(),
        "calibrated_on": None,
    }  # fmt: skip
    if subject.converted:  # on the same text, whatever is asked
        header["calibrated_on"] = _digest(windows.get("text") or _texts(subject, resolved, tokens, length))
    scores = _Scores(folder, header, {kind: _digest(windows[kind]) for kind in on}, overwrite)
    if subject.converted:  # behind all that may be refused: it takes long
        _calibrate(subject, resolved)
    for kind in on:
        _measure(subject, kind, windows[kind], scores, restore)
    each = [scores.costs(kind, restore) for kind in on]
    costs, whole = each[0] if len(each) == 1 else (_mean_share([of_kind for of_kind, _ in each]), None)
    ranked = sorted(costs, key=lambda position: -costs[position])[:chosen]
    kept = tuple(sorted({*ranked, *subject.kept}))
    measured = sum(window.ids[0, window.counted].numel() for kind in on for window in windows[kind])
    found = Selection(folder, restore, costs, whole, kept, measured, on)
    _write(found, subject.name)
    return replace(found, compared=_compare(subject, kept)) if compare else found


def _check_reach(subject: _Subject, windows: Mapping[str, list[_Window]]) -> None:
    """Windows that every swapped layer's softmax window holds whole cost nothing, whatever is swapped."""
    layers = swaps(subject.model).values()
    near = min(swap.window + swap.sinks if swap.joint else 0 for swap in layers)
    for kind, found in windows.items():
        if (longest := max(window.ids.shape[1] for window in found)) <= near:
            raise UsageError(
                f"windows of {longest} tokens of {kind} lie within the softmax window and sinks of {near}, where no "
                "layer costs anything: say a larger --length"
            )


class _Window(NamedTuple):
    """Token ids `[1, T]`, and which positions' predictions count."""

    ids: torch.Tensor
    counted: slice | list[int] = slice(None)


def _digest(windows: Iterable[_Window]) -> str:
    """Tells texts apart whatever they are called."""
    return hashlib.sha256(repr([(w.ids.tolist(), w.counted) for w in windows]).encode()).hexdigest()[:16]


def _texts(subject: _Subject, recipe: Recipe, tokens: int, length: int | None) -> list[_Window]:
    length = length or 256
    stream = PackedTokens(recipe.distill.text, subject.tokenizer, length, seed=recipe.distill.seed + 1)
    return [_Window(item["input_ids"][None]) for item in islice(stream, max(1, tokens // length))]


def _documents(subject: _Subject, recipe: Recipe, tokens: int, length: int | None) -> list[_Window]:
    """Half of them pairs of words, half passkeys; none of those that the probes of an evaluation show."""
    del recipe
    length = length or 512
    count, notes = max(2, tokens // length), list[str]()
    pairs = recall_documents(subject.tokenizer, length, count - count // 2, "select", notes)
    keys = passkey_documents(subject.tokenizer, length, count // 2, "select", notes)
    if notes:
        raise UsageError(f"--on recall: {'; '.join(notes)}")
    return [_Window(torch.tensor([document.ids]), [t - 1 for t in document.targets]) for document in [*pairs, *keys]]


_KINDS = {"text": _texts, "recall": _documents}


def _mean_share(costs: Sequence[dict[int, float]]) -> dict[int, float]:
    """Of each layer's share in the costs of all, which differ in their units."""
    sums = [sum(max(cost, 0) for cost in of_kind.values()) or 1.0 for of_kind in costs]  # restoring may cost, too
    pairs = list(zip(costs, sums, strict=True))
    return {position: sum(one[position] / all_ for one, all_ in pairs) / len(pairs) for position in costs[0]}


@dataclass(frozen=True)
class _Subject:
    """A model whose swapped layers can be switched to softmax; `positions` are theirs among the attention layers."""

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    positions: tuple[int, ...]
    kept: tuple[int, ...]
    teacher: Any  # None: the model itself with softmax everywhere
    converted: bool

    @contextlib.contextmanager
    def softmax_at(self, positions: Collection[int]) -> Iterator[None]:
        """Compute these swapped layers by softmax."""
        layers = dict(zip(self.positions, swaps(self.model).values(), strict=True))
        for position in positions:
            layers[position].observer = lambda *_: None
        try:
            yield
        finally:
            for layer in layers.values():
                layer.observer = None

    def teacher_logits(self, ids: torch.Tensor) -> torch.Tensor:
        if self.teacher is not None:
            return _logits(self.teacher, ids)
        with observing(self.model, lambda *_: None):
            return _logits(self.model, ids)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """KL(teacher ‖ student) of logits `[N, V]`, summed over tokens."""
    return float(divergence(student, teacher, Mixture()).double().sum())


def _subject(model: str, recipe: Recipe, overrides: Sequence[str]) -> _Subject:
    device = default_device()
    if (Path(model) / RECORD).is_file():
        checkpoint = read(Path(model))
        said = of_convert(overrides)
        if load_recipe(checkpoint.recipe, said).convert != checkpoint.recipe.convert:
            raise UsageError(f"{', '.join(said)}: {model} is converted already, otherwise; rank the model it is from")
        swapped, tokenizer = load(checkpoint.path, dtype=torch.float32, device=device)
        trained = any(".swap." not in name for name in checkpoint.record.get("trained", ()))
        teacher = load_teacher(checkpoint, dtype=torch.float32, device=device)[0] if trained else None
        spec = swapped.config.swapattn["spec"]["keep_softmax"]
        total = len(swaps(swapped)) + len(spec)
        kept = tuple(sorted(index % total for index in spec))
        name, folder = checkpoint.path.resolve().name, checkpoint.path
    else:
        source = sources.materialize(sources.resolve(model))
        swapped, tokenizer = load_teacher(source.path, dtype=torch.float32)
        planned = plan(swapped.config, recipe.convert.model_copy(update={"keep_softmax": ()}))
        apply_(swapped, planned)
        swapped.to(device)
        teacher, kept, total = None, (), len(planned.swap)
        name, folder = source.source.name, source.path
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer, which the ranking needs")
    positions = tuple(position for position in range(total) if position not in kept)
    converted = not (Path(model) / RECORD).is_file()
    return _Subject(name, folder, swapped.eval(), tokenizer, positions, kept, teacher, converted)


def _calibrate(subject: _Subject, recipe: Recipe) -> None:
    stage = recipe.distill.calibration
    data = PackedTokens(recipe.distill.text, subject.tokenizer, stage.length, seed=recipe.distill.seed)
    calibrate_stage(subject.model, stage, data)


class _Scores:
    """Measurements on disk, a JSON line each: kind of text, window, layer (−1: none), KL summed over tokens, tokens.

    And the digest of all windows of that kind: those of other windows are dropped.
    """

    def __init__(self, folder: Path, header: dict[str, Any], digests: Mapping[str, str], overwrite: bool) -> None:
        self.path = folder / SCORES
        self.rows: dict[tuple[str, int, int], tuple[float, int]] = {}
        self.digests = dict(digests)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed process
                    lines.append(json.loads(line))
        if lines and lines[0].get("recipe"):
            lines[0]["recipe"] = restated(lines[0]["recipe"])
        if lines and lines[0] != header and not overwrite:
            raise UsageError(f"{self.path} is of another model or other settings: use --overwrite, or -o for another")
        if lines and lines[0] == header:
            for r in lines[1:]:
                if self.digests.setdefault(r["on"], r["windows"]) == r["windows"]:
                    self.rows[r["on"], r["window"], r["layer"]] = (r["kl"], r["tokens"])
            say(f"{len(self.rows)} measurements kept from an earlier run in {self.path}")
            if len(self.rows) < len(lines) - 1:
                say(f"{len(lines) - 1 - len(self.rows)} on other text are dropped")
        kept = [header, *(self._row(*key) for key in self.rows)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def _row(self, on: str, window: int, layer: int) -> dict[str, Any]:
        kl, tokens = self.rows[on, window, layer]
        return {"on": on, "windows": self.digests[on], "window": window, "layer": layer, "kl": kl, "tokens": tokens}

    def add(self, on: str, window: int, layer: int, kl: float, tokens: int) -> None:
        self.rows[on, window, layer] = (kl, tokens)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._row(on, window, layer)) + "\n")

    def costs(self, on: str, restore: bool) -> tuple[dict[int, float], float | None]:
        """Nats per token of each layer, and of all of them swapped (measured only with `restore`)."""
        sums: dict[int, tuple[float, int]] = {}
        for (kind, _, layer), (kl, tokens) in self.rows.items():
            if kind != on:
                continue
            have = sums.get(layer, (0.0, 0))
            sums[layer] = (have[0] + kl, have[1] + tokens)
        mean = {layer: kl / tokens for layer, (kl, tokens) in sorted(sums.items())}
        whole = mean.pop(_ALL, None)
        return ({p: whole - kl for p, kl in mean.items()} if restore and whole is not None else mean), whole


def _measure(subject: _Subject, on: str, windows: Sequence[_Window], scores: _Scores, restore: bool) -> None:
    layers = [*subject.positions, *([_ALL] if restore else [])]
    missing = [(w, p) for w in range(len(windows)) for p in layers if (on, w, p) not in scores.rows]
    device = next(subject.model.parameters()).device
    at, target = -1, torch.empty(0)
    for window, position in tqdm(missing, desc=f"layers, {on}", unit="run", file=sys.stderr):
        ids, counted = windows[window].ids.to(device), windows[window].counted
        if window != at:
            at, target = window, subject.teacher_logits(ids)[counted]
        alone = {position} - {_ALL}
        with subject.softmax_at(alone if restore else set(subject.positions) - alone):
            kl = _kl(_logits(subject.model, ids)[counted], target)
        scores.add(on, window, position, kl, len(target))


def _compare(subject: _Subject, ranked: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    """Perplexity and KL on held-out text with no layer kept, and with as many as the ranking by three ways."""
    total = len(subject.positions) + len(subject.kept)
    count = len(ranked)
    sets = {"none": subject.kept}
    if not subject.kept:
        sets["uniform"] = KeepSpec(count=count).positions(total)
        if count > 1:
            sets["first and last, uniform"] = KeepSpec(count=count, first=1, last=1).positions(total)
    sets["ranked"] = ranked
    device = next(subject.model.parameters()).device
    windows = heldout_windows(subject.tokenizer, count=HELDOUT[0], length=HELDOUT[1])
    rows = []
    for name, kept in sets.items():
        with subject.softmax_at(set(kept) - set(subject.kept)):
            perplexity = heldout_perplexity(subject.model, windows)
        kl = 0.0
        for ids in windows[:, None].to(device):
            target = subject.teacher_logits(ids)
            with subject.softmax_at(set(kept) - set(subject.kept)):
                kl += _kl(_logits(subject.model, ids), target) / windows.numel()
        rows.append({"name": name, "kept": list(kept), "perplexity": perplexity.value, "kl": kl})
    teacher = subject.teacher
    with contextlib.nullcontext() if teacher is not None else observing(subject.model, lambda *_: None):
        perplexity = heldout_perplexity(teacher if teacher is not None else subject.model, windows)
    rows.append({"name": "teacher", "kept": [], "perplexity": perplexity.value, "kl": 0.0})
    return tuple(rows)


def _write(found: Selection, name: str) -> None:
    way = "restored alone in the swapped model" if found.restore else "swapped alone"
    text = (
        f"# {len(found.kept)} layers of {name} whose softmax is worth most, each {way}:\n"
        f"# KL to the teacher on {found.tokens} tokens of {' and '.join(found.on)}, all figures in {SCORES}.\n"
        f"convert:\n  keep_softmax: {list(found.kept)}\n"
    )
    (found.folder / FRAGMENT).write_text(text, encoding="utf-8")
    _chart(found, name)


def _chart(found: Selection, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 0.3 * len(found.costs) + 1.5), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = sorted(found.costs)
    colours = ["tab:blue" if position in found.kept else "lightgray" for position in positions]
    axes.bar([str(p) for p in positions], [found.costs[p] for p in positions], color=colours)
    axes.set_xlabel("attention layer (blue: kept softmax)")
    unit = "nats a token" if len(found.on) == 1 else f"mean share of {' and '.join(found.on)}"
    axes.set_ylabel(f"KL saved, {unit}" if found.restore else f"KL, {unit}")
    title = f"{name}: each layer {'restored' if found.restore else 'swapped'} alone"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.tick_params(axis="x", labelsize=7)
    figure.savefig(found.folder / CHART, dpi=120)
