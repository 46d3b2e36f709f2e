"""`swapattn distill`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, dry_run_option, emit, output_options, recipe_option


@command("distill")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@recipe_option()
@output_options
@click.option("--teacher", metavar="FOLDER", help="Use this teacher, not the one that the checkpoint records.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one.")
@click.option(
    "--report-to",
    type=click.Choice(["tensorboard", "wandb"]),
    multiple=True,
    help="Also send the figures of every step there, if it is installed; repeatable.",
)
@dry_run_option
def distill_command(
    checkpoint: Path | None,
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    teacher: str | None,
    device: str | None,
    report_to: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the converted CHECKPOINT to answer as its teacher does.

    Without CHECKPOINT the newest undistilled conversion in the current directory is taken; an unfinished run of
    the same recipe is resumed.

    \b
    Examples:
      swapattn distill --recipe smoke
      swapattn distill smollm2-135m-swapattn --set distill.text=notes/*.txt
      swapattn distill --recipe short --set distill.stages.align.tokens=100000 --dry-run
    """
    from swapattn.distillation import distill

    result = distill(
        checkpoint,
        recipe=recipe,
        output=output,
        overrides=overrides,
        overwrite=overwrite,
        dry_run=dry_run,
        device=device,
        teacher=teacher,
        report_to=report_to,
    )
    emit(as_json, result.to_dict(), result.to_table())
