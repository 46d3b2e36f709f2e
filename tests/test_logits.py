"""Written logits: what is kept, what a stage makes of it, and what does not fit."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from itertools import islice

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset

import swapattn.data
import swapattn.logits
from swapattn.checkpoint import find, read
from swapattn.cli import main
from swapattn.conversion import convert
from swapattn.data import PackedTokens
from swapattn.distillation import distill
from swapattn.errors import CheckpointError, RecipeError, SwapattnError, UsageError
from swapattn.loading import load_teacher
from swapattn.logits import MANIFEST, LogitWindows, write_logits
from swapattn.losses import Mixture, OutputEmbedding, TopK, divergence, divergence_of_top, linear_loss
from swapattn.recipe import parse_recipe
from swapattn.text import TextSpec

STAGE = {"stage": "distill", "tokens": 256, "length": 32, "batch": 2, "learning_rate": 1e-2, "chunk": 20}
WRITTEN = {**STAGE, "teacher": {"logits": "kept"}}
MIXTURES = [{"forward_kl": 1.0}, {"forward_kl": 0.0, "reverse_kl": 1.0}, {"jsd": 2.0, "beta": 0.3}]


def recipe(*stages, text="embedded", seed=0):
    convert_section = {"local": {"window": 8, "sinks": 2}}
    distill_section = {"text": text, "seed": seed, "stages": list(stages)}
    return parse_recipe({"name": "tiny", "convert": convert_section, "distill": distill_section})


@pytest.fixture
def converted(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return convert(tiny_teacher, tmp_path / "c", recipe=recipe()).path


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]


def logits_of(rows, vocabulary=50, seed=0, scale=3.0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", MIXTURES)
def test_all_tokens_kept_the_divergence_is_the_full_one_and_its_gradient_too(weights):
    mixture, teacher = Mixture(**weights), logits_of(7)
    found = []
    for function, target in ((divergence, teacher), (divergence_of_top, TopK.of(teacher, 50))):
        student = logits_of(7, seed=1).requires_grad_()
        loss = function(student, target, mixture)
        loss.sum().backward()
        found.append((loss.detach(), student.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", MIXTURES)
def test_the_others_are_one_class(weights):
    teacher, student, mixture = logits_of(7), logits_of(7, seed=1), Mixture(**weights)
    top = TopK.of(teacher, 6)
    rows = []
    for logits in (student, teacher):
        p = logits.double().softmax(-1)
        kept = p.gather(-1, top.ids)
        rows.append(torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1).log())
    found = divergence_of_top(student, top, mixture)
    assert torch.allclose(found.double(), divergence(*rows, mixture), rtol=1e-5, atol=1e-6)
    if weights == {"forward_kl": 1.0}:
        assert (found <= divergence(student, teacher, mixture) + 1e-6).all(), "a coarser view tells less apart"
    half = TopK(top.ids.int(), top.log_probs.half(), top.rest)
    assert torch.allclose(divergence_of_top(student, half, mixture), found, rtol=2e-2, atol=1e-3)


def test_a_student_that_is_sure_of_itself_is_pushed_back():
    """Its probability of all other tokens, below what fp32 can tell from 0 in 1 − Σ q_i, and their gradient."""
    teacher = logits_of(1)
    top, found = TopK.of(teacher, 5), []
    student = teacher.clone()
    student[0, [i for i in range(50) if i not in top.ids[0].tolist()]] -= 25.0
    for kind in (torch.float32, torch.float64):
        logits = student.to(kind).clone().requires_grad_()
        precise = TopK(top.ids, top.log_probs.to(kind), top.rest.to(kind))
        loss = divergence_of_top(logits, precise, Mixture()).sum()
        loss.backward()
        found.append((loss.item(), logits.grad.double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-8)
    assert found[0][0] <= divergence(student, teacher, Mixture()).item() + 1e-6
    rest = top.rest.exp().item()
    assert found[0][1].abs().max() > rest / 10
    assert found[0][1][0, (student - teacher)[0] < 0].sum().item() == pytest.approx(-rest, rel=1e-3)


def test_chunked_with_the_head_it_is_the_same():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    top, mixture, labels = TopK.of(logits_of(11), 5), Mixture(cross_entropy=0.5), torch.arange(11)
    plain = divergence_of_top(hidden @ weight.T, top, mixture).mean()
    plain = plain + 0.5 * torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = linear_loss(hidden, OutputEmbedding(weight), mixture, teacher_top=top, labels=labels, chunk=4)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for found, gradient in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_what_is_written_is_what_the_teacher_says_of_the_windows_of_the_stage(converted, tiny_teacher, monkeypatch):
    monkeypatch.setattr(swapattn.logits, "PART_TOKENS", 96)  # three windows a file
    what = recipe({"stage": "calibrate"}, WRITTEN, seed=3)
    (figures,) = write_logits(find(model=converted), what, top=20)
    assert (figures["windows"], figures["tokens"], figures["top"]) == (8, 256, 20)
    manifest = json.loads((converted.parent / "kept" / MANIFEST).read_text())
    assert manifest["seed"] == 4, "that of the second stage"
    assert manifest["teacher"] == str(tiny_teacher.resolve())
    files = sorted((converted.parent / "kept").glob("part-*.arrow"))
    assert [len(Dataset.from_file(str(file))) for file in files] == [3, 3, 2]
    assert figures["bytes"] == sum(file.stat().st_size for file in files)
    model, tokenizer = load_teacher(tiny_teacher)
    windows = [row["input_ids"] for row in islice(PackedTokens(TextSpec(embedded=True), tokenizer, 32, seed=4), 8)]
    rows = list(islice(LogitWindows(converted.parent / "kept"), 10))
    for row, ids in zip(rows, [*windows, *windows[:2]], strict=True):
        assert torch.equal(row["input_ids"], ids)
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0].softmax(-1)
        assert torch.allclose(row["top_log_probs"].float().exp(), p.topk(20).values, rtol=1e-2)
        assert torch.allclose(p.gather(-1, row["top_ids"].long()), p.topk(20).values, rtol=1e-4)
        assert torch.allclose(row["top_rest"].exp(), 1 - p.topk(20).values.sum(-1), atol=1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["documents run on", "documents apart"])
def test_with_all_tokens_kept_a_stage_learns_the_same_without_its_teacher(converted, tmp_path, monkeypatch, apart):
    monkeypatch.setattr(swapattn.data, "SHORTEST", 8)  # so that windows of 32 tokens hold several documents
    text = tmp_path / "short.txt"
    text.write_text("\n\n\n".join(f"Document number {i} is short." for i in range(400)))
    learned = {**STAGE, "train": "all", "backbone_learning_rate": 1e-3, "document_mask": apart, "text": str(text)}
    expected = distill(converted, recipe=recipe(learned), output=tmp_path / "with", device="cpu").path
    offline = recipe({**learned, "teacher": {"logits": "kept"}})
    write_logits(find(model=converted), offline, top=10_000)
    record = json.loads((converted / "swapattn.json").read_text())
    record["teacher"]["path"] = str(tmp_path / "gone")
    (converted / "swapattn.json").write_text(json.dumps(record))
    text.unlink()
    found = distill(converted, recipe=offline, output=tmp_path / "without", device="cpu").path
    assert losses(found) == pytest.approx(losses(expected), rel=2e-2)
    assert read(found).record["logits"][0]["top"] == 320
    rows = islice(LogitWindows(tmp_path / "kept"), 4)
    assert all(("position_ids" in row) == apart and (not apart or (row["position_ids"] == 0).sum() > 1) for row in rows)
    assert losses(found)[-1] < losses(found)[0]


@pytest.mark.parametrize(
    ("stop", "told", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "Error writing bytes"), SwapattnError, r"disk of \S*\.kept\.writing is full: .*logits"),
    ],
)
def test_an_interrupted_call_goes_on_and_a_finished_one_is_left_alone(
    converted, tmp_path, monkeypatch, capsys, stop, told, words
):
    monkeypatch.setattr(swapattn.logits, "PART_TOKENS", 96)
    what = recipe(WRITTEN)
    write_logits(find(model=converted), what, top=5)
    expected = [file.read_bytes() for file in sorted((tmp_path / "kept").glob("part-*"))]
    capsys.readouterr()
    write_logits(find(model=converted), what, top=5)
    assert "is there already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "kept")
    replace, calls = swapattn.logits.os.replace, []

    def killed(source, target):
        if str(target).endswith(".arrow"):
            calls.append(target)
            if len(calls) == 2:
                raise stop
        replace(source, target)

    monkeypatch.setattr(swapattn.logits.os, "replace", killed)
    with pytest.raises(told, match=words):
        write_logits(find(model=converted), what, top=5)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(UsageError, match="unfinished logits of something else"):
        write_logits(find(model=converted), what, top=6)
    write_logits(find(model=converted), what, top=5)
    assert "1 parts done" in capsys.readouterr().err
    assert [file.read_bytes() for file in sorted((tmp_path / "kept").glob("part-*"))] == expected
    assert len(calls) == 2 + 2
    with pytest.raises(UsageError, match="kept holds other logits: use --overwrite"):
        write_logits(find(model=converted), what, top=6)
    write_logits(find(model=converted), what, top=6, overwrite=True)
    assert json.loads((tmp_path / "kept" / MANIFEST).read_text())["top"] == 6


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("photos", "photos exists and was not written by this command"),
        ("a.jpg", "a.jpg exists and was not written by this command"),
        ("a.jpg/kept", "a.jpg is no folder"),
        (".", "is the current directory"),
        ("extension", "extension has version 1.0 of the format"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_logits_are_replaced_and_all_else_refused_at_once(
    converted, tmp_path, monkeypatch, folder, message, overwrite
):
    for file, content in (("photos/a.jpg", "mine"), ("a.jpg", "mine"), (f"extension/{MANIFEST}", '{"version": "1.0"}')):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(swapattn.logits, "load_teacher", lambda *_, **__: pytest.fail("loaded"))
    what = recipe({**WRITTEN, "teacher": {"logits": folder}})
    with pytest.raises(SwapattnError, match=message):
        write_logits(find(model=converted), what, top=5, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_do_not_write_one_folder(converted):
    other = "import pathlib, sys; from swapattn.exclusive import hold; f = hold(pathlib.Path('.kept.writing')); "
    command = [sys.executable, "-c", other + "print(1, flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=r"another process is at work in .*\.kept\.writing"):
            write_logits(find(model=converted), recipe(WRITTEN), top=5)
        process.communicate()


def test_an_empty_folder_is_filled(converted, tmp_path):
    (tmp_path / "kept").mkdir()
    write_logits(find(model=converted), recipe(WRITTEN), top=5)
    assert (tmp_path / "kept" / MANIFEST).is_file()
    assert not (tmp_path / ".kept.writing").exists()


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_named(converted, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"device '?{device}"):
        write_logits(find(model=converted), recipe(WRITTEN), device=device)


def test_a_damaged_part_is_named_before_anything_is_trained(converted, tmp_path):
    what = recipe({"stage": "calibrate"}, WRITTEN)
    write_logits(find(model=converted), what, top=5)
    (part,) = (tmp_path / "kept").glob("part-*")
    whole = part.read_bytes()
    for damaged in (whole[:-100], b""):
        part.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"part-00000\.arrow is damaged \(.*with `swapattn logits --overwrite`"
        ):
            distill(converted, recipe=what, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / ".out.run").exists()


@pytest.mark.parametrize("changed", ["text", "teacher"])
def test_logits_of_a_text_or_teacher_that_has_changed_are_not_taken(
    converted, tiny_teacher, tiny_llama, tmp_path, changed
):
    shutil.copytree(tiny_teacher, tmp_path / "t")
    (tmp_path / "a.txt").write_text("Call me Ishmael. " * 60)
    what = recipe(WRITTEN, text="a.txt")
    write_logits(find(model=converted), what, top=5, teacher=tmp_path / "t")
    if changed == "text":
        (tmp_path / "a.txt").write_text("It is a truth universally acknowledged. " * 60)
    else:
        tiny_llama(seed=1).save_pretrained(tmp_path / "t")
    with pytest.raises(UsageError, match="kept holds other logits"):
        write_logits(find(model=converted), what, top=5, teacher=tmp_path / "t")


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ({"length": 16, "batch": 4}, {}, r"written for another length \(32 there, 16 here\)"),
        ({}, {"seed": 1}, r"another seed \(0 there, 1 here\)"),
        ({}, {"text": {"hub": "a/b"}}, "another text: write them anew"),
        ({"tokens": 1024}, {}, "holds 8 windows, the stage takes 32"),
        ({"teacher": {"logits": "nowhere"}}, {}, "no logits in nowhere: write them first"),
    ],
)
def test_logits_that_do_not_fit_are_refused_at_once(converted, tmp_path, stage, more, message):
    write_logits(find(model=converted), recipe(WRITTEN), top=5)
    with pytest.raises(UsageError, match=message):
        distill(converted, recipe=recipe({**WRITTEN, **stage}, **more), output=tmp_path / "out", device="cpu")
    assert not (tmp_path / ".out.run").exists()
    (tmp_path / "kept" / "part-00000.arrow").unlink()
    with pytest.raises(CheckpointError, match="holds 0 windows, its manifest says 8"):
        LogitWindows(tmp_path / "kept")


def test_a_stage_that_comes_again_is_named_by_its_number(converted, tmp_path):
    write_logits(find(model=converted), recipe(WRITTEN), top=5)
    with pytest.raises(UsageError, match=r"^distill 1: the logits in kept were written for another seed"):
        distill(converted, recipe=recipe(STAGE, WRITTEN), output=tmp_path / "out", device="cpu")


def test_a_window_beyond_the_teachers_last_position_is_refused(converted, tiny_family, tiny_tokenizer, tmp_path):
    tiny_family("gpt2", max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tiny_tokenizer.save_pretrained(tmp_path / "short")
    what = recipe(WRITTEN, {**WRITTEN, "length": 65, "teacher": {"logits": "long"}})
    with pytest.raises(RecipeError, match=r"distill.stages.1.length: windows of 65 tokens .* the 64 positions of"):
        write_logits(find(model=converted), what, top=5, teacher=tmp_path / "short")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": 2.0}, "temperature is 1 with teacher.logits"), ({"losses": {"cross_entropy": 1}}, "of no use")],
)
def test_what_contradicts_itself_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "x", "distill": {"stages": [{**WRITTEN, **values}]}})


def test_a_larger_teacher_of_the_same_tokens_can_be_learnt_from(converted, tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama(seed=1, hidden_size=48, num_hidden_layers=3).save_pretrained(tmp_path / "large")
    tiny_tokenizer.save_pretrained(tmp_path / "large")
    online = {**STAGE, "train": "all", "backbone_learning_rate": 1e-3}
    found = distill(converted, recipe=recipe(online), output=tmp_path / "a", teacher=tmp_path / "large", device="cpu")
    offline = recipe({**online, "teacher": {"logits": "kept"}})
    write_logits(find(model=converted), offline, top=320, teacher=tmp_path / "large")
    other = distill(converted, recipe=offline, output=tmp_path / "b", device="cpu")
    assert losses(other.path) == pytest.approx(losses(found.path), rel=2e-2)
    assert losses(found.path)[0] > 0.5, "it is another model"
    assert all("| taught by | large |" in (made.path / "README.md").read_text() for made in (found, other))


def test_a_teacher_of_other_tokens_is_refused(converted, tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama(vocab_size=330).save_pretrained(tmp_path / "wide")
    with pytest.raises(UsageError, match=r"has 330 logits a token, .* has 320"):
        distill(converted, recipe=recipe(STAGE), teacher=tmp_path / "wide", device="cpu")
    tiny_llama().save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    file.write_text(json.dumps(values))
    for refused in (
        lambda: distill(converted, recipe=recipe(STAGE), teacher=tmp_path / "other", device="cpu"),
        lambda: write_logits(find(model=converted), recipe(WRITTEN), teacher=tmp_path / "other"),
    ):
        with pytest.raises(UsageError, match="has another tokenizer than"):
            refused()


def test_the_command_line(converted, tmp_path):
    (tmp_path / "r.yaml").write_text(recipe(STAGE).to_yaml())
    wanted = ["--recipe", "r.yaml", "--set", "distill.stages.distill.teacher.logits=kept", "--device", "cpu"]
    # in a process of its own, where nothing has made the model type known
    program = [sys.executable, "-c", "from swapattn.cli import main; main()", "logits", *wanted, "--top", "4"]
    answer = subprocess.run([*program, "--dry-run"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (answer.returncode, "custom code" in answer.stdout + answer.stderr) == (0, False), answer.stderr
    assert "kept would write the top 4 of 256 tokens, 0.0 MiB (8 windows for stage distill)" in answer.stdout
    assert not (tmp_path / "kept").exists()
    answer = CliRunner().invoke(main, ["logits", *wanted, "--top", "4", "--json"])
    assert json.loads(answer.stdout)["logits"][0]["tokens"] == 256
    answer = CliRunner().invoke(main, ["distill", *wanted, "--dry-run", "--json"])
    assert json.loads(answer.stdout)["stages"][0]["measured"] is not None
    answer = CliRunner().invoke(main, ["logits", "--recipe", "r.yaml"])
    assert answer.exit_code == 2
    assert "no stage of recipe tiny learns from written logits" in answer.stderr
