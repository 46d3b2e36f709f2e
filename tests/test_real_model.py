"""The three lines of the README on the real SmolLM2-135M-Instruct, and what must hold for what they make.

Unmarked on purpose: the one real run in the default set. Model and evaluation sets come from wheels, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

# A fifth of the recipe's tokens; `swapattn quickstart` has all.
TOKENS = {"calibrate": 2048, "align": 6144, "distill": 2048}
FEWER = [word for stage, tokens in TOKENS.items() for word in ("--set", f"distill.stages.{stage}.tokens={tokens}")]
LINES = (
    ("convert", "smollm2-135m"),
    ("distill", "--recipe", "smoke", *FEWER),
    ("eval", "--tasks", "hellaswag,piqa", "--limit", "10"),
)
PROMPT = "Once upon a time in a small village there lived an old clockmaker who"
LONG = " ".join([PROMPT] * 10)  # the linear branch has no token before the window of 128 and the sinks are full


class Lines:
    """The directory that the three lines ran in, and what each printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: list[Any] = []
        self.talk: list[str] = []

    def run(self, *words: str) -> None:
        # Without a hub, as on the machine that runs this: the fallbacks to the wheels are part of what is tested.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", "from swapattn.cli import main; main()", *words, "--json"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        self.results.append(json.loads(done.stdout))
        self.talk.append(done.stderr)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    lines = Lines(tmp_path_factory.mktemp("three-lines"))
    for words in LINES:
        lines.run(*words)
    return lines


@pytest.fixture(scope="module")
def distilled(lines: Lines) -> tuple[Any, Any]:
    from swapattn.loading import load

    return load(lines.folder / "smollm2-135m-swapattn-smoke")


def ids_of(tokenizer: Any, text: str = PROMPT) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.timeout(900)
def test_each_line_finds_the_work_of_the_one_before(lines: Lines) -> None:
    converted, distilled, evaluated = lines.results
    assert converted["path"] == "smollm2-135m-swapattn"
    assert "4-bit GGUF, dequantised" in converted["teacher_note"]
    assert Path(distilled["parent"]).name == "smollm2-135m-swapattn"
    assert "checkpoint: smollm2-135m-swapattn (" in lines.talk[1]
    assert Path(evaluated["checkpoint"]).name == distilled["path"] == "smollm2-135m-swapattn-smoke"
    assert "checkpoint: smollm2-135m-swapattn-smoke (" in lines.talk[2]
    assert {row["student"]["task"]: row["student"]["documents"] for row in evaluated["rows"]} == {
        "hellaswag": 10,
        "piqa": 10,
    }


def test_the_distilled_model_beats_window_and_conversion(lines: Lines, distilled: tuple[Any, Any]) -> None:
    from swapattn.attention import only_branch
    from swapattn.checkpoint import read
    from swapattn.data import heldout_windows
    from swapattn.loading import load, load_teacher
    from swapattn.perplexity import heldout_perplexity

    windows = heldout_windows(distilled[1], count=2)
    teacher, _ = load_teacher(read(lines.folder / "smollm2-135m-swapattn"))
    converted, _ = load(lines.folder / "smollm2-135m-swapattn")
    student = heldout_perplexity(distilled[0], windows).value
    with only_branch(converted, "local"):
        window_only = heldout_perplexity(converted, windows).value
    assert student < window_only
    assert student < heldout_perplexity(converted, windows).value
    assert student < 1.35 * heldout_perplexity(teacher, windows).value


def test_greedy_generation_equals_recomputing(distilled: tuple[Any, Any]) -> None:
    model, tokenizer = distilled
    ids = ids_of(tokenizer, LONG)
    assert ids.shape[1] > 132
    out = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    with torch.no_grad():
        logits = model(out[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    logits[..., model.generation_config.eos_token_id] = float("-inf")  # as min_new_tokens does
    assert out.shape[1] == ids.shape[1] + 64
    assert torch.equal(out[:, ids.shape[1] :], logits.argmax(-1))


def test_a_left_padded_row_equals_the_prompt_alone(distilled: tuple[Any, Any]) -> None:
    model, tokenizer = distilled
    tokenizer.padding_side = "left"
    batch = tokenizer([LONG, LONG + PROMPT], return_tensors="pt", padding=True)
    padded = model.generate(**batch, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    alone = model.generate(ids_of(tokenizer, LONG), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert torch.equal(padded[0, -16:], alone[0, -16:])


def test_the_cache_does_not_grow(distilled: tuple[Any, Any]) -> None:
    from swapattn.cost import state_bytes

    model, _ = distilled
    sizes = set()
    with torch.no_grad():
        for count in (16, 1000):
            ids = torch.arange(count)[None] % 1000 + 100
            past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            past = model(ids[:, :1], past_key_values=past, logits_to_keep=1).past_key_values
            sizes.add(state_bytes(past))
    assert len(sizes) == 1


def test_reloading_changes_no_logit(distilled: tuple[Any, Any], tmp_path: Path) -> None:
    from swapattn.loading import load

    model, tokenizer = distilled
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids_of(tokenizer, LONG)).logits, again(ids_of(tokenizer, LONG)).logits)


def test_the_teachers_weights_are_taken_over_bit_for_bit(lines: Lines) -> None:
    from swapattn.checkpoint import read

    converted = lines.folder / "smollm2-135m-swapattn"
    weight_map = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(read(converted).teacher_path / "model.safetensors", framework="pt") as teacher:
        for key in teacher.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            with safe_open(converted / weight_map[key], framework="pt") as shard:
                assert torch.equal(shard.get_tensor(key), teacher.get_tensor(key)), key


@pytest.mark.real
def test_unmodified_lm_eval_loads_the_checkpoint(lines: Lines, tmp_path: Path) -> None:
    """The stock command gives the figures of `swapattn eval`, on documents served from the wheel."""
    from swapattn.evaluation import score
    from swapattn.loading import load
    from swapattn.tasks import carried_data

    folder = lines.folder / "smollm2-135m-swapattn-smoke"
    task = tmp_path / "tasks"
    task.mkdir()
    import lm_eval

    official = Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml"
    documents = carried_data("piqa") / "validation.jsonl"
    (task / "piqa.yaml").write_text(
        f"include: {official}\ntask: piqa_local\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
        f"test_split: null\ndataset_kwargs:\n  data_files:\n    validation: {documents}\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "piqa_local", "--include_path", str(task)]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--device", "cpu", "--limit", "20"]
    command += ["--batch_size", "16", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(report.read_text())["results"]["piqa_local"]
    model, tokenizer = load(folder)
    ours = score(model, tokenizer, ["piqa"], limit=20, data="wheel").get("piqa")
    assert ours is not None
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == (ours.metrics["acc"], ours.metrics["acc_norm"])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    lines.run("quickstart")
    (result,) = lines.results
    assert result["failures"] == []
    assert [row["name"] for row in result["rows"]] == ["teacher", "window only", "converted", "distilled"]
    assert result["seconds"] < 480
