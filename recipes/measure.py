"""Distil and measure several recipes side by side: how the tables of README.md and their JSON are made.

    python recipes/measure.py run recipes/runs/short.yaml -o measured --gpus 0,1 --lanes 2 \
        --text '{files: [corpus/*.txt.zst]}' --heldout brown.txt.zst

Each run of the file is converted, distilled and evaluated by the three commands, as a user would. Its figures go into
OUTPUT/NAME.json at once, and a run whose figures are there is not repeated. Controls: `finetune: true` trains the
teacher itself, with softmax, on the cross-entropy of the same windows; `subject: linear-off` takes the figures of the
window alone, for a run whose distill stage has `branch: local`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import yaml

SWAPATTN = (sys.executable, "-c", "from swapattn.cli import main; main()")
COLUMNS = "run", "Mtok", "s", "kept", "whole", "far", "lambada", "off whole", "off far", "recall", "passkey"


class Failed(Exception):
    """A command of a run ended with an error."""


@click.group()
def main() -> None:
    """Measure recipes."""


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--text", help="YAML of distill.text for all runs.  [default: the recipes' own]")
@click.option("--heldout", type=click.Path(exists=True, dir_okay=False), required=True, help="Text for perplexity.")
@click.option("--teacher", default="smollm2-135m", show_default=True)
@click.option("--gpus", default="0", show_default=True, help="Numbers of the GPUs; empty for none.")
@click.option("--lanes", default=1, show_default=True, help="Runs that share a GPU.")
@click.option("--only", multiple=True, metavar="NAME", help="Of the file's runs only these; repeatable.")
def run(
    file: Path, output: Path, text: str | None, heldout: str, teacher: str, gpus: str, lanes: int, only: tuple[str, ...]
) -> None:
    """Carry out the runs of FILE, print the table; exit code 1 if any failed."""
    output.mkdir(parents=True, exist_ok=True)
    described = yaml.safe_load(file.read_text())
    unknown = set(only) - described["runs"].keys()
    if unknown:
        raise click.UsageError(f"{file} has no run {', '.join(sorted(unknown))}")
    chosen = [name for name in described["runs"] if name in only or not only]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    slots = [gpu for gpu in gpus.split(",") for _ in range(lanes)]
    for gpu in slots:
        free.put(gpu)

    def measured(name: str) -> bool:
        options = {"eval": described["eval"], **described["runs"][name]}
        gpu = free.get()
        try:
            found = carry_out(output / name, options, teacher, text, heldout, gpu)
        except Failed as error:
            click.echo(f"{name}: {error}", err=True)
            return False
        finally:
            free.put(gpu)
        (output / f"{name}.json").write_text(json.dumps(found, indent=1))
        click.echo(row(name, found), err=True)
        return True

    with ThreadPoolExecutor(len(slots)) as lane:
        succeeded = list(lane.map(measured, (name for name in chosen if not (output / f"{name}.json").is_file())))
    click.echo("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in chosen:
        if (output / f"{name}.json").is_file():
            click.echo(row(name, json.loads((output / f"{name}.json").read_text())))
    if not all(succeeded):
        raise SystemExit(1)


def carry_out(
    folder: Path, options: dict[str, Any], teacher: str, text: str | None, heldout: str, gpu: str
) -> dict[str, Any]:
    """Convert, distil and evaluate one run; what each command printed, its words and its seconds."""
    folder.mkdir(exist_ok=True)
    recipe, sets = options["recipe"], list(options.get("set", ()))
    sets += [f"distill.text={text}"] if text else []
    words = [word for value in sets for word in ("--set", value)]
    tuned = options.get("finetune", False)
    steps: dict[str, Any] = {"subject": "finetuned" if tuned else options.get("subject", "distilled")}

    def step(name: str, *command: str) -> Any:
        start = time.monotonic()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        (folder / f"{name}.err").write_text(done.stderr)
        if done.returncode:
            raise Failed(f"{name} ended with {done.returncode}: {' '.join(done.stderr.split()[-60:])}")
        steps[name] = {
            "command": ["swapattn" if word == SWAPATTN[2] else word for word in command if word not in SWAPATTN[:2]],
            "seconds": round(time.monotonic() - start, 1),
            "printed": json.loads(done.stdout),
        }

    converted, distilled, finetuned = (str(folder / name) for name in ("converted", "distilled", "finetuned"))
    made = ["--recipe", recipe, *words]
    scored = ["--perplexity", heldout, *options["eval"], "--json"]
    step("convert", *SWAPATTN, "convert", teacher, "-o", converted, *made, "--overwrite", "--json")
    if tuned:
        step("distill", sys.executable, __file__, "finetune", converted, finetuned, *made)
        step("eval", *SWAPATTN, "eval", converted, "--against", finetuned, *scored)
    else:
        step("distill", *SWAPATTN, "distill", converted, "-o", distilled, *made, "--overwrite", "--json")
        step("eval", *SWAPATTN, "eval", distilled, "--branches", *scored)
    return steps


@main.command()
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--recipe", required=True)
@click.option("--set", "sets", multiple=True)
def finetune(checkpoint: str, output: Path, recipe: str, sets: tuple[str, ...]) -> None:
    """Train the teacher of CHECKPOINT on the text of the recipe's last stage: its tokens, rates and windows."""
    import functools

    import torch

    from swapattn.checkpoint import find
    from swapattn.data import PackedTokens
    from swapattn.environment import default_device
    from swapattn.loading import load_teacher
    from swapattn.objectives import distill_loss
    from swapattn.recipe import load_recipe
    from swapattn.stages import DistillStage, LossSpec
    from swapattn.training import run_stage

    resolved = load_recipe(recipe, sets)
    stages = list(resolved.distill.stages)
    last = stages[-1]
    if not isinstance(last, DistillStage):
        raise click.UsageError(f"recipe {recipe} does not end with a distill stage")
    stage = last.model_copy(update={"losses": LossSpec(cross_entropy=1.0), "train": "all"})
    device = default_device()
    model, tokenizer = load_teacher(find(Path.cwd(), checkpoint), dtype=torch.float32)
    seed = resolved.distill.seed
    windows = PackedTokens(stage.text or resolved.distill.text, tokenizer, stage.length, seed=seed + len(stages) - 1)
    loss = functools.partial(distill_loss, stage=stage, teacher=None, amp=device != "cpu")
    output.mkdir()
    figures = run_stage(
        model, stage, loss, windows, title="finetune", folder=output / "stages", log=output / "log.jsonl",
        device=device, seed=seed,
    )  # fmt: skip
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    click.echo(json.dumps({"stages": [figures]}))


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table: ratios to the teacher's figures, `off` to the model's own without its linear branch."""
    models = found["eval"]["printed"]["baselines"]
    own, teacher, off = models[found["subject"]], models["teacher"], models.get("linear-off")
    tokens = sum(stage["tokens"] for stage in found["distill"]["printed"]["stages"]) / 1e6
    cells = [name, f"{tokens:.1f}", f"{found['distill']['seconds']:.0f}"]
    cells.append("-" if own["kept"] is None else f"{own['kept']:.3f} ± {own['kept_stderr']:.3f}")
    cells += ratios(own, teacher)
    lambada = [task["value"] for model in (own, teacher) for task in model["tasks"] if task["task"] == "lambada_openai"]
    cells.append(f"{lambada[0] / lambada[1]:.3f}" if lambada else "-")
    cells += ratios(off, own) if off and off is not own else ["-", "-"]
    for kind, key in (("recall", "exact"), ("passkey", "accuracy")):
        lengths = zip(own[kind], teacher[kind], strict=True)
        cells.append(", ".join(f"{a['length']}: {a[key]:.2f}/{b[key]:.2f}" for a, b in lengths) or "-")
    return "| " + " | ".join(cells) + " |"


def ratios(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Perplexities of one model over those of another: all positions, and those from 256 on."""
    keys = "perplexity", "far_perplexity"
    return [f"{one['text_perplexity'][key] / other['text_perplexity'][key]:.3f}" for key in keys]


if __name__ == "__main__":
    main()
