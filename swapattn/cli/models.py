"""`swapattn models`."""

from __future__ import annotations

from dataclasses import asdict

from .common import command, emit


@command("models")
def models_command(as_json: bool) -> None:
    """List the aliases: short names for models that `swapattn convert` takes.

    Any hub id, local folder or GGUF file works as well. A gated model asks you to accept its licence on the hub.

    \b
    Examples:
      swapattn models
      swapattn models --json
    """
    from swapattn.sources import ALIASES, CARRIED

    carried = {alias: str(wheel) for alias, wheel in CARRIED.items()}
    data = {"models": [{**asdict(row), "without_hub": carried.get(row.alias)} for row in ALIASES.values()]}
    lines = [("alias", "hub id", "licence", "parameters", "")]
    for row in ALIASES.values():
        notes = ["gated"] if row.gated else []
        notes += [f"without a hub: PyPI wheel {carried[row.alias]}"] if row.alias in carried else []
        lines.append((row.alias, row.hub_id, row.licence, _size(row.parameters), ", ".join(notes)))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    emit(as_json, data, "\n".join(table))


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
