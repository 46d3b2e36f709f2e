"""Branches and baselines are measured as the student is, and compared with it document by document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swapattn import baselines, loading, positions
from swapattn.attention import only_branch
from swapattn.checkpoint import find
from swapattn.cli import main
from swapattn.conversion import convert
from swapattn.errors import UsageError
from swapattn.evaluation import evaluate

HYBRID = ("convert.local.window=8", "convert.local.sinks=2", "convert.keep_softmax=[0]")


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_teacher: Path) -> Path:
    """A conversion of the tiny teacher that keeps its first layer and has a window of 8."""
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return convert(tiny_teacher, tmp_path / "tiny-swapattn", overrides=HYBRID).path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"It is a truth universally acknowledged {i}. " for i in range(150)))
    return path


def test_all_of_the_window_only_teacher_is_on_one_device(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, found = loading.load_teacher, find(student.parent, student)
    monkeypatch.setattr(loading, "load_teacher", lambda *a, **k: (load(*a, **k)[0].to("meta"), None))  # for a GPU
    model, _ = baselines._window_only(found, found.recipe.convert.model_dump())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_one_command_measures_every_branch(student: Path, mirror: Path, text: Path) -> None:
    command = ["eval", "--tasks", "piqa,arc_easy", "--data", str(mirror), "--perplexity", str(text), "--probes", "256"]
    called = CliRunner().invoke(main, [*command, "--branches", "--json"])
    assert called.exit_code == 0, called.stderr
    report = json.loads(called.stdout)
    found = report["baselines"]
    assert list(found) == ["teacher", "converted", "linear-off", "window-off", "window-only"]
    own = found["converted"]
    assert (own["text_perplexity"]["ratio"], own["text_perplexity"]["far_ratio"]) == (1.0, 1.0)
    assert [row["ahead"] for row in own["tasks"]] == [0, 0]
    assert own["text_perplexity"]["perplexity"] == report["text_perplexity"]["student"]["perplexity"]
    assert [row["length"] for row in own["passkey"]] == [256]
    for role, branch in baselines.BRANCHES.items():
        model, tokenizer = loading.load(student)
        with only_branch(model, branch):
            alone = positions.perplexity_of_file(model, tokenizer, text)
        assert found[role]["text_perplexity"]["perplexity"] == pytest.approx(alone["perplexity"])
        assert found[role]["text_perplexity"]["far_perplexity"] == pytest.approx(alone["far"]["perplexity"])
        differences = [
            a - b
            for a, b in zip(
                alone["window_far_nats"], report["text_perplexity"]["student"]["window_far_nats"], strict=True
            )
        ]
        ratio, error = found[role]["text_perplexity"]["far_ratio"], found[role]["text_perplexity"]["far_ratio_stderr"]
        assert ratio == pytest.approx(math.exp(sum(differences) / len(differences)))
        assert error == pytest.approx(ratio * positions.mean_and_error(differences)[1])
        assert found[role]["text_perplexity"]["ratio"] != 1.0
    for word in ("--branches", "--probes 256", f"--perplexity {text}"):
        assert word in report["command"]


def test_an_untrained_student_without_its_linear_branch_is_the_teacher_with_a_window(
    student: Path, mirror: Path, text: Path
) -> None:
    """Kept layers, window and sinks of the baseline are therefore those of the student."""
    found = evaluate(tasks=["piqa"], data=str(mirror), perplexity=text, branches=True).baselines
    assert found is not None
    assert found["linear-off"] == found["window-only"]
    assert found["window-only"]["text_perplexity"]["perplexity"] != found["teacher"]["text_perplexity"]["perplexity"]


@pytest.mark.slow
def test_the_teacher_with_a_window_is_measured_once(
    student: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(tasks=["piqa"], data=str(mirror), branches=True)
    monkeypatch.setattr(baselines, "_window_only", lambda *a, **k: pytest.fail("it was loaded"))
    capsys.readouterr()
    again = evaluate(tasks=["piqa"], data=str(mirror), branches=True)
    assert again.baselines == first.baselines
    assert "the window-only model's results kept from an earlier run: piqa" in capsys.readouterr().err


def test_without_the_teacher_only_the_student_is_measured(
    student: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_teacher", lambda *a, **k: pytest.fail("the teacher was loaded"))
    made = evaluate(tasks=["piqa"], data=str(mirror), branches=True, teacher=False)
    assert made.baselines is not None
    assert list(made.baselines) == ["converted", "linear-off", "window-off"]
    assert made.baselines["linear-off"]["kept"] is None


def test_the_command_repeats_what_was_given(student: Path, mirror: Path) -> None:
    made = evaluate(tasks=["piqa"], data=str(mirror), dtype="bfloat16", limit=2, seed=3, teacher=False, perplexity=True)
    assert made.hardware.endswith("bfloat16")
    assert made.command == (
        f"swapattn eval {student.name} --tasks piqa --data {mirror} --dtype bfloat16 --limit 2 --batch-size 16 "
        "--seed 3 --no-teacher --perplexity"
    )
    for wrong in ("int8", "nonsense", "nn"):
        with pytest.raises(UsageError, match="expected float32, bfloat16"):
            evaluate(tasks=["piqa"], data=str(mirror), dtype=wrong)


def test_without_a_window_there_is_nothing_to_switch_off(
    student: Path, tiny_teacher: Path, mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pure = convert(tiny_teacher, tmp_path / "pure", overrides=["convert.local=null"]).path
    made = evaluate(pure, tasks=["piqa"], data=str(mirror), branches=True, teacher=False)
    assert made.baselines is None
    assert "no window beside its linear branch" in capsys.readouterr().err


def test_other_models_are_set_beside(student: Path, tiny_teacher: Path, mirror: Path, tmp_path: Path) -> None:
    other = convert(tiny_teacher, tmp_path / "other", overrides=["convert.local=null"]).path
    made = evaluate(student, tasks=["piqa"], data=str(mirror), against=[other, tiny_teacher])
    assert made.baselines is not None
    assert list(made.baselines) == ["teacher", "converted", "other", "tiny-llama"]
    assert made.baselines["tiny-llama"]["tasks"] == made.baselines["teacher"]["tasks"]
    row = made.baselines["other"]["tasks"][0]
    assert row["ahead"] == pytest.approx(made.rows[0].student.value - row["value"])
    assert row["significance"]["documents"] == 6
    assert f"--against {other} --against {tiny_teacher}" in made.command


def test_models_that_are_none(student: Path, tmp_path: Path, mirror: Path) -> None:
    (tmp_path / "empty").mkdir()
    names = ("teacher", "window-only")
    for name in names:
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "config.json").write_text("{}")
    taken = [(f"x/{name}", f"is called {name} as well") for name in names]
    for folder, message in (("empty", "no model there"), *taken):
        with pytest.raises(UsageError, match=message):
            evaluate(student, tasks=["piqa"], data=str(mirror), against=[tmp_path / folder])


def test_the_table_has_a_column_for_each() -> None:
    def one(value: float, ratio: float) -> dict[str, Any]:
        test = {"p_value": 0.0002}
        task = {
            "task": "piqa",
            "metric": "acc",
            "value": value,
            "stderr": 0.01,
            "ahead": 0.6 - value,
            "significance": test,
        }
        perplexity = {"perplexity": 40.0 * ratio, "far_perplexity": 30.0, "ratio": ratio, "ratio_stderr": 0.002}
        perplexity |= {"far_ratio": ratio, "far_ratio_stderr": None, "bins": []}
        passkey = [{"length": 256, "accuracy": value, "stderr": 0.05}]
        shares = {"kept": value, "kept_stderr": 0.004}
        return {**shares, "tasks": [task], "text_perplexity": perplexity, "recall": [], "passkey": passkey}

    table = baselines.to_table({"teacher": one(0.7, 0.9), "distilled": one(0.6, 1.0), "linear-off": one(0.25, 1.25)})
    lines = [line.split("  ") for line in table.splitlines()]
    assert [cell.strip() for cell in lines[0] if cell] == [
        "branches and baselines", "teacher", "distilled", "linear branch off"
    ]  # fmt: skip
    for part in ("70.0% ±0.4%", "0.250 ±0.010", "+0.350 p <0.001", "50.00", "1.250 ±0.002", "passkey at 256"):
        assert part in table
    assert "embedded" not in table
    long = {"length": 512, "accuracy": 0.75, "stderr": 0.05}
    further = one(0.6, 1.0)
    further["passkey"] = [long]
    short = baselines.to_table({"teacher": one(0.7, 0.9), "distilled": further})
    found = [line.split()[-4:] for line in short.splitlines() if line.startswith("passkey")]
    assert found == [["256", "0.700", "±0.050", "-"], ["512", "-", "0.750", "±0.050"]]
