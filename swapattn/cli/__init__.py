"""The command line: a lazy click group, so that help answers without loading torch.

Each command lives in the module of its name as the attribute `NAME_command`. These modules import only click and
the standard library at the top; what a command calls is imported inside its callback.
"""

from __future__ import annotations

import difflib
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
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(import_module(f".{cmd_name}", __name__), f"{cmd_name}_command")
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a name that is not known is reported with a near match."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                ctx.fail(f"{error.message} Did you mean {near[0]!r}?")
            raise


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
