"""`swapattn report`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import command, dry_run_option, emit


@command("report")
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="The page; report.html here by default. FILE.md, FILE.json and FILE_files/ lie beside it.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier report.")
@dry_run_option
def report_command(runs: tuple[Path, ...], output: Path | None, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """One page on the checkpoints RUN, by default the newest one here; several are compared side by side.

    The page needs no network and holds the conversion plan, loss curves, scores, probes, speed and memory, and
    where everything comes from. What a run lacks is said, with the command that makes it.

    Of evaluations RUN/eval.json is shown first, and every RUN/eval-*.json for what those before it lack.

    \b
    Examples:
      swapattn report smollm2-135m-swapattn-short
      swapattn eval RUN --tasks none --cost -o RUN/eval-cost.json && swapattn report RUN
      swapattn report smollm2-135m-swapattn smollm2-135m-swapattn-short -o compare.html
    """
    from swapattn.report import build

    files = build(runs, output, overwrite=overwrite, dry_run=dry_run)
    emit(as_json, files.to_dict(), files.to_table())
