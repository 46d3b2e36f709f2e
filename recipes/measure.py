"""Distil and measure several recipes side by side: how the tables of README.md and their JSON are made.

    python recipes/measure.py run recipes/runs/short.yaml -o measured --gpus 0 --lanes 3 --eval-gpus 1 --eval-lanes 3 \
        --text "$(cat recipes/runs/texts/prose.yaml)" --heldout brown.txt.zst

Each run of the file is converted, distilled and evaluated by the three commands, as a user would. The file names what
is set in all runs under `set` and their evaluations under `evals`, a run may have more of its own; HELDOUT stands for
the held-out text. The first run is evaluated before all others, so that these find the teacher's figures where
`swapattn eval` keeps them. What a command printed goes into OUTPUT/NAME.json at once, and what stands there is not done
again. `distill: false` leaves a run as it was converted. Controls: `finetune: true` trains the teacher itself, with
softmax, on the cross-entropy of the same windows; `subject: linear-off` takes the figures of the window alone, for a
run whose distill stage has `branch: local`.
"""

from __future__ import annotations

import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import yaml

SWAPATTN = (sys.executable, "-c", "from swapattn.cli import main; main()")
KEPT = "piqa", "hellaswag", "arc_easy", "lambada_openai"  # the kept share is their mean where all are measured
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
@click.option("--eval-gpus", help="Numbers of the GPUs for evaluations.  [default: those of the runs]")
@click.option("--eval-lanes", default=1, show_default=True, help="Evaluations that share a GPU.")
@click.option("--only", multiple=True, metavar="NAME", help="Of the file's runs only these; repeatable.")
def run(
    file: Path, output: Path, text: str | None, heldout: str, teacher: str, gpus: str, lanes: int,
    eval_gpus: str | None, eval_lanes: int, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Carry out the runs of FILE, print the table; exit code 1 if any failed."""
    output.mkdir(parents=True, exist_ok=True)
    described = yaml.safe_load(file.read_text())
    text = json.dumps(yaml.safe_load(text)) if text else None  # on one line, for the records
    unknown = set(only) - described["runs"].keys()
    if unknown:
        raise click.UsageError(f"{file} has no run {', '.join(sorted(unknown))}")
    chosen = [name for name in described["runs"] if name in only or not only]
    training, evaluating = slots(gpus, lanes), slots(gpus if eval_gpus is None else eval_gpus, eval_lanes)
    first = {name: threading.Event() for name in described["evals"]}  # set when the teacher's figures are there

    def measured(name: str) -> bool:
        options = {**described["runs"][name]}
        options["set"] = [*described.get("set", ()), *options.get("set", ())]
        run = Run(output / name, teacher, text, heldout)
        try:
            checkpoint = run.train(options, training)
            evals = {**described["evals"], **options.get("evals", {})}

            def evaluate(key: str) -> None:
                if name != chosen[0] and key in first:
                    first[key].wait()
                try:
                    run.evaluate(key, checkpoint, evals[key], evaluating)
                finally:
                    if name == chosen[0] and key in first:
                        first[key].set()

            with ThreadPoolExecutor(len(evals)) as each:
                list(each.map(evaluate, evals))
        except Failed as error:
            click.echo(f"{name}: {error}", err=True)
            return False
        finally:
            if name == chosen[0]:
                for event in first.values():
                    event.set()
        click.echo(row(name, options, run.found), err=True)
        return True

    with ThreadPoolExecutor(len(chosen)) as each:  # those that wait for a GPU cost nothing
        succeeded = list(each.map(measured, chosen))
    click.echo("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, whole in zip(chosen, succeeded, strict=True):
        if whole:
            click.echo(row(name, described["runs"][name], json.loads((output / f"{name}.json").read_text())))
    if not all(succeeded):
        raise SystemExit(1)


def slots(gpus: str, lanes: int) -> queue.SimpleQueue[str]:
    """A place for everything that may run at a time; what is taken out is the number of its GPU."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(lanes):
        for gpu in gpus.split(","):
            free.put(gpu)
    return free


class Run:
    """One run: its folder, and what its commands printed, with their words and seconds, by the step's name."""

    def __init__(self, folder: Path, teacher: str, text: str | None, heldout: str) -> None:
        self.folder, self.teacher, self.text, self.heldout = folder, teacher, text, heldout
        self.folder.mkdir(exist_ok=True)
        self.record = folder.with_name(f"{folder.name}.json")
        self.found: dict[str, Any] = json.loads(self.record.read_text()) if self.record.is_file() else {}
        self.lock = threading.Lock()

    def train(self, options: dict[str, Any], free: queue.SimpleQueue[str]) -> list[str]:
        """Convert and distil; the words of `swapattn eval` that name what there is to evaluate."""
        sets = [*options["set"], *([f"distill.text={self.text}"] if self.text else [])]
        recipe = ["--recipe", options["recipe"], *(word for value in sets for word in ("--set", value))]
        converted, trained = str(self.folder / "converted"), str(self.folder / "trained")
        convert = [*SWAPATTN, "convert", self.teacher, "-o", converted, *recipe, "--overwrite", "--json"]
        distill = [*SWAPATTN, "distill", converted, "-o", trained, *recipe, "--overwrite", "--json"]
        tuned = options.get("finetune", False)
        if tuned:
            distill = [sys.executable, __file__, "finetune", converted, trained, *recipe]
        gpu = free.get()
        try:
            self.step("convert", convert, gpu)
            if options.get("distill", True):
                self.step("distill", distill, gpu)
        finally:
            free.put(gpu)
        if tuned:
            return [converted, "--against", trained]
        return [trained if options.get("distill", True) else converted]

    def evaluate(self, name: str, checkpoint: list[str], words: list[str], free: queue.SimpleQueue[str]) -> None:
        """One of the evaluations, with a report of its own."""
        words = [self.heldout if word == "HELDOUT" else word for word in words]
        report = str(self.folder / name / "eval.json")  # two evaluations may be at work at a time
        gpu = free.get()
        try:
            self.step(f"eval {name}", [*SWAPATTN, "eval", *checkpoint, *words, "-o", report, "--json"], gpu)
        finally:
            free.put(gpu)

    def step(self, name: str, command: list[str], gpu: str) -> None:
        """Run one command and keep what it prints, unless that is known; what came of another one is forgotten."""
        told = ["swapattn" if word == SWAPATTN[2] else word for word in command if word not in SWAPATTN[:2]]
        if self.found.get(name, {}).get("command") == told:
            return
        if not name.startswith("eval "):
            before = list(self.found)[: list(self.found).index(name)] if name in self.found else list(self.found)
            self.found = {key: self.found[key] for key in before}
        start = time.monotonic()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        (self.folder / f"{name}.err").write_text(done.stderr)
        if done.returncode:
            raise Failed(f"{name} ended with {done.returncode}: {' '.join(done.stderr.split()[-60:])}")
        with self.lock:
            seconds = round(time.monotonic() - start, 1)
            self.found[name] = {"command": told, "seconds": seconds, "printed": json.loads(done.stdout)}
            scratch = self.record.with_name(f".{self.record.name}")
            scratch.write_text(json.dumps(self.found, indent=1))
            os.replace(scratch, self.record)


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
    output.mkdir(exist_ok=True)  # of an interrupted one
    figures = run_stage(
        model, stage, loss, windows, title="finetune", folder=output / "stages", log=output / "log.jsonl",
        device=device, seed=seed,
    )  # fmt: skip
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    click.echo(json.dumps({"stages": [figures]}))


def row(name: str, options: dict[str, Any], found: dict[str, Any]) -> str:
    """One line of the table: ratios to the teacher's figures, `off` to the model's own without its linear branch."""
    default = "trained" if options.get("finetune") else "distilled" if options.get("distill", True) else "converted"
    subject = options.get("subject", default)
    reports = [step["printed"] for key, step in found.items() if key.startswith("eval ")]
    own, teacher, off = (figures(reports, role) for role in (subject, "teacher", "linear-off"))
    distill = found.get("distill", {"seconds": 0, "printed": {"stages": []}})
    tokens = sum(stage["tokens"] for stage in distill["printed"]["stages"]) / 1e6
    cells = [name, f"{tokens:.1f}", f"{distill['seconds']:.0f}"]
    tasks = own["tasks"]
    kept = [tasks[task] for task in (KEPT if set(KEPT) <= tasks.keys() else tasks)]
    if len(kept) != len(KEPT):  # of other tasks those with a share
        kept = [task for task in kept if task[1] is not None]
    elif any(task[1] is None for task in kept):
        kept = []
    error = math.hypot(*(math.nan if one[2] is None else one[2] for one in kept)) / max(len(kept), 1)
    cells.append(f"{statistics.mean(one[1] for one in kept):.3f} ± {error:.3f}" if kept else "-")
    cells += ratios(own, teacher)
    lambada = [model["tasks"].get("lambada_openai") for model in (own, teacher)]
    cells.append(f"{lambada[0][0] / lambada[1][0]:.3f}" if all(lambada) and lambada[1][0] else "-")
    cells += ratios(off, own) if subject != "linear-off" else ["-", "-"]
    for kind in ("recall", "passkey"):
        theirs = {probe["length"]: probe for probe in teacher.get(kind, ())}
        lengths = ((probe, theirs[probe["length"]]) for probe in own.get(kind, ()) if probe["length"] in theirs)
        cells.append(", ".join(f"{a['length']}: {a['accuracy']:.2f}/{b['accuracy']:.2f}" for a, b in lengths) or "-")
    return "| " + " | ".join(cells) + " |"


def figures(reports: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """What several evaluations found on one model; of two figures the first. Tasks: value, kept share and its error."""
    found: dict[str, Any] = {"tasks": {}}
    for report in reports:
        one = (report["baselines"] or {}).get(role)
        side = {"teacher": "teacher", report["kind"]: "student"}.get(role)
        own: dict[str, Any] = {}
        if one is not None:
            own = {key: one.get(key) for key in ("recall", "passkey")}
            tasks = [(task["task"], task["value"], task) for task in one["tasks"]]
            own["perplexity"] = perplexities(one.get("text_perplexity"))
        elif side is not None:
            tasks = [(line["task"], line[side]["value"], line) for line in report["rows"] if line[side]]
            own["perplexity"] = perplexities((report["text_perplexity"] or {}).get(side))
            for kind in ("recall", "passkey"):
                own[kind] = [line[side] for line in (report["probes"] or {}).get(kind, ()) if line.get(side)]
        else:
            continue
        found["tasks"] = {task: (value, of["kept"], of["kept_stderr"]) for task, value, of in tasks} | found["tasks"]
        found = {key: value for key, value in own.items() if value} | found
    return found


def perplexities(text: dict[str, Any] | None) -> list[float]:
    """Of all positions, and of those from 256 on."""
    if not text:
        return []
    far = text["far_perplexity"] if "far_perplexity" in text else (text["far"] or {}).get("perplexity")
    return [text["perplexity"] or math.nan, far or math.nan]  # null: not finite


def ratios(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Perplexities of one model over those of another."""
    if not (one.get("perplexity") and other.get("perplexity")):
        return ["-", "-"]
    return [f"{a / b:.3f}" for a, b in zip(one["perplexity"], other["perplexity"], strict=True)]


if __name__ == "__main__":
    main()
