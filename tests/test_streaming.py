"""Calibration from the shards, one block in memory at a time, against calibration of the whole model."""

from __future__ import annotations

import pytest
import torch
from every_type import every_type, saved_type
from safetensors.torch import load_file, save_file
from transformers.utils.logging import enable_progress_bar

from swapattn.calibration import CALIBRATED, calibrate_, calibrate_stage
from swapattn.conversion import convert
from swapattn.loading import load_teacher
from swapattn.recipe import ConvertSpec
from swapattn.shards import NEW_SHARD, SINGLE, read_config, read_weight_map
from swapattn.stages import CalibrateStage
from swapattn.streaming import NotStreamableError, streamed_teacher
from swapattn.surgery import apply_, plan

FAMILIES = ["llama", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "opt", "granite", "cohere"]
LOCAL = {"window": 3, "sinks": 2}  # within the sliding windows of the tiny models, so that tokens are left outside
JOINT = {"local": {**LOCAL, "mix": "joint"}, "normalizer": "sum"}
SPEC = ConvertSpec.model_validate({**JOINT, "keep_softmax": (1,), "qk_norm": "rms"})


def data(rows, length=24, seed=3):
    ids = torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row} for row in ids]


def saved(tiny_family, folder, name, dtype=torch.bfloat16, **overrides):
    tiny_family(name, **overrides).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def both(folder, spec=SPEC):
    """The streamed and the loaded teacher, each with the same swaps."""
    planned = plan(read_config(folder), spec)
    whole, _ = load_teacher(folder, dtype=torch.float32)
    apply_(whole, planned)
    return streamed_teacher(folder, planned, read_weight_map(folder)), whole


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_gives_the_numbers_of_the_whole_model(tiny_family, tmp_path, name):
    streamed, whole = both(saved(tiny_family, tmp_path / "t", name))
    stage = CalibrateStage(stage="calibrate", tokens=120, length=24)
    start = {key: value.clone() for key, value in whole.state_dict().items() if ".swap." in key}
    figures = calibrate_stage(streamed, stage, data(5))
    expected = calibrate_stage(whole, stage, data(5))
    assert figures["trained"] == expected["trained"]
    assert figures["distance"] == pytest.approx(expected["distance"], rel=1e-5)
    assert figures["error_after"] == pytest.approx(expected["error_after"], rel=1e-5)
    found, wanted = streamed.state_dict(), whole.state_dict()
    for key in expected["trained"]:
        assert torch.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5), key
        assert not torch.equal(found[key], start[key]), key
    assert {key.partition(".swap.")[2] for key in expected["trained"]} == CALIBRATED


def test_weights_are_there_only_while_their_block_runs(tiny_family, tmp_path):
    streamed, whole = both(saved(tiny_family, tmp_path / "t", "llama"))
    own = [(name, p) for name, p in streamed.named_parameters() if ".swap." not in name]
    seen = []

    def look(*_):
        seen.append({name for name, p in streamed.named_parameters() if not p.is_meta and ".swap." not in name})

    for layer in streamed.model.layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        ids = torch.arange(5, 29)[None]
        assert torch.allclose(streamed(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)
    assert all(p.is_meta for _, p in own)
    assert [{name.split(".")[2] for name in names} for names in seen] == [{"0"}, {"1"}, {"2"}]
    assert all(len(names) == 9 for names in seen)


def test_weights_are_dropped_when_the_run_fails(tiny_family, tmp_path):
    streamed, _ = both(saved(tiny_family, tmp_path / "t", "llama"))

    def fail(*_):
        raise MemoryError

    streamed.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError), torch.no_grad():
        streamed(input_ids=torch.arange(5, 29)[None])
    assert all(p.is_meta for name, p in streamed.named_parameters() if ".swap." not in name)


def test_one_pass_and_two_passes_agree(tiny_family):
    ids = torch.stack([item["input_ids"] for item in data(6)])
    found = []
    for batches in ([ids], list(ids.split(2))):
        model = tiny_family("llama")
        apply_(model, plan(model.config, SPEC))
        calls = []
        model.model.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        calibrate_(model, batches)
        found.append((len(calls), {k: v for k, v in model.state_dict().items() if ".swap." in k}))
    (once, one), (twice, two) = found
    assert (once, twice) == (1, 9)
    assert all(torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-6) for key in one)


def test_what_does_not_run_block_by_block_is_calibrated_as_a_whole(
    tiny_family, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    teacher = saved(tiny_family, tmp_path / "t", "llama")
    tiny_tokenizer.save_pretrained(teacher)
    overrides = ["distill.stages.calibrate.tokens=256", "distill.stages.calibrate.length=64"]

    def converted(name):
        folder = convert(teacher, tmp_path / name, recipe="smoke", overrides=overrides, calibrate=True).path
        return load_file(folder / NEW_SHARD)

    enable_progress_bar()
    wanted = converted("a")
    said = capsys.readouterr().err
    assert "block by block" not in said
    assert "Loading weights" not in said, "a bar for each block"
    monkeypatch.setattr("swapattn.streaming._blocks", lambda *_: {"nowhere": []})
    found = converted("b")
    assert "does not run block by block (LlamaForCausalLM has no attribute `nowhere`)" in capsys.readouterr().err
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5) for key in wanted)


def test_experts_that_are_not_all_there_are_found_out_before_anything_runs(tiny_family, tmp_path):
    folder = tmp_path / "t"
    tiny_family("mixtral", num_local_experts=2, num_experts_per_tok=1).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    for part in ("w1", "w2", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.1.{part}.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(NotStreamableError, match=r"layers\.1\.mlp\.experts\.\w+ is stored as \[1, .*not \[2, "):
        streamed_teacher(folder, plan(read_config(folder), SPEC), read_weight_map(folder))


def test_older_names_without_the_base_model_are_found(tiny_family, tmp_path):
    folder = tmp_path / "t"
    tiny_family("gpt2").save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    save_file(
        {key.removeprefix("transformer."): t for key, t in tensors.items()},
        folder / SINGLE,
        metadata={"format": "pt"},
    )
    streamed, whole = both(folder)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        assert torch.equal(streamed.base_model(ids).last_hidden_state, whole.base_model(ids).last_hidden_state)


def test_gates_and_dropped_rope_are_calibrated_block_by_block_too(tiny_family, tmp_path):
    options = {"decay": {"gate": True}, "output_gate": "head", "rope": {"linear": "drop", "kept": "drop"}}
    spec = ConvertSpec.model_validate({**SPEC.model_dump(), "local": LOCAL, **options})
    streamed, whole = both(saved(tiny_family, tmp_path / "t", "gpt_neox"), spec)
    stage = CalibrateStage(stage="calibrate", tokens=120, length=24)
    figures, expected = (calibrate_stage(model, stage, data(5)) for model in (streamed, whole))
    assert figures["error_after"] == pytest.approx(expected["error_after"], rel=1e-5)
    found, wanted = streamed.state_dict(), whole.state_dict()
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5) for key in expected["trained"])


@pytest.mark.parametrize("kind", every_type("bamba", "qwen3_5_text"))  # a weight of theirs is read beside its module
def test_every_type_runs_block_by_block_as_it_does_whole(tmp_path, kind):
    streamed, whole = both(saved_type(kind, tmp_path / "t"), ConvertSpec())
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        found, wanted = (model.base_model(ids, use_cache=False).last_hidden_state for model in (streamed, whole))
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_nothing_is_computed_with_weights_that_are_not_there(tiny_family, tmp_path):
    streamed, _ = both(saved(tiny_family, tmp_path / "t", "llama"))
    streamed.model.norm.forward = lambda hidden: torch.nn.functional.linear(hidden, streamed.lm_head.weight)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad(), pytest.raises(NotStreamableError, match="weights of another one"):
        streamed.base_model(ids)
    assert torch.ones(1, device="meta").add(1).is_meta  # what runs besides is not watched
