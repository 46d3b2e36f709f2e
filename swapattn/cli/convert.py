"""`swapattn convert`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, dry_run_option, emit, output_options, recipe_option


@command("convert")
@click.argument("model")
@recipe_option()
@output_options
@click.option("--calibrate", is_flag=True, help="Also run the closed-form calibrate stage (runs the teacher).")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the checkpoint, with a model card.")
@click.option("--allow-pickle", is_flag=True, help="Read a folder that has pickled weights only.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
@dry_run_option
def convert_command(
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    calibrate: bool,
    push_to_hub: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Swap the attention of MODEL: an alias, a hub id, a folder or a GGUF file.

    The teacher's weights are taken over unchanged. Without --recipe the convert section of `short` is used.

    \b
    Examples:
      swapattn convert smollm2-135m
      swapattn convert ./my-llama --set convert.keep_softmax=[0] -o my-llama-swapped
      swapattn convert llama-7b --dry-run --json
    """
    from swapattn.conversion import convert

    result = convert(
        model,
        output,
        recipe=recipe,
        overrides=overrides,
        overwrite=overwrite,
        calibrate=calibrate,
        dry_run=dry_run,
        push_to_hub=push_to_hub,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    emit(as_json, result.to_dict(), result.to_table())
