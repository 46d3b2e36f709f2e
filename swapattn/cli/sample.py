"""`swapattn sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import command, dry_run_option, emit


@command("sample")
@click.argument("model", required=False)
@click.option("--tokens", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="How many to write.")
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of each text.")
@click.option("--batch", type=click.IntRange(min=1), help="Texts at a time. [default: 256 on a GPU, 16 on a CPU]")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="1 is the teacher's own distribution.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Among the most likely tokens that make up this share.",
)
@click.option(
    "--start",
    type=click.Choice(["bos", "token", "chat"]),
    help="What a text starts from: the token that begins one, a random token, or the chat template up to the user.  "
    "[default: bos]",
)
@click.option("--prompts", metavar="TEXT", help="Go on from the documents of this text, as distill.text takes it.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Of each document.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; by default the first GPU, else the CPU.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="[default: NAME-samples.jsonl]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@dry_run_option
def sample_command(model: str | None, output: Path | None, as_json: bool, **options: Any) -> None:
    """Let MODEL, or the teacher of the checkpoint MODEL, write text to distill on.

    Without MODEL it is the teacher of the newest checkpoint in the current directory. An interrupted run goes on
    when its command is repeated, and ends in the same file.

    \b
    Examples:
      swapattn sample smollm2-135m --tokens 20000000 -o samples.jsonl
      swapattn sample --start chat --seed 1 -o chats.jsonl
      swapattn sample --prompts '{hub: HuggingFaceFW/fineweb-edu, config: sample-10BT}' -o more.jsonl
      swapattn distill --set 'distill.text=[{files: [samples.jsonl], weight: 3}, chats.jsonl]'
    """
    from swapattn.sampling import sample

    found = sample(model, output, **options)
    emit(as_json, found.to_dict(), found.to_table())
