"""`swapattn inspect`."""

from __future__ import annotations

import click

from .common import command, emit, recipe_option


@command("inspect")
@click.argument("model")
@recipe_option()
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
def inspect_command(
    model: str, recipe: str, overrides: tuple[str, ...], trust_remote_code: bool, as_json: bool
) -> None:
    """Show where MODEL attends and what converting it would do, from its config alone.

    The model is exported on the meta device and its graph walked: owner, heads, KV heads, head dim, mask, scale and
    softcap of each attention site. Works for types that `convert` refuses too, and says why it does.

    \b
    Examples:
      swapattn inspect smollm2-135m
      swapattn inspect ./my-bloom --json
      swapattn inspect llama-3.1-8b --set convert.keep_softmax={share: 0.25}
    """
    from swapattn.inspection import inspect_model

    found = inspect_model(model, recipe=recipe, overrides=overrides, trust_remote_code=trust_remote_code)
    emit(as_json, found.to_dict(), found.to_table())
