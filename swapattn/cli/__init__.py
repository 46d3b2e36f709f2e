"""The command line: a lazy click group, so that help answers without loading torch.

Each command lives in the module of its name as the attribute `NAME_command`. These modules import only click and
the standard library at the top; what a command calls is imported inside its callback.
"""

from __future__ import annotations

from importlib import import_module

import click

from swapattn import __version__

COMMANDS = (
    "bench",
    "convert",
    "distill",
    "eval",
    "generate",
    "inspect",
    "logits",
    "models",
    "quickstart",
    "recipes",
    "report",
    "sample",
    "select",
    "verify",
)


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for (or when help lists it)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None so that click reports it with near matches."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(import_module(f".{cmd_name}", __name__), f"{cmd_name}_command")
        return found


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="swapattn")
def main() -> None:
    """Swap softmax attention for Lightning Attention-2, distill the model from the original, evaluate both.

    \b
    Examples:
      swapattn quickstart
      swapattn convert smollm2-135m
      swapattn distill --recipe short
      swapattn eval --tasks hellaswag,piqa
    """
