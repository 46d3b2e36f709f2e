"""`distill` from end to end: what it writes, how it goes on after a crash, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import swapattn.distillation
import swapattn.estimate
import swapattn.progress
import swapattn.reporting
import swapattn.stored
import swapattn.training
from swapattn.attention import only_branch, swaps
from swapattn.checkpoint import read
from swapattn.conversion import convert
from swapattn.distillation import distill
from swapattn.environment import umask
from swapattn.errors import CheckpointError, RecipeError, SourceError, SwapattnError, TrainingError, UsageError
from swapattn.loading import load, load_teacher
from swapattn.optimizer import _factor
from swapattn.recipe import parse_recipe
from swapattn.shards import read_weight_map
from swapattn.swap import LightningSwap
from swapattn.verification import verify

CALIBRATE = {"stage": "calibrate", "tokens": 256, "length": 64}
ALIGN = {"stage": "align", "tokens": 256, "length": 32, "batch": 2, "learning_rate": 1e-2}
DISTILL = {"stage": "distill", "tokens": 256, "length": 32, "batch": 2, "learning_rate": 1e-3, "chunk": 20}
EVERYTHING = {**DISTILL, "train": "all", "backbone_learning_rate": 1e-3}


def recipe(*stages, name="tiny", text="embedded", **convert_section):
    convert_section = {"local": {"window": 8, "sinks": 2}, **convert_section}
    return parse_recipe({"name": name, "convert": convert_section, "distill": {"text": text, "stages": list(stages)}})


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def converted(tiny_teacher, work):
    return convert(tiny_teacher, work / "c", recipe=recipe()).path


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def differing(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return {key for key in a if not torch.equal(a[key], b[key])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_stages_from_end_to_end(converted, tiny_teacher, work):
    result = distill(recipe=recipe(CALIBRATE, ALIGN, DISTILL), device="cpu")
    assert result.path.resolve() == work / "tiny-llama-swapattn-tiny"
    assert names(work) == ["c", "tiny-llama-swapattn-tiny"]
    found = read(result.path)
    assert (found.kind, found.name, found.recipe) == ("distilled", "tiny-llama", recipe(CALIBRATE, ALIGN, DISTILL))
    assert found.teacher_path == tiny_teacher.resolve()
    assert found.record["parent"] == {"path": str(converted), "time": read(converted).time}
    assert found.record["taught_by"] is None
    for file in (*converted.glob("*.safetensors"), *result.path.glob("*.safetensors")):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask() or file.stat().st_nlink > 1
    stages = found.record["stages"]
    assert [(stage["stage"], stage["tokens"]) for stage in stages] == [
        ("calibrate", 256),
        ("align", 256),
        ("distill", 256),
    ]
    assert all(stage["seconds"] > 0 and stage["tokens_per_second"] > 0 for stage in stages)
    assert stages[0]["error_after"] <= stages[0]["error_before"]
    assert "hardware" in found.record
    changed = differing(converted, result.path)
    assert changed == set(found.record["trained"])
    assert all(".swap." in name for name in changed)
    log = [json.loads(line) for line in (result.path / "train.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [
        (s, i) for s in ("align", "distill") for i in range(1, 5)
    ]
    assert (result.path / "train.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load(result.path)
    assert len(swaps(model)) == 2
    assert tokenizer is not None
    json.dumps(result.to_dict())
    assert "layer error" in result.to_table()


def test_the_teachers_own_weights_are_trained_where_the_recipe_says_so(converted):
    result = distill(converted, recipe=recipe(EVERYTHING), device="cpu")
    changed = differing(converted, result.path)
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert "model.layers.1.self_attn.swap.out_scale" in changed
    assert changed <= set(read(result.path).record["trained"])


def test_text_files_are_trained_on(converted, work):
    (work / "a.txt").write_text("It is a truth universally acknowledged. " * 50)
    result = distill(converted, recipe=recipe(ALIGN, text=str(work / "a.txt")), device="cpu")
    assert result.text == read(result.path).record["text"] == str(work / "a.txt")


def test_the_text_of_each_stage_is_the_one_that_is_recorded(converted, work):
    (work / "a.txt").write_text("It is a truth universally acknowledged. " * 50)
    own = {**ALIGN, "text": "a.txt", "tokens": 64}
    result = distill(converted, recipe=recipe(own, own), device="cpu")
    assert result.text == read(result.path).record["text"] == "a.txt"
    assert recipe(own, DISTILL, own).distill.describe_text() == "a.txt; embedded"


def test_a_folder_may_have_dollars_in_its_name(converted, work):
    result = distill(converted, recipe=recipe({**ALIGN, "tokens": 64}), output=work / "cost$^$", device="cpu")
    assert (result.path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_a_bf16_checkpoint_stays_bf16(tiny_llama, tiny_tokenizer, work):
    tiny_llama().to(torch.bfloat16).save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    result = distill(folder, recipe=recipe(EVERYTHING), device="cpu")
    dtypes = {".swap." in key: value.dtype for key, value in tensors(result.path).items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_the_newest_undistilled_conversion_is_taken(converted, tiny_teacher, work, capsys):
    newer = convert(tiny_teacher, work / "newer", recipe=recipe()).path
    distill(recipe=recipe(CALIBRATE), device="cpu")
    assert read(work / "tiny-llama-swapattn-tiny").record["parent"]["path"] == str(newer)
    assert "newer" in capsys.readouterr().err
    again = distill(recipe=recipe(CALIBRATE, name="again"), device="cpu")  # not the distilled one, which is newer
    assert read(again.path).record["parent"]["path"] == str(newer)


def test_an_existing_output_is_refused_and_kept(converted, work):
    distill(recipe=recipe(CALIBRATE), device="cpu")
    before = read(work / "tiny-llama-swapattn-tiny").time
    with pytest.raises(UsageError, match="exists: use --overwrite"):
        distill(recipe=recipe(CALIBRATE), device="cpu")
    assert distill(recipe=recipe(CALIBRATE), device="cpu", dry_run=True).stages, "which writes nothing"
    assert read(work / "tiny-llama-swapattn-tiny").time == before
    distill(recipe=recipe(CALIBRATE), device="cpu", overwrite=True)
    assert read(work / "tiny-llama-swapattn-tiny").time > before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("photos", "photos exists and was not written by this command"),
        ("a.jpg", "a.jpg exists and was not written by this command"),
        (".", "is the current directory"),
        ("a.jpg/out", "a.jpg is no folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_trained(converted, work, output, message):
    (work / "photos").mkdir()
    for photo in (work / "a.jpg", work / "photos" / "a.jpg"):
        photo.write_text("mine")
    before = names(work)
    with pytest.raises(UsageError, match=message):
        distill(converted, recipe=recipe(CALIBRATE), output=output, device="cpu", overwrite=True)
    assert names(work) == before


def test_another_convert_section_converts_anew(converted, work, capsys):
    other = recipe(CALIBRATE, name="other", feature_map="elu1", normalizer="rms")
    result = distill(recipe=other, device="cpu")
    fresh = work / "tiny-llama-swapattn-other-converted"
    assert read(fresh).recipe.convert.feature_map == "elu1"
    assert read(fresh).record["teacher"] == read(converted).record["teacher"]
    assert read(result.path).record["parent"]["path"] == str(fresh)
    message = capsys.readouterr().err
    assert "convert.feature_map, convert.normalizer" in message
    assert "converting anew" in message
    time = read(fresh).time
    distill(converted, recipe=other, output=work / "second", device="cpu")
    assert read(fresh).time == time, "a conversion that fits was made again"
    assert "converting anew" not in capsys.readouterr().err


def test_an_override_changes_the_layer_of_the_checkpoint_where_the_recipe_has_none(converted, work, capsys):
    whole = recipe(CALIBRATE, name="bare").to_dict()
    (work / "bare.yaml").write_text(json.dumps({key: whole[key] for key in ("name", "distill")}))
    done = distill(converted, recipe="bare.yaml", overrides=["convert.local.window=5"], device="cpu").path
    assert "in convert.local: converting anew" in capsys.readouterr().err
    have, made = read(converted).recipe.convert.model_dump(), read(done).recipe.convert.model_dump()
    assert made == {**have, "local": {**have["local"], "window": 5}}


def test_overrides_count_on_top_of_the_layer_that_they_change(tiny_teacher, work):
    pure = ["convert.local=null", "convert.decay.half_lives=[3]"]
    start = convert(tiny_teacher, work / "pure", recipe=recipe(CALIBRATE), overrides=pure).path
    (work / "bare.yaml").write_text(json.dumps({"name": "bare", "distill": {"stages": [CALIBRATE]}}))
    done = distill(start, recipe="bare.yaml", overrides=["convert.decay.signed=true"], device="cpu", dry_run=True)
    assert done.dry_run
    window = ["convert.local={window: 8, sinks: 2, mix: joint}", "convert.decay.half_lives=[]"]
    stages = {"name": "own", "convert": {"local": None}, "distill": {"stages": [{**EVERYTHING, "branch": "both"}]}}
    (work / "own.yaml").write_text(json.dumps(stages))
    alone = [*window, "distill.stages.distill.branch=local"]  # makes sense with the window that is set beside it
    assert distill(start, recipe="own.yaml", overrides=alone, device="cpu", dry_run=True).dry_run


def test_align_behind_what_changed_the_weights_is_announced(converted, work, capsys):
    distill(converted, recipe=recipe(ALIGN, EVERYTHING, ALIGN), device="cpu", dry_run=True)
    said = capsys.readouterr()
    assert said.err.count("learns from the model's own softmax attention, which other stages have changed") == 1
    assert "distill.stages.2: learns" in said.err
    distill(converted, recipe=recipe(ALIGN, DISTILL), device="cpu", dry_run=True, teacher=read(converted).teacher_path)
    assert "learns from the model's own" not in capsys.readouterr().err


def test_a_distilled_start_with_another_convert_section_is_refused(converted, work):
    done = distill(recipe=recipe(CALIBRATE), device="cpu").path
    before = names(work)
    with pytest.raises(UsageError, match=r"convert\.feature_map, convert\.normalizer") as caught:
        distill(done, recipe=recipe(CALIBRATE, name="other", feature_map="silu", normalizer="rms"), device="cpu")
    assert caught.value.exit_code == 2
    assert names(work) == before


def test_a_distilled_checkpoint_can_be_distilled_further(converted, work, monkeypatch):
    first = distill(recipe=recipe(EVERYTHING, name="first"), device="cpu").path
    teachers = []
    load_teacher = swapattn.distillation.load_teacher
    monkeypatch.setattr(
        swapattn.distillation, "load_teacher", lambda *args, **kw: teachers.append(args[0]) or load_teacher(*args, **kw)
    )
    second = distill(first, recipe=recipe(DISTILL, name="second"), device="cpu").path
    # the weights beside the swaps were changed: they are not the teacher any more
    assert teachers == [read(first).teacher_path]
    assert set(read(first).record["trained"]) <= set(read(second).record["trained"])
    assert all(".swap." in name for name in differing(first, second))


def test_dry_run_writes_nothing_and_measures_the_stages(converted, work):
    what = recipe(CALIBRATE, ALIGN, DISTILL, EVERYTHING, feature_map="elu1")
    result = distill(recipe=what, device="cpu", dry_run=True)
    assert names(work) == ["c"]
    assert result.dry_run
    stages = json.loads(json.dumps(result.to_dict()))["stages"]
    assert [stage.get("steps") for stage in stages] == [None, 4, 4, 4]
    model, _ = load(converted)
    # without the matrices of the Hedgehog map, which elu1 has not
    new = sum(p.numel() for n, p in model.named_parameters() if n.endswith((".out_scale", ".mix")))
    own = sum(p.numel() for n, p in model.named_parameters() if ".swap." not in n)
    slopes = sum(p.numel() for n, p in model.named_parameters() if n.endswith("log_slope"))
    assert [stage["trainable_parameters"] for stage in stages] == [0, new, new, new + own]
    for stage in stages:
        assert stage["hours"] == pytest.approx(256 / stage["tokens_per_second"] / 3600, rel=1e-2)
        assert stage["measured"]["seconds"] >= 0
    weights = 4 * (new + own + slopes)
    memory = [stage["memory_bytes"] for stage in stages]
    assert memory[0] == weights
    assert weights + 12 * new < memory[1] < memory[2], "activations, then logits"
    assert memory[3] > 2 * weights - 4 * slopes + 12 * (new + own), "a teacher beside it"
    assert stages[1]["measured"] == {"steps": 2, "batch": 2, "length": 32, "seconds": stages[1]["measured"]["seconds"]}
    table = result.to_table()
    assert "would write" in table
    assert "align: measured 2 step(s) of 2 x 32 in " in table
    twice = distill(recipe=recipe(ALIGN, {**ALIGN, "tokens": 300}), device="cpu", dry_run=True)
    assert [stage["tokens"] for stage in twice.stages] == [256, 256], "as many as whole steps take"
    assert [line.split("  ")[0] for line in twice.to_table().splitlines()[1:3]] == ["align 0", "align 1"]


def test_dry_run_measures_a_family_with_dropout(tiny_family, tiny_tokenizer, work):
    tiny_family("gpt2").save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    convert(work / "t", work / "c", recipe=recipe())
    (figures,) = distill(recipe=recipe({**DISTILL, "document_mask": True}), device="cpu", dry_run=True).stages
    assert figures["tokens_per_second"] > 0


def test_dry_run_measures_nothing_that_does_not_fit(converted, monkeypatch):
    monkeypatch.setattr(swapattn.estimate, "_free_bytes", lambda device: 1000)
    result = distill(recipe=recipe(ALIGN), device="cpu", dry_run=True)
    assert result.stages[0]["hours"] is None
    assert result.stages[0]["memory_bytes"] > 1000
    assert "align: not measured" in result.to_table()


def test_what_the_backward_pass_keeps_is_counted_once():
    model = torch.nn.Linear(10, 10)
    kept = swapattn.estimate._Kept(model, lambda m, x: m(x).exp().square().sum())
    kept(model, torch.zeros(7, 10))
    # the input for the matrix; the exponential, for itself and for the square
    assert kept.bytes == 2 * 7 * 10 * 4


def test_requests_that_make_no_sense_are_refused(converted, tiny_teacher, work):
    with pytest.raises(RecipeError, match=r"no distill\.stages"):
        distill(recipe=recipe(), device="cpu")
    with pytest.raises(UsageError, match="no checkpoint folder"):
        distill("nowhere", recipe=recipe(CALIBRATE), device="cpu")
    (work / "empty").mkdir()
    with pytest.raises(UsageError, match="no converted checkpoint"):
        distill(directory=work / "empty", recipe=recipe(CALIBRATE), device="cpu")
    with pytest.raises(UsageError, match="is what the run starts from"):
        distill(converted, recipe=recipe(CALIBRATE), output=converted, device="cpu", overwrite=True)
    with pytest.raises(UsageError, match="no stage of recipe tiny asks a teacher's logits"):
        distill(converted, recipe=recipe(CALIBRATE, ALIGN), device="cpu", teacher=tiny_teacher)
    frozen = {**DISTILL, "learning_rates": {"feature_map": 0, "mix": 0, "scale": 0}}
    with pytest.raises(RecipeError, match=r"distill\.stages\.distill: nothing is trainable"):
        distill(converted, recipe=recipe(CALIBRATE, frozen), device="cpu")
    assert names(work) == ["c", "empty"]
    with pytest.raises(RecipeError, match="align trains the new parameters only"):
        distill(recipe=recipe({**ALIGN, "train": "all", "backbone_learning_rate": 1e-3}), device="cpu")


def test_a_teacher_that_was_moved_is_named(tiny_teacher, work):
    shutil.copytree(tiny_teacher, work / "t")
    convert(work / "t", work / "c", recipe=recipe())
    shutil.move(work / "t", work / "moved")
    with pytest.raises(CheckpointError, match=r"no teacher at .*/t"):
        distill(recipe=recipe(EVERYTHING), device="cpu")
    lora = {**DISTILL, "train": "lora", "backbone_learning_rate": 1e-3}
    with pytest.raises(CheckpointError, match=r"no teacher at .*/t"):  # before the first stage, not after it
        distill(recipe=recipe(lora, DISTILL), device="cpu")
    assert names(work) == ["c", "moved"]
    with pytest.raises(SwapattnError, match=r"/t\b"):
        distill(recipe=recipe(CALIBRATE, feature_map="elu1"), device="cpu")
    found = distill(recipe=recipe(EVERYTHING), device="cpu", teacher=work / "moved")
    assert read(found.path).record["taught_by"]["path"] == str(work / "moved")
    assert f"teacher  {work / 'moved'}" in found.to_table()
    assert "| taught by | moved |" in (found.path / "README.md").read_text()
    distill(recipe=recipe(CALIBRATE, DISTILL, name="own-weights"), device="cpu")


def test_weights_that_are_broken_stop_the_stage_and_leave_no_output(tiny_llama, tiny_tokenizer, work):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data.fill_(torch.nan)
    model.save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    with pytest.raises(TrainingError, match=r"align: the loss is not finite at step 1"):
        distill(folder, recipe=recipe(ALIGN), device="cpu")
    assert not (work / "tiny-llama-swapattn-tiny").exists()
    with pytest.raises(TrainingError, match="not finite"):
        distill(folder, recipe=recipe(CALIBRATE), device="cpu")


class Recorder(TrainerCallback):
    """Stands for TensorBoard's callback, which is made when the stage begins."""

    seen = ()

    def __init__(self):
        self.folder = os.environ["TENSORBOARD_LOGGING_DIR"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # the Trainer adds a summary of its own at the end
            Recorder.seen = (*Recorder.seen, (self.folder, args.run_name, state.global_step, logs))


@pytest.mark.parametrize("late", [False, True])
def test_figures_of_every_step_are_reported(converted, work, monkeypatch, late):
    monkeypatch.setattr(swapattn.reporting, "find_spec", lambda name: name)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    monkeypatch.setattr(swapattn.progress, "immediate", lambda device: not late)
    monkeypatch.setattr(Recorder, "seen", ())
    result = distill(recipe=recipe(ALIGN, DISTILL), device="cpu", output=work / "out", report_to=["tensorboard"])
    assert [row[:3] for row in Recorder.seen] == [
        (str(work / "runs" / "out" / f"stage-{i}"), f"out-stage-{i}", step) for i in range(2) for step in range(1, 5)
    ]
    log = [json.loads(line) for line in (result.path / "train.jsonl").read_text().splitlines()]
    assert [row[3]["loss"] for row in Recorder.seen] == [line["loss"] for line in log]
    assert all(row[3]["grad_norm"] > 0 for row in Recorder.seen)
    align = recipe(ALIGN).distill.stages[0]
    used = [align.learning_rate * _factor(align, step) for step in range(4)]
    assert [row[3]["learning_rate"] for row in Recorder.seen[:4]] == pytest.approx(used)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_tool_that_is_not_installed_is_refused_at_once(converted, monkeypatch):
    monkeypatch.setattr(swapattn.reporting, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed: pip install wandb"):
        distill(recipe=recipe(ALIGN), device="cpu", report_to=["wandb"])
    with pytest.raises(UsageError, match="cannot report to 'paper'; there are: tensorboard, wandb"):
        distill(recipe=recipe(ALIGN), device="cpu", report_to=["paper"])


class Crash(Exception):
    pass


def crash_at(monkeypatch, title, step):
    """Kill the run after a step of a stage, once it was saved; gives the patch to undo."""
    monkeypatch.setattr(swapattn.progress, "SAVE_SECONDS", -1)
    original = swapattn.progress.StageProgress.on_pre_optimizer_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if self.title == title and state.global_step == step:
            raise Crash

    monkeypatch.setattr(swapattn.progress.StageProgress, "on_pre_optimizer_step", on_pre_optimizer_step)


@pytest.mark.parametrize(
    ("title", "step", "done"),
    [("align", 2, 1), pytest.param("distill", 0, 2, marks=pytest.mark.slow), ("distill", 3, 2)],
    ids=str,
)
def test_a_run_that_crashed_ends_as_if_it_had_not(converted, work, monkeypatch, capsys, title, step, done):
    what = recipe(CALIBRATE, ALIGN, EVERYTHING)
    expected = distill(converted, recipe=what, output=work / "whole", device="cpu").path
    crash_at(monkeypatch, title, step)
    with pytest.raises(Crash):
        distill(converted, recipe=what, output=work / "out", device="cpu")
    assert not (work / "out").exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    steps = []
    original = swapattn.progress.StageProgress.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        steps.append((self.title, state.global_step))
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(swapattn.progress.StageProgress, "on_step_end", on_step_end)
    state = json.loads((work / ".out.run" / "run.json").read_text())
    del state["identity"]["convert"]["decay"]["signed"]  # as a version wrote it that did not know the key
    (work / ".out.run" / "run.json").write_text(json.dumps(state))
    capsys.readouterr()
    found = distill(converted, recipe=what, output=work / "out", device="cpu").path
    assert f"resuming {work}/.out.run: {done} stages done" in capsys.readouterr().err
    assert steps[0] == (title, step + 1), "work was done again, or left out"
    assert names(work) == ["c", "out", "whole"]
    for key, value in tensors(expected).items():
        assert torch.allclose(tensors(found)[key], value, rtol=0, atol=1e-6), key


@pytest.mark.parametrize(
    "change", ["recipe", "teacher", *(pytest.param(x, marks=pytest.mark.slow) for x in ("parent", "text"))]
)
def test_another_unfinished_run_is_neither_resumed_nor_dropped(converted, tiny_teacher, work, monkeypatch, change):
    (work / "a.txt").write_text("It is a truth universally acknowledged. " * 50)
    what, start, teacher = recipe(CALIBRATE, ALIGN, DISTILL, text="a.txt"), converted, None
    crash_at(monkeypatch, "align", 1)
    with pytest.raises(Crash):
        distill(converted, recipe=what, output=work / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    if change == "recipe":
        what = recipe({**CALIBRATE, "stretch": 2.0}, ALIGN, DISTILL, text="a.txt")
    elif change == "text":
        (work / "a.txt").write_text("It is a truth universally acknowledged. " * 51)
    elif change == "parent":
        start = convert(tiny_teacher, work / "c", recipe=recipe(), overwrite=True).path
    else:
        teacher = shutil.copytree(tiny_teacher, work / "other")
    said = []
    monkeypatch.setattr(swapattn.distillation, "say", said.append)
    before = (work / ".out.run" / "run.json").read_text()
    with pytest.raises(UsageError, match="unfinished run of another"):
        distill(start, recipe=what, output=work / "out", device="cpu", teacher=teacher)
    assert (work / ".out.run" / "run.json").read_text() == before
    distill(start, recipe=what, output=work / "out", device="cpu", teacher=teacher, overwrite=True)
    assert not any("resuming" in line for line in said)


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stage_with_other_settings_begins_anew_and_those_before_it_are_kept(converted, work, monkeypatch, saved):
    crash_at(monkeypatch, "distill", 1 if saved else 0)
    with pytest.raises(Crash):
        distill(converted, recipe=recipe(CALIBRATE, ALIGN, DISTILL), output=work / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    slower = recipe(CALIBRATE, ALIGN, {**DISTILL, "learning_rate": 1e-4})
    if saved:
        with pytest.raises(UsageError, match=r"distill has begun with other settings .* \(the 2 before it are kept\)"):
            distill(converted, recipe=slower, output=work / "out", device="cpu")
    trained = []
    run_stage = swapattn.distillation.run_stage
    monkeypatch.setattr(
        swapattn.distillation, "run_stage", lambda *a, **kw: trained.append(kw["title"]) or run_stage(*a, **kw)
    )
    found = distill(converted, recipe=slower, output=work / "out", device="cpu", overwrite=saved).path
    assert trained == ["distill"]
    expected = distill(converted, recipe=slower, output=work / "whole", device="cpu").path
    for key, value in tensors(expected).items():
        assert torch.allclose(tensors(found)[key], value, rtol=0, atol=1e-6), key
    log = [json.loads(line) for line in (found / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["stage"] == "distill"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("kept", "saved"), [((CALIBRATE, ALIGN), True), ((CALIBRATE,), False)])
def test_a_stage_that_had_begun_may_be_left_out(converted, work, monkeypatch, capsys, kept, saved):
    crash_at(monkeypatch, "distill", 1)
    if not saved:
        monkeypatch.setattr(swapattn.progress, "SAVE_SECONDS", 300)
    with pytest.raises(Crash):
        distill(converted, recipe=recipe(*kept, DISTILL), output=work / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    found = distill(converted, recipe=recipe(*kept), output=work / "out", device="cpu")
    assert [stage["stage"] for stage in found.stages] == [stage["stage"] for stage in kept]
    assert ("is left out now is dropped" in capsys.readouterr().err) == saved
    assert names(work) == ["c", "out"]
    log = found.path / "train.jsonl"
    steps = [json.loads(line)["stage"] for line in log.read_text().splitlines()] if log.exists() else []
    assert steps == ["align"] * 4 * (ALIGN in kept)
    assert log.exists() == (found.path / "train.png").exists() == (ALIGN in kept)


def test_how_a_stage_is_carried_out_may_change_in_the_middle_of_it(converted, work, monkeypatch, capsys):
    what = recipe(CALIBRATE, EVERYTHING)
    expected = distill(converted, recipe=what, output=work / "whole", device="cpu").path
    crash_at(monkeypatch, "distill", 2)
    with pytest.raises(Crash):
        distill(converted, recipe=what, output=work / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    smaller = recipe(CALIBRATE, {**EVERYTHING, "micro_batch": 1, "gradient_checkpointing": True, "chunk": 7})
    capsys.readouterr()
    found = distill(converted, recipe=smaller, output=work / "out", device="cpu").path
    assert "resuming" in capsys.readouterr().err
    for key, value in tensors(expected).items():
        assert torch.allclose(tensors(found)[key], value, rtol=0, atol=1e-5), key


def test_what_went_wrong_names_the_stage_as_the_recipe_can(converted, work, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    what = recipe(CALIBRATE, ALIGN, EVERYTHING, {**EVERYTHING, "learning_rate": 1e-4})
    original = swapattn.distillation.load_teacher
    calls = []

    def second_time(*arguments, **named):
        calls.append(0)
        return original(*arguments, **named) if len(calls) == 1 else no_memory()

    monkeypatch.setattr(swapattn.distillation, "load_teacher", second_time)
    with pytest.raises(TrainingError, match=r"^distill 3: out of memory; under distill\.stages\.3: lower micro_batch"):
        distill(converted, recipe=what, output=work / "out", device="cpu")
    monkeypatch.setattr(swapattn.distillation, "calibrate_stage", no_memory)
    with pytest.raises(TrainingError, match=r"distill\.stages\.calibrate: lower length \(now 64\)$"):
        distill(converted, recipe=recipe(CALIBRATE), output=work / "other", device="cpu")


def test_an_empty_text_is_named_before_anything_is_trained(converted, work):
    (work / "a.txt").write_text("\n \n")
    with pytest.raises(SourceError, match=r"^distill\.text\.1: the text a\.txt has no words"):
        distill(converted, recipe=recipe(CALIBRATE, ALIGN, text=["embedded", "a.txt"]), device="cpu")


def test_an_error_of_a_process_that_reads_is_told_as_one_line(converted, work, monkeypatch):
    (work / "a.jsonl").write_text('{"text": "It is a truth universally acknowledged."}\n' * 3000 + "oops\n")
    arguments = swapattn.training.TrainingArguments
    monkeypatch.setattr(
        swapattn.training, "TrainingArguments", lambda **kw: arguments(**{**kw, "dataloader_num_workers": 1})
    )
    stage = {**ALIGN, "tokens": 65536, "batch": 64, "length": 128}
    with pytest.raises(SourceError, match=r"^a\.jsonl: line 3001 is not JSON: Expecting value$"):
        distill(converted, recipe=recipe(stage, text="a.jsonl"), device="cpu")


def test_two_processes_do_not_work_in_one_folder(converted, work):
    other = (
        "import fcntl, pathlib, sys; f = pathlib.Path('.out.run'); f.mkdir(); f = (f / 'lock').open('w'); "
        "fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=r"another process is at work in .*\.out\.run"):
            distill(converted, recipe=recipe(CALIBRATE), output=work / "out", device="cpu")
        process.communicate()
    distill(converted, recipe=recipe(CALIBRATE), output=work / "out", device="cpu")
    assert names(work) == ["c", "out"]


def test_a_full_disk_at_the_end_of_a_stage_keeps_those_before_it(converted, work, monkeypatch):
    original = swapattn.distillation.save_file

    def full(state, path):
        if "stage-1" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, path)

    monkeypatch.setattr(swapattn.distillation, "save_file", full)
    with pytest.raises(TrainingError, match=r"^align: the disk of .*\.out\.run is full: free some space and repeat"):
        distill(converted, recipe=recipe(CALIBRATE, ALIGN), output=work / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert len(json.loads((work / ".out.run" / "run.json").read_text())["stages"]) == 1
    distill(converted, recipe=recipe(CALIBRATE, ALIGN), output=work / "out", device="cpu")


def test_a_gpu_that_is_not_there_is_named(converted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device cuda: PyTorch finds no GPU here; say --device cpu"):
        distill(converted, recipe=recipe(CALIBRATE), device="cuda")


def test_a_dry_run_needs_no_hub_and_counts_the_teacher_that_is_named(
    converted, tiny_llama, tiny_tokenizer, work, capsys
):
    what = recipe(EVERYTHING, text={"hub": "nobody/nothing"})
    (small,) = distill(converted, recipe=what, device="cpu", dry_run=True).stages
    assert "distill.text: hub dataset nobody/nothing could not be read" in capsys.readouterr().err
    tiny_llama(num_hidden_layers=6).save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    (large,) = distill(converted, recipe=what, device="cpu", dry_run=True, teacher=work / "t").stages
    model = tiny_llama(num_hidden_layers=6)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tiny_llama().parameters())
    assert large["memory_bytes"] - small["memory_bytes"] == 4 * added
    with pytest.raises(SourceError, match="could not be read"):
        distill(converted, recipe=what, device="cpu")


def test_the_layer_that_was_converted_is_the_one_that_is_distilled(tiny_teacher, work, capsys):
    """What was set by hand at the conversion holds until it is set anew; a recipe of stages alone changes no layer."""
    chosen, what = "convert.keep_softmax=[1]", recipe(ALIGN)
    start = convert(tiny_teacher, work / "c", recipe=what, overrides=[chosen]).path
    found = read(distill(start, recipe=what, device="cpu", output=work / "a").path)
    assert found.recipe.convert.keep_softmax == (1,)
    assert f"{chosen}, as {start} was converted" in capsys.readouterr().err
    assert names(work) == ["a", "c"]
    again = distill(start, recipe=what, overrides=["convert.keep_softmax=[0]"], device="cpu", output=work / "b")
    assert read(again.path).recipe.convert.keep_softmax == (0,)
    other = recipe(ALIGN, name="other", local={"window": 4, "sinks": 2})
    assert read(distill(start, recipe=other, device="cpu", output=work / "d").path).recipe.convert.keep_softmax == ()
    stages = parse_recipe({"name": "stages", "distill": {"stages": [ALIGN]}})
    made = read(distill(start, recipe=stages, overrides=["distill.seed=1"], device="cpu", output=work / "e").path)
    assert made.recipe.convert == read(start).recipe.convert
    further = read(distill(work / "a", recipe=what, device="cpu", output=work / "f").path)
    assert further.recipe.convert.keep_softmax == (1,)
    anew = distill(start, recipe=what, overrides=["convert.keep_softmax=[0]"], device="cpu", output=work / "g").path
    assert read(anew).record["overrides"] == ["convert.keep_softmax=[0]"]
    assert read(anew).record["parent"]["path"] == str(work / "tiny-llama-swapattn-tiny-converted")


def test_stages_that_the_converted_layer_cannot_run_are_refused(tiny_teacher, work):
    convert(tiny_teacher, work / "c", recipe=recipe(local=None))
    alone = parse_recipe({"name": "x", "distill": {"stages": [{**EVERYTHING, "branch": "local"}]}})
    with pytest.raises(RecipeError, match="needs a softmax window"):
        distill(recipe=alone, device="cpu")


def test_a_dry_run_needs_no_teacher_for_its_shape(converted, tiny_teacher, work):
    record = json.loads((converted / "swapattn.json").read_text())
    record["teacher"] |= {"path": str(work / "gone"), "relative": "gone"}
    known = distill(converted, recipe=recipe(ALIGN, EVERYTHING), device="cpu", dry_run=True).stages
    (converted / "swapattn.json").write_text(json.dumps(record))
    what = recipe(ALIGN, EVERYTHING)
    found = distill(converted, recipe=what, device="cpu", dry_run=True, teacher=tiny_teacher).stages
    assert [stage["memory_bytes"] for stage in found] == [stage["memory_bytes"] for stage in known]
    with pytest.raises(CheckpointError, match="gone, which would be converted anew: put it back"):
        distill(converted, recipe=recipe(ALIGN, name="other", local=None), device="cpu")


def test_a_folder_that_moves_with_its_teacher_keeps_it(tiny_teacher, work):
    shutil.copytree(tiny_teacher, work / "here" / "t")
    start = convert(work / "here" / "t", work / "here" / "c", recipe=recipe()).path
    end = distill(start, recipe=recipe(ALIGN), device="cpu", output=work / "here" / "deep" / "d").path
    (work / "here").rename(work / "there")
    for path in (start, end):
        found = read(work / "there" / path.relative_to(work / "here"))
        assert found.teacher_path == work / "there" / "t"
        assert load_teacher(found)[0] is not None
        assert not found.with_teacher(work / "nowhere").teacher_path.exists()


def test_ctrl_c_while_writing_leaves_the_run_to_resume(converted, work, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(swapattn.distillation, "write_trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(converted, recipe=recipe(CALIBRATE, ALIGN), output=work / "out", device="cpu")
    assert names(work) == [".out.run", "c"]
    monkeypatch.undo()
    monkeypatch.chdir(work)
    trained = []
    monkeypatch.setattr(swapattn.distillation, "run_stage", lambda *_, **__: trained.append(1))
    distill(converted, recipe=recipe(CALIBRATE, ALIGN), output=work / "out", device="cpu")
    assert not trained
    assert names(work) == ["c", "out"]


def test_a_tied_matrix_that_is_stored_twice_stays_tied(tiny_llama, tiny_tokenizer, work):
    """Some hub checkpoints store embedding and head of a tied model; both must get the trained values."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    stored = load_file(work / "t" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, work / "t" / "model.safetensors", metadata={"format": "pt"})
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    everything = {**DISTILL, "train": "all", "backbone_learning_rate": 1e-2}
    made = distill(folder, recipe=recipe(everything), output=work / "out", device="cpu").path
    after = tensors(made)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], stored["lm_head.weight"])


def test_an_end_of_text_token_that_the_model_does_not_know_is_named(converted, work):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(converted)
    with pytest.raises(CheckpointError, match="sets texts apart by token 320, and the model knows 320 tokens"):
        distill(converted, recipe=recipe(CALIBRATE), device="cpu")
    assert names(work) == ["c"]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    "wrong",
    [{"learning_rates": {"gates": 1e-3}}, {"train": "lora", "lora": {"targets": ["wq"]}}],
    ids=["learning_rates", "lora"],
)
def test_a_stage_that_comes_again_is_named_by_its_number(converted, wrong, dry_run):
    second = {**DISTILL, "backbone_learning_rate": 1e-3, **wrong}
    with pytest.raises(RecipeError, match=r"^distill\.stages\.1\.(learning_rates\.gates|lora\.targets): "):
        distill(converted, recipe=recipe(DISTILL, second), device="cpu", dry_run=dry_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"teacher": "no-such-folder"}, "^--teacher no-such-folder: no such model folder"),
    ],
)
def test_a_dry_run_checks_the_request(converted, work, changes, message):
    with pytest.raises(SwapattnError, match=message):
        distill(converted, recipe=recipe(CALIBRATE), dry_run=True, **{"device": "cpu", **changes})
    assert not (work / ".out.run").exists()


def test_the_window_alone_is_trained_as_a_control(converted, work, monkeypatch):
    what = recipe({**EVERYTHING, "branch": "local"})
    linear, trained = LightningSwap.linear, []
    with monkeypatch.context() as patch:  # its step is measured without the other branch, too
        patch.setattr(LightningSwap, "linear", lambda *a: trained.append(torch.is_grad_enabled()) or linear(*a))
        assert distill(recipe=what, device="cpu", dry_run=True).stages[0]["hours"] > 0
        assert not any(trained)
    result = distill(recipe=what, device="cpu")
    changed = differing(converted, result.path)
    assert changed
    assert not any(".swap." in name for name in changed)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        teacher = load_teacher(read(converted))[0](input_ids=ids).logits.log_softmax(-1)
    errors = []
    for path in (converted, result.path):
        model, _ = load(path)
        with torch.no_grad(), only_branch(model, "local"):
            found = model(input_ids=ids).logits.log_softmax(-1)
        errors.append(float((teacher.exp() * (teacher - found)).sum(-1).mean()))
    assert errors[1] < errors[0]
    assert result.stages[0]["first_loss"] == pytest.approx(errors[0], rel=0.5)


@pytest.mark.parametrize(
    ("stage", "local", "words"),
    [
        ({**DISTILL, "branch": "local"}, {"window": 8}, "leaves the new parameters out"),
        ({**EVERYTHING, "branch": "local"}, None, "needs a softmax window"),
    ],
)
def test_a_window_alone_that_trains_nothing_is_refused(stage, local, words):
    with pytest.raises(RecipeError, match=words):
        recipe(stage, local=local)


def test_every_option_of_the_layer_is_trained_and_stored(tiny_teacher, work):
    options = {
        "qk_norm": "rms",
        "feature_map": "t2r",
        "decay": {"gate": True, "learnable": True},
        "output_gate": "head",
    }
    mine = recipe(CALIBRATE, ALIGN, DISTILL, keep_softmax=[0], rope={"linear": "drop", "kept": "drop"}, **options)
    converted = convert(tiny_teacher, work / "c", recipe=mine).path
    result = distill(recipe=mine, device="cpu")
    changed = differing(converted, result.path)
    assert changed == set(read(result.path).record["trained"])
    assert {name.removeprefix("model.layers.1.self_attn.swap.") for name in changed} == {
        *("log_slope", "out_scale", "mix", "q_norm.gain", "k_norm.gain", "decay_gate.weight", "decay_gate.bias"),
        *("output_gate.weight", "q_map.weight", "q_map.bias", "k_map.weight", "k_map.bias"),
    }
    model, _ = load(result.path)
    ids = torch.arange(5, 25)[None]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(tokens[0, 20:], model(input_ids=tokens, use_cache=False).logits[0, 19:-1].argmax(-1))


EXTEND = {"stage": "extend", "tokens": 1024, "length": 128, "batch": 2, "chunk": 50}


def mixture(work):
    """Documents of 40 to 120 tokens in one source, of 400 in the other."""
    for name, sizes in (("short", range(40, 120)), ("long", [400] * 30)):
        lines = [json.dumps({"text": " ".join(f"{name} {i}"[-4:] for i in range(size // 4))}) for size in sizes]
        (work / f"{name}.jsonl").write_text("\n".join(lines))
    return [{"files": [str(work / "short.jsonl")], "weight": 3}, str(work / "long.jsonl")]


def test_extend_trains_everything_on_documents_kept_apart(converted, work, monkeypatch):
    seen = []
    original = swapattn.distillation.distill_loss

    def distill_loss(model, ids, **settings):
        seen.append((settings["stage"].stage, settings.get("position_ids")))
        return original(model, ids, **settings)

    monkeypatch.setattr(swapattn.distillation, "distill_loss", distill_loss)
    what = recipe(CALIBRATE, DISTILL, EXTEND, text=mixture(work))
    result = distill(converted, recipe=what, device="cpu")
    record = read(result.path).record
    assert [stage["stage"] for stage in record["stages"]] == ["calibrate", "distill", "extend"]
    assert record["text"] == result.text == f"0.75 {work / 'short.jsonl'} + 0.25 {work / 'long.jsonl'}"
    assert record["recipe"]["distill"]["stages"][2]["losses"]["cross_entropy"] == 0.9
    assert "model.layers.0.mlp.down_proj.weight" in differing(converted, result.path)
    assert all(positions is None for name, positions in seen if name == "distill")
    apart = [positions for name, positions in seen if name == "extend"]
    assert len(apart) == 4
    assert all(int((positions == 0).sum()) >= 2 for positions in apart)
    assert any((positions[:, 1:] == 0).any() for positions in apart)


def test_extend_alone_is_measured_by_a_dry_run_and_runs(converted, work):
    planned = distill(converted, recipe=recipe(EXTEND), device="cpu", dry_run=True)
    assert [(stage["stage"], stage["steps"]) for stage in planned.stages] == [("extend", 4)]
    assert planned.stages[0]["tokens_per_second"] > 0
    assert "extend: measured 2 step(s) of 2 x 128" in planned.to_table()
    assert names(work) == ["c"]
    figures = distill(converted, recipe=recipe(EXTEND), device="cpu").stages
    assert [(stage["stage"], stage["steps"]) for stage in figures] == [("extend", 4)]


def test_a_family_that_cannot_keep_documents_apart_is_refused_before_it_is_trained(tiny_family, tiny_tokenizer, work):
    tiny_family("opt").save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    convert(work / "t", work / "c", recipe=recipe())
    with pytest.raises(SwapattnError, match="'opt' cannot keep the documents of a window apart"):
        distill(recipe=recipe({**ALIGN, "length": 128, "document_mask": True, "tokens": 1024}), device="cpu")


def test_a_window_longer_than_the_teachers_positions_is_told(converted, capsys):
    long = {**ALIGN, "length": 5000, "batch": 1, "tokens": 5000}
    distill(converted, recipe=recipe(long), device="cpu")
    assert "align: windows of 5000 tokens, the teacher was made for 4096" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt"])
def test_a_window_beyond_the_last_position_is_refused(tiny_family, tiny_tokenizer, work, kind, dry_run):
    tiny_family(kind, max_position_embeddings=64, rotary_dim=4).save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    long = {**DISTILL, "length": 65}
    with pytest.raises(RecipeError, match=r"distill.stages.1.length: windows of 65 tokens .* the 64 positions of"):
        distill(folder, recipe=recipe(DISTILL, long), device="cpu", dry_run=dry_run)


def test_stages_may_come_twice_each_with_its_own_text_and_order_of_it(converted, work, monkeypatch):
    streams = []
    original = swapattn.distillation.PackedTokens
    monkeypatch.setattr(
        swapattn.distillation,
        "PackedTokens",
        lambda *args, **kw: streams.append((args[0].describe(), kw["seed"])) or original(*args, **kw),
    )
    own = mixture(work)[1]
    what = recipe(ALIGN, DISTILL, {**ALIGN, "text": own, "tokens": 128}, {**DISTILL, "tokens": 128})
    result = distill(converted, recipe=what, device="cpu")
    assert streams == [("embedded", 0), ("embedded", 1), (own, 2), ("embedded", 3)]
    assert [(stage["stage"], stage["steps"]) for stage in read(result.path).record["stages"]] == [
        *(("align", 4), ("distill", 4), ("align", 2), ("distill", 2)),
    ]
    log = [json.loads(line) for line in (result.path / "train.jsonl").read_text().splitlines()]
    assert [line["run"] for line in log] == [f"stage-{i}" for i, n in enumerate((4, 4, 2, 2)) for _ in range(n)]


@pytest.mark.parametrize("own", [False, True], ids=["of all stages", "of a stage"])
def test_a_text_that_is_not_there_is_named_by_its_key(converted, work, own):
    texts = ["embedded", "nowhere/*.txt"]
    what = recipe(CALIBRATE, {**ALIGN, "text": texts}) if own else recipe(CALIBRATE, ALIGN, text=texts)
    key = "distill.stages.1.text.1" if own else "distill.text.1"
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}: no file matches nowhere/"):
        distill(converted, recipe=what, device="cpu")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_sees_the_windows_that_it_would_have_seen(converted, work, monkeypatch, workers):
    """A mixture, documents kept apart, and processes that tokenise: what is read does not depend on the crash."""
    arguments, original = swapattn.training.TrainingArguments, swapattn.distillation.distill_loss
    seen = []

    def distill_loss(model, ids, **settings):
        seen.append((ids, settings.get("position_ids")))
        return original(model, ids, **settings)

    def watched(patch):
        patch.setattr(
            swapattn.training, "TrainingArguments", lambda **kw: arguments(**{**kw, "dataloader_num_workers": workers})
        )
        patch.setattr(swapattn.distillation, "distill_loss", distill_loss)

    stage = {**DISTILL, "tokens": 1536, "length": 128, "micro_batch": 1, "document_mask": True}
    what = recipe(stage, text=mixture(work))
    watched(monkeypatch)
    distill(converted, recipe=what, output=work / "whole", device="cpu")
    whole = seen.copy()
    assert len(whole) == 12
    assert len({tuple(ids.flatten().tolist()) for ids, _ in whole}) == 12
    seen.clear()
    crash_at(monkeypatch, "distill", 2)
    with pytest.raises(Crash):
        distill(converted, recipe=what, output=work / "out", device="cpu")
    assert len(seen) == 6, "the third step was begun, not ended"
    del seen[4:]
    monkeypatch.undo()
    watched(monkeypatch)
    distill(converted, recipe=what, output=work / "out", device="cpu")
    assert len(seen) == 12
    for (ids, positions), (expected, wanted) in zip(seen, whole, strict=True):
        assert torch.equal(ids, expected)
        assert torch.equal(positions, wanted)


@pytest.mark.parametrize(("kind", "prefix"), [("gpt_neox", ""), ("mixtral", ""), ("gpt2", "transformer.")])
def test_what_is_stored_in_another_form_is_trained_and_stored_so_again(tiny_family, tiny_tokenizer, work, kind, prefix):
    tiny_family(kind).save_pretrained(work / "t")
    stored = load_file(work / "t" / "model.safetensors")  # GPT-2's is that of the base model
    save_file({name.removeprefix(prefix): tensor for name, tensor in stored.items()}, work / "t" / "model.safetensors")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    found = distill(folder, recipe=recipe(EVERYTHING), device="cpu").path
    assert read_weight_map(found) == read_weight_map(folder)
    before, after = (dict(load(path)[0].named_parameters()) for path in (folder, found))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "experts" in name or "lm_head" in name} <= changed
    weights = next(row for row in verify(found, reload=False).rows if row.name == "weights")
    assert weights.passed, weights.detail


def test_a_form_without_a_way_back_is_not_trained(tiny_family, tiny_tokenizer, work, monkeypatch):
    tiny_family("mixtral").save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    monkeypatch.setattr(
        "swapattn.stored.revert_weight_conversion", lambda _, tensors: {n: -t for n, t in tensors.items()}
    )
    with pytest.raises(CheckpointError, match=r"mlp\.gate.* in another form, so it cannot be trained: say train: new"):
        distill(folder, recipe=recipe(EVERYTHING), device="cpu")


def test_a_way_back_that_ends_elsewhere_is_not_taken(tiny_family, tiny_tokenizer, work, monkeypatch):
    tiny_family("mixtral").save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    back = swapattn.stored.revert_weight_conversion
    monkeypatch.setattr(
        "swapattn.stored.revert_weight_conversion",
        lambda *args: {n: t.flip(0) if "experts" in n else t for n, t in back(*args).items()},
    )
    with pytest.raises(CheckpointError, match=r"experts.* in a form that is not found again, so it cannot be trained"):
        distill(folder, recipe=recipe(EVERYTHING), device="cpu")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("kind", "stage", "message"),
    [
        ("opt", {"document_mask": True}, "'opt' cannot keep the documents of a window apart: set document_mask"),
    ],
)
def test_what_a_late_stage_cannot_do_is_said_before_the_first(
    tiny_family, tiny_tokenizer, work, monkeypatch, kind, stage, message, dry_run
):
    """Not after the hours of those before it, and by a dry run too."""
    tiny_family(kind).save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    folder = convert(work / "t", work / "c", recipe=recipe()).path
    for module in (swapattn.distillation, swapattn.estimate):
        monkeypatch.setattr(module, "run_stage", lambda *_, **__: pytest.fail("trained"))
    stages = (DISTILL, {**DISTILL, **stage}) if not dry_run else ({**DISTILL, **stage},)
    with pytest.raises(SwapattnError, match=message):
        distill(folder, recipe=recipe(*stages), device="cpu", dry_run=dry_run)
