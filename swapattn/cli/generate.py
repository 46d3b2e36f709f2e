"""`swapattn generate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from swapattn.environment import say

from .common import command, emit, result_stream


@command("generate")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="What to answer; read from standard input when left out.")
@click.option("--teacher", is_flag=True, help="Let the checkpoint's teacher answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling at a temperature above 0.")
@click.option("--raw", is_flag=True, help="Go on from the prompt; no chat template.")
@click.option("--compile", "compiled", is_flag=True, help="On a GPU: compile the step first. For long answers.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; by default the first GPU, else the CPU.")
def generate_command(
    checkpoint: Path | None,
    prompt: str | None,
    teacher: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    raw: bool,
    compiled: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Stream text from CHECKPOINT, by default the newest one in the current directory.

    The text goes to stdout as it is made, tokens per second and the bytes of the cache go to stderr.

    \b
    Examples:
      swapattn generate --prompt "What is a whale?"
      swapattn generate smollm2-135m-swapattn-short --teacher --temperature 0.7 --prompt "Tell me a story."
      echo "Call me" | swapattn generate --raw --max-new-tokens 20 --json
    """
    from swapattn.generation import answer, open_model

    text = _checked_prompt(prompt)
    model, tokenizer, name = open_model(checkpoint, teacher=teacher, device=device)
    say(f"generating with {name}")
    made = answer(
        model,
        tokenizer,
        text,
        show=(lambda piece: None) if as_json else (lambda piece: click.echo(piece, nl=False, file=result_stream())),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        raw=raw,
        compiled=compiled,
    )
    if as_json:
        emit(True, {"model": name, "prompt": text, "text": made.text, **made.stats.to_dict()}, "")
    else:
        click.echo(file=result_stream())
    say(made.stats.to_line())


def _checked_prompt(prompt: str | None) -> str:
    from swapattn.errors import UsageError

    try:
        text = _read_prompt() if prompt is None else prompt
        text.encode()  # where Python lets other bytes in, as in the locale C.UTF-8, a tokenizer does not take them
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8") from None
    return text


def _read_prompt() -> str:
    from swapattn.errors import UsageError

    if sys.stdin.isatty():
        raise UsageError("no prompt: pass --prompt TEXT, or pipe it in")
    return sys.stdin.read().rstrip("\n")
