"""The model card, and uploads to a hub that is not there."""

from __future__ import annotations

import json
import shutil
from typing import ClassVar

import pytest
import yaml

from swapattn import sources
from swapattn.checkpoint import new_record
from swapattn.conversion import convert
from swapattn.errors import SourceError, UsageError
from swapattn.model_card import CARD, model_card, teacher_licence
from swapattn.recipe import load_recipe


class FakeHub:
    """Stands in for huggingface_hub.HfApi and notes what it is asked."""

    logged_in = True
    refuses = False
    uploaded: ClassVar[dict[str, bytes]] = {}

    def __init__(self):
        self.calls = calls

    def whoami(self):
        self.calls.append("whoami")
        if not self.logged_in:
            raise OSError("Token is required")
        return {"name": "me"}

    def create_repo(self, repository, *, exist_ok):
        self.calls.append(("create", repository, exist_ok))
        return f"https://hub/{repository}"

    def create_commit(self, repo_id, operations, *, commit_message):
        if self.refuses:
            raise RuntimeError("403\nForbidden")
        self.calls.append(("upload", repo_id, sorted(operation.path_in_repo for operation in operations)))
        self.uploaded |= {operation.path_in_repo: read(operation) for operation in operations}


def read(operation):
    with operation.as_file() as file:
        return file.read()


calls = []


@pytest.fixture
def hub(monkeypatch):
    calls.clear()
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "logged_in", True)
    return calls


def front_matter(folder):
    text = (folder / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_done(tiny_teacher, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    (teacher / CARD).write_text("---\nlicense: mit\n---\n# Teacher\n")
    folder = convert(teacher, tmp_path / "c", recipe="smoke", overrides=["convert.keep_softmax=[0]"]).path
    front, body = front_matter(folder)
    assert front["license"] == "mit"
    assert {"swapattn", "linear-attention", "converted"} <= set(front["tags"])
    assert front["library_name"] == "transformers"
    assert "base_model" not in front, "a local folder has no address on the hub"
    rows = dict(line.strip("| ").split(" | ", 1) for line in body.splitlines() if " | " in line.strip("| "))
    assert rows["layers swapped"] == "1: 1"
    assert rows["layers kept softmax"] == "0"
    assert rows["linear branch"].startswith("hedgehog")
    assert rows["trained"] == "nothing: start values"
    assert "trust_remote_code=True" in body
    assert str(tmp_path) not in (folder / CARD).read_text(), "paths of this machine are nobody's business"


def test_the_card_says_what_became_of_what_the_recipe_left_open(tiny_teacher, tmp_path):
    auto = convert(tiny_teacher, tmp_path / "c", recipe="smoke", overrides=["convert.rope.linear=auto"])
    assert "no RoPE" in front_matter(auto.path)[1]


def test_a_teacher_of_the_hub_is_the_base_model(tiny_teacher, tmp_path):
    origin = {"path": str(tiny_teacher), "hub_id": "a/b", "note": "4-bit", "licence": teacher_licence(tmp_path, None)}
    front, body = front_matter(convert(tiny_teacher, tmp_path / "c", recipe="smoke", origin=origin).path)
    assert front["base_model"] == "a/b"
    assert "license" not in front
    assert "| note on the teacher | 4-bit |" in body


def test_a_distilled_card_says_on_how_much_it_was_trained(tiny_teacher, tmp_path):
    block = {"layers": {"model.layers.0.self_attn": {"layer_idx": 0}}, "spec": {}}
    stages = [{"stage": "align", "tokens": 32768}, {"stage": "distill", "tokens": 8192}]
    record = new_record("distilled", "tiny", load_recipe("smoke"), {"hub_id": None}, stages=stages)
    text = model_card(record, block)
    assert "| trained | align 32,768 tokens, distill 8,192 tokens |" in text
    assert "layers kept softmax" not in text


def test_licences_are_known_or_left_out(tmp_path):
    assert teacher_licence(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct") == "apache-2.0"
    assert teacher_licence(tmp_path, "meta-llama/Llama-3.2-1B") == "llama3.2"
    assert teacher_licence(tmp_path, "huggyllama/llama-7b") is None
    (tmp_path / CARD).write_text("---\n[broken\n---\n")
    assert teacher_licence(tmp_path, None) is None


def test_a_whole_checkpoint_is_uploaded(tiny_teacher, tmp_path, hub):
    folder = convert(tiny_teacher, tmp_path / "c", recipe="smoke", push_to_hub="me/tiny").path
    names = sorted(path.name for path in folder.iterdir())
    assert {"README.md", "config.json", "swapattn.json", "teacher.safetensors", "modeling_swapattn.py"} <= set(names)
    assert hub == ["whoami", ("create", "me/tiny", True), ("upload", "me/tiny", names)]
    assert all(FakeHub.uploaded[name] == (folder / name).read_bytes() for name in names if name != "swapattn.json")
    record, public = (
        json.loads(text) for text in ((folder / "swapattn.json").read_text(), FakeHub.uploaded["swapattn.json"])
    )
    assert record["teacher"]["path"] == str(tiny_teacher), "here it is what finds the teacher again"
    assert public["teacher"]["path"] == tiny_teacher.name
    assert str(tmp_path) not in json.dumps(public)
    assert str(tiny_teacher) not in json.dumps(public)
    assert record["teacher"]["relative"] not in json.dumps(public), "whoever loads it has other folders around it"
    assert public["recipe"] == record["recipe"]


@pytest.mark.parametrize("problem", ["no hub", "no login", "no name"])
def test_what_cannot_be_pushed_is_not_converted(tiny_teacher, tmp_path, hub, monkeypatch, problem):
    name, error, text = "me/tiny", SourceError, "nobody is logged in.*hf auth login"
    if problem == "no hub":
        monkeypatch.setattr(sources, "hub_reachable", lambda: False)
        text = "cannot be reached"
    elif problem == "no login":
        monkeypatch.setattr(FakeHub, "logged_in", False)
    else:
        name, error, text = "tiny", UsageError, "OWNER/NAME"
    with pytest.raises(error, match=text) as caught:
        convert(tiny_teacher, tmp_path / "c", recipe="smoke", push_to_hub=name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert hub == (["whoami"] if problem == "no login" else [])


def test_a_refused_upload_keeps_the_checkpoint(tiny_teacher, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(FakeHub, "refuses", True)
    with pytest.raises(SourceError, match=r"403 Forbidden; the folder itself is whole"):
        convert(tiny_teacher, tmp_path / "c", recipe="smoke", push_to_hub="me/tiny")
    assert (tmp_path / "c" / "config.json").is_file()
