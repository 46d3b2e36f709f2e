"""`bench train` on a tiny model, and the arithmetic behind the share of peak."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from swapattn.attention import only_branch
from swapattn.cli import main
from swapattn.errors import RecipeError, UsageError
from swapattn.peak import forward_flops, peak_flops, share_of_peak, step_flops
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.surgery import apply_, plan
from swapattn.throughput import measure


def recipe(**distill):
    stage = {"length": 16, "batch": 4, "tokens": 64, "learning_rate": 1e-3}
    stages = [{"stage": "align", **stage}, {"stage": "distill", **stage, **distill}]
    convert = {"local": {"window": 4, "sinks": 1}}
    return parse_recipe({"name": "tiny", "convert": convert, "distill": {"stages": stages}})


@pytest.mark.slow
def test_every_kind_of_step_is_timed_with_the_same_tokens(tiny_teacher):
    found = measure(
        str(tiny_teacher),
        recipe(train="all", backbone_learning_rate=1e-3, micro_batch=2),
        lengths=(16, 32),
        steps=2,
        warmup=1,
        profile=True,
        device="cpu",
    )
    assert [(row["step"], row["batch"], row["length"]) for row in found.rows] == [
        (kind, 64 // length, length) for length in (16, 32) for kind in ("align", "distill", "finetune")
    ]
    for row in found.rows:
        assert row["tokens_per_second"] == pytest.approx(64 / (row["milliseconds"] / 1000), rel=1e-2)
        assert row["share_of_peak"] is None
    assert [row["of_finetune"] for row in found.rows if row["step"] == "finetune"] == [1.0, 1.0]
    assert "aten::mm" in found.kernels["finetune, 4 x 16"]
    assert "4 x 16" in found.to_table()


def test_the_command_prints_one_json_document(tiny_teacher, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(recipe().to_yaml())
    options = ["--length", "16", "--step", "distill", "--steps", "1", "--warmup", "1", "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, ["bench", "train", str(tiny_teacher), "--recipe", str(file), *options])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [row["step"] for row in data["rows"]] == ["distill"]
    assert data["rows"][0]["of_finetune"] is None


def test_a_recipe_without_the_stage_and_an_unknown_model_are_refused(tiny_teacher):
    with pytest.raises(RecipeError, match="has no stage align"):
        measure(str(tiny_teacher), parse_recipe({"name": "none"}), device="cpu")
    with pytest.raises(UsageError, match="unknown model"):
        measure("no-such-model", recipe(), device="cpu")


def test_flops_are_those_of_the_matrices_and_of_attention(tiny_llama):
    model = tiny_llama()
    plain = forward_flops(model, 64)
    # 2 layers, width 32, MLP 64, 4 query heads and 2 KV heads of 8, 320 tokens
    assert plain["matrices"] == 2 * 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)
    assert plain["head"] == 2 * 32 * 320
    assert plain["softmax"] == plain["kept"] == 2 * 4 * 4 * 8 * 32
    apply_(model, plan(model.config, ConvertSpec.model_validate({"keep_softmax": [0], "local": {"window": 6}})))
    swapped = forward_flops(model, 64)
    assert {key: swapped[key] for key in ("matrices", "head", "softmax")} == {
        key: plain[key] for key in ("matrices", "head", "softmax")
    }
    assert swapped["kept"] == plain["softmax"] / 2
    # one swapped layer: Hedgehog matrices, state of 16 x 8 per KV head written and read, 6 + 4 tokens of window
    assert swapped["swap"] == 2 * (4 + 2) * 64 + 2 * 16 * 8 * (4 + 2) + 4 * 4 * 8 * 10
    with only_branch(model, "local"):
        assert forward_flops(model, 64)["swap"] == 4 * 4 * 8 * 10


def test_a_step_counts_each_pass_once_and_each_backward_twice():
    flops = {"matrices": 100.0, "head": 10.0, "softmax": 4.0, "kept": 1.0, "swap": 2.0}
    assert step_flops("align", flops) == 104 + 6
    assert step_flops("finetune", flops) == 3 * 114
    assert step_flops("distill", flops, {"matrices": 50.0, "head": 5.0, "softmax": 1.0}) == 56 + 3 * 113
    assert step_flops("distill", flops, {}) == 3 * 113
    assert step_flops("distill", flops, None) is step_flops("align", None) is None


def test_peaks_are_known_by_name_only():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
    assert share_of_peak(1e5, 1e9, "cpu") is None
    assert share_of_peak(1e5, None, "cuda") is None


def test_the_share_of_peak_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert share_of_peak(1e5, 3.12e8, "cuda") == pytest.approx(0.1)
