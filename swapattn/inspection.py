"""`inspect`: where a model attends, and what a conversion would make of it, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import sources
from .cells import aligned
from .errors import SwapattnError, UnsupportedModelError
from .graph import LENGTH, GraphSite, Tracer, attention_in, trace
from .recipe import Recipe, load_recipe
from .shards import read_config
from .surgery import SwapPlan, plan


@dataclass(frozen=True)
class Inspection:
    """The attention sites of a model, in the order of its graph, with what conversion does to each.

    Attributes:
        model_type: of the config.
        sites: what the graph shows.
        actions: one for each site: "swap", "keep", "untouched" (of which the plan knows nothing), or "refused" where
            the model is.
        refusal: why the model is refused; None if it can be converted.
        tracer: how the graph was had; `fallback` says why not by torch.export.
        notes: what a swap changes beside the softmax, and where plan and graph disagree.
    """

    model_type: str
    sites: tuple[GraphSite, ...]
    actions: tuple[str, ...]
    refusal: str | None
    tracer: Tracer | None
    fallback: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        rows = [asdict(site) | {"action": action} for site, action in zip(self.sites, self.actions, strict=True)]
        names = ("model_type", "refusal", "tracer", "fallback", "notes")
        return {name: getattr(self, name) for name in names} | {"sites": rows}

    def to_table(self) -> str:
        """A table in which neighbouring layers that differ in nothing but their number share a row."""
        lines: list[tuple[str, ...]] = [
            ("site", "heads", "KV", "dim", "mask", "scale", "softcap", "form", "conversion")
        ]
        pairs = list(zip(self.sites, self.actions, strict=True))
        groups: list[list[tuple[GraphSite, str]]] = []
        for pair in pairs:
            if groups and _alike(groups[-1][-1], pair):
                groups[-1].append(pair)
            else:
                groups.append([pair])
        lines += [_row(group) for group in groups]
        kinds = [kind for kind in ("swap", "keep", "untouched", "refused") if kind in self.actions]
        counts = ", ".join(f"{self.actions.count(kind)} {kind}" for kind in kinds)
        how = f"traced with {self.tracer}" if self.tracer else "not traced"
        head = f"model type {self.model_type}, {len(self.sites)} attention sites ({counts or 'none'}), {how}"
        end = [f"torch.export failed: {self.fallback}"] if self.fallback else []
        end += [f"refused: {self.refusal}"] if self.refusal else []
        end += [f"note: {note}" for note in self.notes]
        return "\n\n".join(
            "\n".join(part)
            for part in ([head], [aligned(lines, left=len(lines[0]))] if self.sites else [], end)
            if part
        )


def _alike(a: tuple[GraphSite, str], b: tuple[GraphSite, str]) -> bool:
    return asdict(a[0]) | {"path": ""} == asdict(b[0]) | {"path": ""} and a[1] == b[1]


def _row(group: Sequence[tuple[GraphSite, str]]) -> tuple[str, ...]:
    site, action = group[0]
    path = site.path if len(group) == 1 else f"{site.path} … {group[-1][0].path}"
    mask = site.mask + (f" {site.window}" if site.window else "") + (" + bias" if site.bias else "")
    mask += " + sinks" if site.sinks else ""
    width = str(site.head_dim) if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    scale = f"{site.scale:.4g}" if site.scale is not None else "-"
    softcap = f"{site.softcap:g}" if site.softcap is not None else "-"
    return path, str(site.heads), str(site.kv_heads), width, mask, scale, softcap, site.form, action


def inspect_model(
    model: str | Path, *, recipe: str | Recipe = "short", overrides: Sequence[str] = (), trust_remote_code: bool = False
) -> Inspection:
    """Look at a model by its config; weights are neither read nor allocated.

    Args:
        model: alias, hub id, folder (config.json is enough) or GGUF file.
        recipe: whose convert section says what would be swapped.
        overrides: `KEY=VALUE` changes of the recipe.
        trust_remote_code: allow modelling code that comes with the model, now and later (`remote_code`).

    Raises:
        UsageError, SourceError: there is no such model.
        UnsupportedModelError: transformers cannot build the type at all.
    """
    resolved = load_recipe(recipe, overrides)
    return inspect_config(_config(str(model), trust_remote_code), resolved)


def _config(model: str, trust_remote_code: bool) -> Any:
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return read_config(path, trust_remote_code=trust_remote_code)
    teacher = sources.describe(sources.resolve(model), code=trust_remote_code)
    return read_config(teacher.path, trust_remote_code=trust_remote_code)


def inspect_config(config: Any, recipe: Recipe) -> Inspection:
    """`inspect_model` of a transformers config."""
    planned: SwapPlan | None = None
    refusal = None
    try:
        planned = plan(config, recipe.convert)
    except SwapattnError as error:
        refusal = str(error)
    sites: list[GraphSite] = []
    tracer: Tracer | None = None
    fallback = ""
    try:
        # sdpa leaves a softcap out, and some versions of transformers let it
        eager = planned is not None and any(site.softcap for site in (*planned.swap, *planned.keep))
        graph, tracer, fallback = trace(*_on_meta(config, "eager" if eager else None))
        sites = attention_in(graph)
    except Exception as error:  # whatever the code of a family raises without weights
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if refusal is None:
            raise UnsupportedModelError(f"model type {config.model_type!r} cannot be traced ({reason})") from error
        fallback = f"{fallback}; recording it failed as well: {reason}" if fallback else reason
    swapped = {site.path for site in planned.swap} if planned else set()
    kept = {site.path for site in planned.keep} if planned else set()
    actions = tuple(
        "refused" if planned is None else "swap" if s.path in swapped else "keep" if s.path in kept else "untouched"
        for s in sites
    )
    notes = _notes(sites, actions, planned)
    return Inspection(config.model_type, tuple(sites), actions, refusal, tracer, fallback, notes)


def _notes(sites: list[GraphSite], actions: tuple[str, ...], planned: SwapPlan | None) -> tuple[str, ...]:
    """What a swap changes beside the softmax, and where plan and graph disagree."""
    if planned is None:
        return ()
    swapped = [site for site, action in zip(sites, actions, strict=True) if action == "swap"]
    notes = []
    if any(site.softcap for site in swapped):
        notes.append("the softcap has no place in a swapped layer: it is dropped there")
    if any(site.sinks for site in swapped):
        notes.append("the learned sinks have no place in a swapped layer: they stay as unused parameters")
    if any(site.mask == "sliding window" for site in swapped):
        notes.append("the linear branch of a swapped sliding-window layer sees past the window, with decay")
    missing = {site.path for site in planned.swap} - {site.path for site in swapped}
    if missing:
        notes.append(f"the graph shows no attention in {min(missing)}, which would be swapped")
    return tuple(notes)


def _on_meta(config: Any, attention: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """A model without weights, and the inputs of its forward pass."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    config = type(config).from_dict(config.to_dict())
    ids = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    kind = AutoModel
    if getattr(config, "is_encoder_decoder", False) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        kind, inputs = AutoModelForSeq2SeqLM, {**inputs, "decoder_input_ids": ids}
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = AutoModelForCausalLM
    with torch.device("meta"):
        more = {"attn_implementation": attention} if attention else {}
        model = kind.from_config(config, dtype=torch.bfloat16, **more)
    return model.eval(), inputs
