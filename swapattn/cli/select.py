"""`swapattn select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import command, emit, output_options, recipe_option


@command("select")
@click.argument("model")
@click.option("--restore", is_flag=True, help="Restore each layer in an all-swapped model, not swap each alone.")
@click.option("--count", type=click.IntRange(min=1), help="How many layers to keep softmax. [default: a quarter]")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="The same as a share of all.")
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Of all windows of a kind.")
@click.option("--length", type=click.IntRange(min=2), help="Of a window.  [default: 256; of recall 512]")
@click.option(
    "--on",
    type=click.Choice(["text", "recall"]),
    multiple=True,
    default=["text"],
    show_default=True,
    help="What counts: all tokens of the recipe's text, answers from far back, or (both given) shares of both.",
)
@click.option("--compare", is_flag=True, help="Also measure uniform, end-protected and ranked layers on held-out text.")
@recipe_option("smoke")
@output_options
def select_command(model: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Rank the layers of MODEL, a checkpoint or any model, by what swapping each one costs.

    The cost is the KL to the teacher on a little text of the recipe, or on answers to questions about what stands far
    back (--on recall): few layers look that up, and on ordinary text they seem to do little. Writes the figures as
    they are measured (a repeated command goes on), a bar chart, and a recipe fragment with the layers to keep softmax.

    \b
    Examples:
      swapattn select smollm2-135m --count 8
      swapattn select smollm2-135m --on text --on recall --count 7 --tokens 4096
      swapattn select smollm2-135m-swapattn-short --restore --share 0.25 --compare
    """
    from swapattn.errors import UsageError
    from swapattn.selection import select

    if options["count"] is not None and options["share"] is not None:
        raise UsageError("say one of --count and --share")
    found = select(model, output, **options)
    emit(as_json, found.to_dict(), found.to_table())
