"""A model that comes with Python code of its own: run only where it was allowed, carried along, held to its content."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from swapattn.attention import swaps
from swapattn.cli import main
from swapattn.conversion import convert
from swapattn.errors import CheckpointError, UnsupportedModelError
from swapattn.inspection import inspect_model
from swapattn.loading import load, load_teacher
from swapattn.modeling import RUNTIME
from swapattn.verification import verify

NUMBERS = itertools.count()
IDS = torch.randint(2, 300, (1, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stranger(tiny_teacher, tmp_path):
    """A Llama of another name, defined by three files beside its weights; `ran` appears when one is imported."""
    folder, kind = tmp_path / "stranger", f"stranger{next(NUMBERS)}"
    shutil.copytree(tiny_teacher, folder)
    (folder / "parts.py").write_text("SCALE = 3.0\n")
    (folder / "configuration_stranger.py").write_text(
        f"import pathlib\nfrom transformers import LlamaConfig\n\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n\n\n"
        f"class StrangerConfig(LlamaConfig):\n    model_type = {kind!r}\n"
    )
    (folder / "modeling_stranger.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_stranger import StrangerConfig\n"
        "from .parts import SCALE\n\n\n"
        "class StrangerForCausalLM(LlamaForCausalLM):\n    config_class = StrangerConfig\n\n"
        "    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):\n"
        "        out = super().forward(input_ids, attention_mask, position_ids, **kwargs)\n"
        "        out.logits = out.logits * SCALE\n        return out\n"
    )
    edit_config(
        folder,
        model_type=kind,
        architectures=["StrangerForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_stranger.StrangerConfig",
            "AutoModelForCausalLM": "modeling_stranger.StrangerForCausalLM",
        },
    )
    return folder


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_nothing_runs_unasked(stranger, tmp_path):
    result = CliRunner().invoke(main, ["convert", str(stranger), "-o", str(tmp_path / "c"), "--recipe", "smoke"])
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    for word in ("configuration_stranger.py, modeling_stranger.py, parts.py", "--trust-remote-code", "stranger"):
        assert word in line
    for use in (lambda: inspect_model(stranger), lambda: load_teacher(stranger), lambda: convert(stranger, "x")):
        with pytest.raises(UnsupportedModelError, match="not run unasked"):
            use()
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "c").exists()


def test_allowed_once_it_converts_loads_and_passes(stranger, tiny_teacher, tmp_path):
    folder, plain = tmp_path / "c", tmp_path / "plain"
    planned = convert(stranger, folder, recipe="smoke", trust_remote_code=True, dry_run=True)
    assert planned.plan.base_model_type.startswith("stranger")
    assert not folder.exists()
    options = ["--recipe", "smoke", "--set", "convert.local={window: 5, sinks: 2}"]
    for model, to in ((stranger, folder), (tiny_teacher, plain)):
        result = CliRunner().invoke(main, ["convert", str(model), "-o", str(to), *options])
        assert result.exit_code == 0, result.stderr
    model, _ = load(folder)
    assert len(swaps(model)) == 2
    assert set(inspect_model(stranger).actions) == {"swap"}
    assert torch.allclose(logits(model), 3 * logits(load(plain)[0]), rtol=1e-6, atol=0)
    assert torch.allclose(
        logits(load_teacher(stranger)[0]), 3 * logits(load_teacher(tiny_teacher)[0]), rtol=1e-6, atol=0
    )
    for file in stranger.glob("*.py"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    found = verify(folder)
    assert found.passed, found.to_table()
    assert {row.name for row in found.rows} >= {"reload", "reload, swapattn blocked"}
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}


SWAPATTN = [sys.executable, "-c", "from swapattn.cli import main; main()"]
LOADING = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
import swapattn
from swapattn.vocabulary import tokenizer_of
folder, target, ids = sys.argv[1], sys.argv[2], torch.tensor([eval(sys.argv[3])])
tokenizer_of(Path(folder))  # which `distill --teacher` and `logits` read before any model
model, _ = swapattn.load(folder)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids, use_cache=False).logits.contiguous()}, target)
"""


@pytest.mark.slow
def test_a_checkpoint_for_somebody_else_asks_anew(stranger, tmp_path, monkeypatch):
    """Another user's cache, another process: the checkpoint names its code, and `verify` is where it is allowed."""
    folder = tmp_path / "c"
    convert(stranger, folder, recipe="smoke", trust_remote_code=True)
    expected = logits(load(folder)[0])
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "other"))
    command = [sys.executable, "-c", LOADING, str(folder), str(tmp_path / "found"), str(IDS[0].tolist())]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "not run unasked" in refused.stderr.splitlines()[-1]
    subprocess.run([*SWAPATTN, "verify", str(folder), "--no-reload", "--trust-remote-code"], check=True)
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "found")["logits"], expected)


@pytest.mark.slow
def test_a_changed_file_asks_anew(stranger, tmp_path):
    convert(stranger, tmp_path / "c", recipe="smoke", trust_remote_code=True)
    (stranger / "parts.py").write_text("SCALE = 4.0\n")
    with pytest.raises(UnsupportedModelError, match="differs from that of a model of the same type"):
        convert(stranger, tmp_path / "d", recipe="smoke", trust_remote_code=True)
    command = ["convert", str(stranger), "-o", str(tmp_path / "d")]
    refused = subprocess.run([*SWAPATTN, *command], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "not run unasked" in refused.stderr


def break_it(folder, how):
    model = folder / "modeling_stranger.py"
    if how == "elsewhere":
        edit_config(folder, auto_map={"AutoModelForCausalLM": "someone/else--modeling_stranger.StrangerForCausalLM"})
    elif how == "missing":
        (folder / "parts.py").unlink()
    elif how == "no causal LM":
        edit_config(folder, auto_map={"AutoConfig": "configuration_stranger.StrangerConfig"})
    elif how == "does not import":
        model.write_text("from .configuration_stranger import StrangerConfig\n1 / 0\n")
    elif how == "another type":
        edit_config(folder, model_type=f"unrelated{next(NUMBERS)}")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("elsewhere", "lies in another repository"),
        ("missing", "parts.py is missing"),
        ("no causal LM", "defines no causal LM"),
        ("does not import", "cannot be used .ZeroDivisionError"),
        ("another type", "cannot be used .ValueError"),
    ],
)
def test_code_that_is_of_no_use_is_refused_in_one_line(stranger, tmp_path, how, words):
    break_it(stranger, how)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        convert(stranger, tmp_path / "c", recipe="smoke", trust_remote_code=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_files_of_one_name_are_refused_before_anything_is_left(stranger, tmp_path):
    assert "cache.py" in RUNTIME
    (stranger / "parts.py").rename(stranger / "cache.py")
    text = (stranger / "modeling_stranger.py").read_text()
    (stranger / "modeling_stranger.py").write_text(text.replace(".parts", ".cache"))
    with pytest.raises(CheckpointError, match=r"has a file cache\.py, as has swapattn's own"):
        convert(stranger, tmp_path / "c", recipe="smoke", trust_remote_code=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("named", [5, "modeling_stranger", ["modeling_stranger.StrangerForCausalLM", None]])
def test_an_auto_map_that_names_no_class_is_one_line(stranger, named):
    edit_config(stranger, auto_map={"AutoModelForCausalLM": named})
    with pytest.raises(UnsupportedModelError, match=r"not named as file\.Class"):
        convert(stranger, "x")


def test_a_tokenizer_that_is_code_is_not_run_and_nobody_is_asked(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "t"
    shutil.copytree(tiny_teacher, folder)
    (folder / "tokenization_own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    convert(folder, tmp_path / "c", recipe="smoke")
    shutil.copyfile(folder / "tokenization_own.py", tmp_path / "c" / "tokenization_own.py")
    for read in (lambda: load(tmp_path / "c"), lambda: load_teacher(folder)):
        assert read()[1] is None
        assert "going on without a tokenizer" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        convert(folder, tmp_path / "d", recipe="smoke", calibrate=True)
    assert not (tmp_path / "ran").exists()
