"""`sample`: what the teacher writes, from what, and that a run that was cut off ends in the same file."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import swapattn
from swapattn import sampling
from swapattn.cli import main
from swapattn.conversion import convert
from swapattn.data import PackedTokens
from swapattn.distillation import distill
from swapattn.errors import RecipeError, UsageError
from swapattn.recipe import parse_recipe
from swapattn.sampling import sample
from swapattn.text import TextSpec

SMALL = {"tokens": 240, "length": 24, "batch": 4, "device": "cpu"}  # 10 texts, the last batch of 2
CHAT = (
    "{% for message in messages %}<pad>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tiny_teacher, tmp_path_factory):
    """The file of a run that nothing disturbed."""
    return sample(tiny_teacher, tmp_path_factory.mktemp("whole") / "s.jsonl", **SMALL).path.read_bytes()


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_of_text_with_a_record_beside_them(tiny_teacher, work, whole):
    result = sample(tiny_teacher, **SMALL)
    assert result.path.name == "tiny-llama-samples.jsonl"
    assert sorted(path.name for path in work.iterdir()) == ["tiny-llama-samples.json", "tiny-llama-samples.jsonl"]
    assert result.path.read_bytes() == whole
    found = texts(result.path)
    assert (len(found), len(set(found))) == (10, 10)
    record = json.loads((work / "tiny-llama-samples.json").read_text())
    assert (record["texts"], record["tokens"], record["seed"]) == (10, 240, 0)
    assert record["tokens_per_second"] > 0
    assert "torch" in record["versions"]
    assert sample(tiny_teacher, "other.jsonl", **SMALL, seed=1).path.read_bytes() != whole


def test_it_is_the_teachers_own_distribution(tiny_llama, tiny_tokenizer, work):
    """Neither its generation_config nor a default of transformers may cut it off; tokens that end a text do not."""
    model = tiny_llama()
    model.generation_config.update(top_k=1, repetition_penalty=9.0, eos_token_id=[0, 5], temperature=0.01)
    model.generation_config.do_sample = True
    model.save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        written = sampling._written
        patch.setattr(sampling, "_written", lambda *args: rows.append(written(*args)) or rows[-1])
        sample(work / "t", "s.jsonl", tokens=3 * 4096, length=3, batch=4096, device="cpu")
    ids = torch.cat(rows)
    assert ids.shape == (4096, 3)
    assert (ids[:, 0] == 0).all(), "the end-of-text token, for there is no other that begins a text"
    with torch.no_grad():
        expected = model(input_ids=ids[:1, :1]).logits[0, -1].softmax(-1)
    found = torch.bincount(ids[:, 1], minlength=320) / 4096
    assert 0.5 * float((found - expected).abs().sum()) < 0.15
    assert len(texts(work / "s.jsonl")) == 4096


def cut_off(teacher, batch, output="s.jsonl", **options):
    """Run into an error in the batch of that number."""
    written, batches = sampling._written, itertools.count(1)

    def failing(*args):
        if next(batches) == batch:
            raise ZeroDivisionError
        return written(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_written", failing)
        with pytest.raises(ZeroDivisionError):
            sample(teacher, output, **SMALL, **options)


@pytest.mark.parametrize("left", ["half a line", "a batch in part", "nothing"])
def test_a_run_that_was_cut_off_goes_on_and_ends_in_the_same_file(tiny_teacher, work, whole, monkeypatch, capsys, left):
    cut_off(tiny_teacher, 3)
    partial = work / ".s.jsonl.run" / "text.jsonl"
    assert sorted(path.name for path in work.iterdir()) == [".s.jsonl.run"]
    assert len(texts(partial)) == 8
    if left == "half a line":
        partial.write_bytes(partial.read_bytes() + b'{"text": "never fin')
    elif left == "a batch in part":
        partial.write_bytes(whole[: whole.index(texts_end(whole, 6)) + 9])
    else:
        partial.unlink()
    written, calls = sampling._written, []
    monkeypatch.setattr(sampling, "_written", lambda *args: calls.append(1) or written(*args))
    result = sample(tiny_teacher, "s.jsonl", **SMALL)
    assert (work / "s.jsonl").read_bytes() == whole
    done = {"half a line": 8, "a batch in part": 4, "nothing": 0}[left]
    assert len(calls) == {8: 1, 4: 2, 0: 3}[done]
    assert result.resumed == done * 24
    assert (f"{done * 24} of 240 tokens are there" in capsys.readouterr().err) == (done > 0)
    assert not (work / ".s.jsonl.run").exists()


def texts_end(content, count):
    """What the line after so many begins with."""
    return content.splitlines(keepends=True)[count]


def test_a_killed_process_leaves_what_the_next_one_finishes(tiny_teacher, work, whole):
    program = (
        "import os, signal, sys, torch\n"
        "from swapattn import sampling\n"
        "written, calls = sampling._written, []\n"
        "def killed(*args):\n"
        "    if calls.append(1) or len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return written(*args)\n"
        "sampling._written = killed\n"
        "sampling.sample(sys.argv[1], 's.jsonl', tokens=240, length=24, batch=4, device='cpu')\n"
    )
    code = subprocess.run([sys.executable, "-c", program, str(tiny_teacher)], cwd=work, capture_output=True).returncode
    assert code == -signal.SIGKILL
    assert os.listdir(work) == [".s.jsonl.run"]
    assert sample(tiny_teacher, "s.jsonl", **SMALL).resumed == 96
    assert (work / "s.jsonl").read_bytes() == whole


def test_an_unfinished_run_of_other_arguments_is_kept_until_told(tiny_teacher):
    cut_off(tiny_teacher, 2)
    with pytest.raises(UsageError, match="unfinished run with other arguments"):
        sample(tiny_teacher, "s.jsonl", **SMALL, temperature=0.5)
    sample(tiny_teacher, "s.jsonl", **SMALL, temperature=0.5, overwrite=True)
    with pytest.raises(UsageError, match="exists: use --overwrite"):
        sample(tiny_teacher, "s.jsonl", **SMALL)


def test_an_unfinished_run_of_other_prompts_is_one_of_other_arguments(tiny_teacher, work):
    (work / "c.jsonl").write_text(
        "".join(json.dumps({"a": f"a b {i} c d", "b": f"e f {i} g h"}) + "\n" for i in range(40))
    )
    options = {"prompt_tokens": 3, "output": "s.jsonl"}
    prompts = [{"files": ["c.jsonl"], "column": column} for column in "ab"]
    cut_off(tiny_teacher, 2, prompts=prompts[0], **options)
    with pytest.raises(UsageError, match="unfinished run with other arguments"):
        sample(tiny_teacher, **SMALL, prompts=prompts[1], **options)
    with (work / "c.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match="unfinished run with other arguments"):
        sample(tiny_teacher, **SMALL, prompts=prompts[0], **options)


def test_two_processes_do_not_write_one_file(tiny_teacher, work):
    other = "import pathlib, sys; from swapattn.exclusive import hold; f = hold(pathlib.Path('.s.jsonl.run')); "
    command = [sys.executable, "-c", other + "print(1, flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=r"another process is at work in .*\.s\.jsonl\.run"):
            sample(tiny_teacher, "s.jsonl", **SMALL)
        process.communicate()
    sample(tiny_teacher, "s.jsonl", **SMALL)
    assert not (work / ".s.jsonl.run").exists()


def test_a_random_token_is_part_of_the_text(tiny_teacher, tiny_tokenizer):
    found = texts(sample(tiny_teacher, "s.jsonl", **{**SMALL, "tokens": 1200}, start="token").path)
    first = [tiny_tokenizer(text)["input_ids"][0] for text in found if text]
    assert len(set(first)) > 25
    assert not any(text.startswith(("<eos>", "<pad>", "\ufffd")) for text in found)


def test_a_chat_template_is_gone_on_from(tiny_llama, tiny_tokenizer, work):
    tiny_llama().save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    with pytest.raises(UsageError, match="no chat template: use --start bos"):
        sample("t", "s.jsonl", **SMALL, start="chat")
    (work / "t" / "chat_template.jinja").write_text(CHAT)
    found = texts(sample("t", "s.jsonl", **SMALL, start="chat").path)
    assert all(text.startswith("<pad>user: ") for text in found)
    assert len(set(found)) == 10


def test_documents_may_be_gone_on_from(tiny_teacher, tiny_tokenizer, work):
    documents = [f"{letter * 3} is a document" for letter in "abcdefg"] + ["short"]
    (work / "p.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    settings = {**SMALL, "prompts": "p.jsonl", "prompt_tokens": 8}
    found = texts(sample(tiny_teacher, "s.jsonl", **settings).path)
    begins = [tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"][:8]) for text in documents[:7]]
    used = [begin for text in found for begin in begins if text.startswith(begin)]
    assert len(used) == 10
    assert set(used[:7]) == set(begins), "every document once before one comes again"
    with pytest.raises(UsageError, match=r"starts from 8 tokens: raise --length \(now 8\)"):
        sample(tiny_teacher, "t.jsonl", **{**settings, "length": 8})


def test_documents_that_are_all_too_short_are_an_error_not_an_endless_loop(tiny_teacher, work, monkeypatch):
    monkeypatch.setattr(sampling, "_PATIENCE", 50)
    (work / "p.txt").write_text("short")
    with pytest.raises(UsageError, match=r"p\.txt: of 50 documents in a row none has more than 20 tokens"):
        sample(tiny_teacher, "s.jsonl", **SMALL, prompts="p.txt", prompt_tokens=20)
    assert [path.name for path in work.iterdir()] == ["p.txt"]


def test_prompts_are_a_text_as_a_recipe_has_it(tiny_teacher, work):
    for letter in "ab":
        (work / f"{letter}.jsonl").write_text(json.dumps({"words": f"{letter * 3} is a document"}))
    mixture = "[{files: [a.jsonl], column: words, weight: 4}, {files: [b.jsonl], column: words}]"
    command = ["sample", str(tiny_teacher), "--tokens", "160", "--length", "16", "--device", "cpu", "-o", "s.jsonl"]
    command += ["--prompts", mixture, "--prompt-tokens", "4"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert sorted(text[0] for text in texts(work / "s.jsonl")) == ["a"] * 8 + ["b"] * 2
    for wrong, words in (("{hub: x, files: [y]}", "say exactly one of"), ("[", "not valid YAML")):
        with pytest.raises(RecipeError, match=f"^prompts: .*{words}"):
            sample(tiny_teacher, "t.jsonl", **SMALL, prompts=wrong)


def test_prompts_begin_as_the_tokenizer_begins_a_text(tiny_llama, opening_tokenizer, work, monkeypatch):
    """The writer sees that token; it is not among those that are asked for, and not part of the text."""
    tiny_llama().save_pretrained(work / "t")
    opening_tokenizer.save_pretrained(work / "t")
    (work / "p.jsonl").write_text("".join(json.dumps({"text": f"{i} abcdefgh"}) + "\n" for i in range(10)))
    seen, written = [], sampling._written
    monkeypatch.setattr(sampling, "_written", lambda model, ids, *rest: seen.extend(ids) or written(model, ids, *rest))
    sample("t", "s.jsonl", **SMALL, prompts="p.jsonl", prompt_tokens=3)
    assert all(len(ids) == 4 and ids[0] == 1 for ids in seen)
    assert all(text[:2] in {f"{i} " for i in range(10)} for text in texts(work / "s.jsonl"))


def test_prompts_do_not_begin_with_what_the_tokenizer_leaves_out(tiny_llama, tiny_tokenizer, work, monkeypatch):
    tiny_llama().save_pretrained(work / "t")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<pad>"
    tokenizer.save_pretrained(work / "t")
    (work / "p.jsonl").write_text(json.dumps({"text": "abcdefgh"}))
    seen, written = [], sampling._written
    monkeypatch.setattr(sampling, "_written", lambda model, ids, *rest: seen.extend(ids) or written(model, ids, *rest))
    sample("t", "s.jsonl", **SMALL, prompts="p.jsonl", prompt_tokens=3)
    assert all(list(ids) == tokenizer("abcdefgh")["input_ids"][:3] for ids in seen)
    assert all(text.startswith(tokenizer.decode(seen[0])) for text in texts(work / "s.jsonl"))


def test_special_tokens_survive_the_way_through_the_file(tiny_llama, tiny_tokenizer, work):
    """A row goes on behind an end of text, which is read back as one token."""
    tiny_llama().save_pretrained(work / "t")
    tiny_tokenizer.save_pretrained(work / "t")
    (work / "t" / "chat_template.jinja").write_text(CHAT)
    sample("t", "s.jsonl", **{**SMALL, "tokens": 4800}, start="chat")
    stream = PackedTokens(TextSpec(files=("s.jsonl",)), tiny_tokenizer, 64).token_lists()
    read = [next(stream) for _ in range(200)]
    assert all(row[0] == 1 for row in read)
    assert any(0 in row[:-1] for row in read)


def test_a_checkpoint_stands_for_its_teacher_and_its_text_is_distilled_on(tiny_teacher, work, capsys):
    spec = parse_recipe({"name": "tiny", "convert": {"local": {"window": 8, "sinks": 2}}})
    made = convert(tiny_teacher, work / "c", recipe=spec)
    assert swapattn.sample(**{**SMALL, "tokens": 960}).teacher == tiny_teacher.resolve()
    assert f"the teacher of {made.path.name}" in capsys.readouterr().err
    align = {"stage": "align", "tokens": 256, "length": 32, "batch": 2, "learning_rate": 1e-2}
    section = {"text": "tiny-llama-samples.jsonl", "stages": [align]}
    result = distill(recipe=parse_recipe({**spec.to_dict(), "distill": section}), device="cpu")
    assert result.text == "tiny-llama-samples.jsonl"


def test_the_command_prints_its_result_and_a_dry_run_writes_nothing(tiny_teacher, work):
    command = ["sample", str(tiny_teacher), "--tokens", "50", "--length", "20", "--device", "cpu", "-o", "s.jsonl"]
    planned = CliRunner().invoke(main, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "would write s.jsonl" in planned.stdout
    assert "3 of 20 tokens, 60 in all, batches of 3" in planned.stdout
    assert not list(work.iterdir())
    done = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (done["texts"], done["tokens"], done["path"], done["start"]) == (3, 60, "s.jsonl", "bos")
    assert len(texts(work / "s.jsonl")) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 5000}, "made for 4096 tokens: lower --length"),
        ({"prompts": "embedded"}, "starts from 32 tokens: raise --length"),
        ({"start": "chat"}, "no chat template: use --start bos"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tiny_teacher, work, change, words):
    with pytest.raises(UsageError, match=words):
        sample(tiny_teacher, dry_run=True, **{**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0}, "temperature above 0"),
        ({"top_p": 1.5}, r"top-p in \(0, 1\]"),
        ({"start": "middle"}, "no start 'middle', there are: bos, token, chat"),
        ({"length": 5000}, "made for 4096 tokens: lower --length"),
        ({"prompts": "nowhere.txt"}, "no file matches nowhere.txt"),
        ({"prompts": "embedded", "start": "bos"}, "both say what a text starts from"),
        ({"output": "s.txt"}, "s.txt: JSON lines are read from .jsonl files, name it s.jsonl"),
        ({"output": "s.jsonl.zst"}, "s.jsonl.zst: JSON lines are read from .jsonl files, name it s.jsonl"),
        ({"output": "notes.jsonl"}, "notes.json exists: use --overwrite"),
        ({"output": "notes.json/s.jsonl"}, "notes.json is no folder"),
    ],
)
def test_requests_that_make_no_sense_are_refused_and_do_not_stand_in_the_way(tiny_teacher, work, whole, change, words):
    (work / "notes.json").write_text("somebody's own")
    with pytest.raises(UsageError, match=words):
        sample(tiny_teacher, **{"output": "s.jsonl", **SMALL, **change})
    assert (work / "notes.json").read_text() == "somebody's own"
    assert sample(tiny_teacher, "s.jsonl", **SMALL).path.read_bytes() == whole
