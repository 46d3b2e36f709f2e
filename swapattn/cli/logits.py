"""`swapattn logits`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, dry_run_option, emit, recipe_option


@command("logits")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@recipe_option()
@click.option("--top", type=click.IntRange(min=1), default=128, show_default=True, help="Most probable tokens to keep.")
@click.option("--teacher", metavar="FOLDER", help="Use this teacher, not the one that the checkpoint records.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace folders that hold other logits.")
@dry_run_option
def logits_command(
    checkpoint: Path | None,
    recipe: str,
    overrides: tuple[str, ...],
    top: int,
    teacher: str | None,
    device: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write down what the teacher of CHECKPOINT says, so that distill can do without it.

    Of the windows that the stages with `teacher: {logits: FOLDER}` will see, the teacher's most probable tokens go into
    those folders. Without CHECKPOINT the newest undistilled conversion in the current directory is taken. What was
    interrupted goes on.

    \b
    Examples:
      swapattn logits --recipe short --set distill.stages.distill.teacher.logits=fineweb-logits
      swapattn distill --recipe short --set distill.stages.distill.teacher.logits=fineweb-logits
      swapattn logits --recipe mine.yaml --teacher ../larger-model --top 256 --dry-run
    """
    from swapattn.checkpoint import find
    from swapattn.environment import default_device
    from swapattn.logits import to_table, write_logits
    from swapattn.recipe import load_recipe

    found = write_logits(
        find(model=checkpoint, kind="converted" if checkpoint is None else None),
        load_recipe(recipe, overrides),
        top=top,
        teacher=Path(teacher) if teacher else None,
        device=device or default_device(),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    emit(as_json, {"dry_run": dry_run, "logits": found}, to_table(found, dry_run=dry_run))
