"""`recipes/measure.py`: the runs that come with it are recipes, and one is carried out to its line of the table."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import yaml

from swapattn.recipe import load_recipe, recipe_folder

MEASURE = recipe_folder() / "measure.py"
FILES = sorted((recipe_folder() / "runs").glob("*.yaml"))
WINDOW = "convert.local={window: 8, sinks: 2, mix: joint}"
EVALS = {"text": ["--tasks", "none", "--perplexity", "HELDOUT", "--branches"]}
STAGE = (
    "{stage: distill, tokens: 512, length: 32, batch: 2, learning_rate: 1.0e-3, train: all, "
    "backbone_learning_rate: 1.0e-3"
)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_run_is_a_recipe_and_an_ablation_has_the_same_tokens(file):
    described = yaml.safe_load(file.read_text())
    recipes = {
        name: load_recipe(run["recipe"], [*described.get("set", ()), *run.get("set", ())])
        for name, run in described["runs"].items()
    }
    if file.stem == "ablation":
        assert len({recipe.to_yaml() for recipe in recipes.values()}) == len(recipes)
        tokens = [sum(stage.tokens for stage in recipe.distill.stages) for recipe in recipes.values()]
        assert max(tokens) < 1.12 * min(tokens)


def test_a_row_takes_its_figures_from_all_evaluations():
    measure = runpy.run_path(str(MEASURE))
    texts = {"perplexity": 12.0, "far": {"perplexity": 11.0}}, {"perplexity": 10.0, "far": {"perplexity": 10.0}}
    shares = {"piqa": (0.9, 0.0), "hellaswag": (1.0, 0.0), "arc_easy": (0.8, 0.0), "lambada_openai": (0.5, 0.04)}
    rows = [
        {"task": task, "student": {"value": 0.3}, "teacher": {"value": 0.6}, "kept": kept, "kept_stderr": error}
        for task, (kept, error) in (shares | {"boolq": (3.0, 9.0)}).items()
    ]
    whole = {"kind": "distilled", "baselines": None, "rows": rows, "probes": None, "text_perplexity": None}
    text = {**whole, "rows": [], "text_perplexity": dict(zip(("student", "teacher"), texts, strict=True))}
    off = {"tasks": [], "text_perplexity": {"perplexity": 18.0, "far_perplexity": 22.0}}
    beside = {**whole, "rows": [], "baselines": {"linear-off": off}}
    found = {name: {"printed": report} for name, report in (("eval a", whole), ("eval b", text), ("eval c", beside))}
    cells = measure["row"]("mine", {}, found).split(" | ")
    assert cells == ["| mine", "0.0", "0", "0.800 ± 0.010", "1.200", "1.100", "0.500", "1.500", "2.000", "-", "- |"]
    rows[0]["kept"] = None  # the mean of three tasks would pass for that of four
    assert measure["row"]("mine", {}, found).split(" | ")[3] == "-"
    probes = {side: {"length": 256, "accuracy": 0.5} for side in ("student", "teacher")}
    whole["probes"] = {"recall": [probes, {"student": {"length": 9000, "accuracy": 0.1}, "teacher": None}]}
    assert measure["row"]("mine", {}, found).split(" | ")[-2] == "256: 0.50/0.50"


@pytest.mark.slow
def test_runs_and_controls_are_measured_once_and_a_failure_is_named(tiny_teacher, tmp_path):
    stages = f"distill.stages=[{STAGE}}}]"
    runs = {
        "converted": {"recipe": "smoke", "set": [WINDOW], "distill": False},
        "plain": {"recipe": "smoke", "set": [WINDOW, stages]},
        "window": {
            "recipe": "smoke",
            "set": [WINDOW, f"distill.stages=[{STAGE}, branch: local}}]"],
            "subject": "linear-off",
        },
        "tuned": {"recipe": "smoke", "set": [WINDOW, stages], "finetune": True},
        "broken": {"recipe": "nonesuch"},
    }
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump({"evals": EVALS, "runs": runs}, sort_keys=False))
    text = tmp_path / "text.txt"
    text.write_text("The old clockmaker wound the tower clock again, and it rang for the rest of the night. " * 100)

    def run(*words):
        command = [sys.executable, MEASURE, "run", tmp_path / "runs.yaml", "-o", tmp_path / "out", "--gpus", ""]
        command += ["--heldout", text, "--teacher", tiny_teacher, *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1
    assert "broken: convert ended with 2" in done.stderr
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in done.stdout.splitlines()[2:]}
    assert list(lines) == ["converted", "plain", "window", "tuned"]
    assert lines["converted"][1:3] == ["0.0", "0"]
    found = json.loads((tmp_path / "out" / "plain.json").read_text())
    report = found["eval text"]["printed"]
    said = {name: (tmp_path / "out" / name / "eval text.err").read_text() for name in ("converted", "plain")}
    assert ["measuring the teacher model" in text for text in said.values()] == [True, False]
    assert lines["plain"][4] == f"{report['text_perplexity']['ratio']:.3f}"
    assert lines["plain"][7] == f"{report['baselines']['linear-off']['text_perplexity']['ratio']:.3f}"
    control = json.loads((tmp_path / "out" / "window.json").read_text())["eval text"]["printed"]["baselines"]
    own, teacher = (control[name]["text_perplexity"]["perplexity"] for name in ("linear-off", "teacher"))
    assert lines["window"][4] == f"{own / teacher:.3f}"
    assert float(lines["tuned"][4]) < 1  # the text's own cross-entropy
    again = run("--only", "plain", "--only", "tuned")
    assert again.returncode == 0
    assert again.stdout.splitlines()[2] == " | ".join(lines["plain"])
    assert json.loads((tmp_path / "out" / "plain.json").read_text()) == found, "it was measured again"


def test_a_figure_that_is_not_finite_and_a_teacher_without_right_answers_have_no_ratio():
    def perplexity(whole):
        return {"perplexity": whole, "far_perplexity": 3.0}

    task = {"task": "lambada_openai", "student": {"value": 0.0}, "teacher": {"value": 0.0}}
    report = {"kind": "distilled", "baselines": None, "rows": [{**task, "kept": None, "kept_stderr": None}]}
    report |= {"text_perplexity": {"student": perplexity(None), "teacher": perplexity(2.0)}, "probes": None}
    line = runpy.run_path(str(MEASURE))["row"]("a", {}, {"eval text": {"printed": report}})
    assert line.split(" | ")[3:7] == ["-", "nan", "1.000", "-"]
