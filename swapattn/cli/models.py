"""`swapattn models`."""

from __future__ import annotations

from dataclasses import asdict

import click

from .common import command, emit


@command("models")
@click.option("--types", is_flag=True, help="List every causal-LM type of transformers instead: supported, or why not.")
def models_command(types: bool, as_json: bool) -> None:
    """List the aliases: short names for models that `swapattn convert` takes.

    Any hub id, local folder or GGUF file works as well, if its model type is supported (`--types`, half a minute).
    A gated model asks you to accept its licence on the hub.

    \b
    Examples:
      swapattn models
      swapattn models --json
      swapattn models --types
    """
    if types:
        _emit_types(as_json)
    else:
        _emit_aliases(as_json)


def _emit_aliases(as_json: bool) -> None:
    from swapattn.cells import aligned
    from swapattn.sources import ALIASES, CARRIED

    carried = {alias: str(wheel) for alias, wheel in CARRIED.items()}
    data = {"models": [{**asdict(row), "without_hub": carried.get(row.alias)} for row in ALIASES.values()]}
    lines = [("alias", "hub id", "licence", "parameters", "")]
    for row in ALIASES.values():
        notes = ["gated"] if row.gated else []
        notes += [f"without a hub: PyPI wheel {carried[row.alias]}"] if row.alias in carried else []
        lines.append((row.alias, row.hub_id, row.licence, _size(row.parameters), ", ".join(notes)))
    emit(as_json, data, aligned(lines, left=len(lines[0])))


def _emit_types(as_json: bool) -> None:
    import sys

    import transformers
    from tqdm import tqdm

    from swapattn import families

    kinds = sorted(families.types())
    rows = [families.support(kind) for kind in tqdm(kinds, desc="types", unit="type", file=sys.stderr, leave=False)]
    count = sum(row.supported for row in rows)
    data = {
        "transformers": transformers.__version__,
        "supported": count,
        "types": [{"type": row.kind, "supported": row.supported, "reason": row.reason or None} for row in rows],
    }
    from swapattn.cells import aligned

    lines = [(row.kind, "supported" if row.supported else "refused", row.reason) for row in rows]
    summary = f"{count} of {len(rows)} causal-LM types of transformers {transformers.__version__} are supported"
    emit(as_json, data, f"{aligned([('type', '', 'reason'), *lines], left=3)}\n\n{summary}")


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
