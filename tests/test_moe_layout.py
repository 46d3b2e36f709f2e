"""Mixture-of-experts teachers in the hub's layout, one tensor per expert and matrix, which loading fuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from swapattn.conversion import convert
from swapattn.errors import CheckpointError
from swapattn.loading import load
from swapattn.shards import write_trained
from swapattn.verification import verify

HIDDEN, INNER, EXPERTS, LAYERS = 32, 16, 3, 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
# model type -> (its own sizes, path of the block, names of gate, up and down projection of an expert)
KINDS = {
    "mixtral": (
        {"intermediate_size": INNER, "num_local_experts": EXPERTS},
        "block_sparse_moe",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        {"intermediate_size": 24, "moe_intermediate_size": INNER, "num_experts": EXPERTS},
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


def hub_tensors(kind):
    """What a repository of that type holds: names and shapes as on the hub, written down by hand."""
    _, block, (gate, up, down) = KINDS[kind]
    shapes = {"model.embed_tokens.weight": (64, HIDDEN), "lm_head.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        rows = {"q": 32, "k": 16, "v": 16, "o": 32}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (size, HIDDEN) for n, size in rows.items()}
        shapes |= {f"{layer}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        if kind == "qwen3_moe":
            shapes |= {f"{layer}.self_attn.{n}_norm.weight": (8,) for n in "qk"}
        shapes[f"{layer}.{block}.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            expert = f"{layer}.{block}.experts.{e}"
            shapes |= {f"{expert}.{name}.weight": (INNER, HIDDEN) for name in (gate, up)}
            shapes[f"{expert}.{down}.weight"] = (HIDDEN, INNER)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul(0.3).bfloat16() for name, shape in shapes.items()}


def write_teacher(folder, kind, tensors):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": kind, "dtype": "bfloat16", **SIZES, **KINDS[kind][0]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fused(kind, tensors):
    """The same numbers as transformers' fused modules hold them: gate above up, experts stacked."""
    _, block, (gate, up, down) = KINDS[kind]
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    found = {name.replace(f".{block}.gate.", ".mlp.gate."): tensor for name, tensor in found.items()}
    for i in range(LAYERS):
        parts = [f"model.layers.{i}.{block}.experts.{e}" for e in range(EXPERTS)]
        rows = [torch.cat((tensors[f"{p}.{gate}.weight"], tensors[f"{p}.{up}.weight"])) for p in parts]
        found[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(rows)
        found[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack([tensors[f"{p}.{down}.weight"] for p in parts])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_where_it_belongs(tmp_path, kind):
    tensors = hub_tensors(kind)
    teacher = write_teacher(tmp_path / "t", kind, tensors)
    result = convert(teacher, tmp_path / "c", recipe="smoke")
    assert result.kept_parameters == sum(tensor.numel() for tensor in tensors.values())
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (result.path / name).samefile(teacher / name)
    model, _ = load(result.path)
    own = {name: tensor for name, tensor in model.state_dict().items() if ".swap." not in name}
    expected = fused(kind, tensors)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("kind", KINDS)
def test_trained_experts_are_stored_as_they_were(tmp_path, kind):
    tensors = hub_tensors(kind)
    folder = convert(write_teacher(tmp_path / "t", kind, tensors), tmp_path / "c", recipe="smoke").path
    model = load(folder)[0].float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter)
    (tmp_path / "d").mkdir()
    write_trained(tmp_path / "d", folder, model, dict(model.named_parameters()).keys())
    stored = {}
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        stored |= load_file(tmp_path / "d" / file)
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in tensors.items()}
    again, own = fused(kind, stored), dict(model.named_parameters())
    assert all(torch.equal(tensor, own[name].bfloat16()) for name, tensor in again.items())


@pytest.mark.parametrize("what", ["missing", "unexpected"])
@pytest.mark.parametrize("matrix", [0, 2], ids=["gate", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_unexpected_expert_is_an_error(tmp_path, kind, matrix, what):
    _, block, names = KINDS[kind]
    tensors = hub_tensors(kind)
    key = f"model.layers.1.{block}.experts.1.{names[matrix]}.weight"
    if what == "missing":
        del tensors[key]
    else:
        tensors[key.replace("experts.1", f"experts.{EXPERTS}")] = tensors[key].clone()
    with pytest.raises(CheckpointError, match=r"experts") as caught:
        convert(write_teacher(tmp_path / "t", kind, tensors), tmp_path / "c", recipe="smoke")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_missing_or_unexpected_tensor_is_named(tmp_path, change):
    tensors = hub_tensors("mixtral")
    name = "model.layers.0.self_attn.k_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        name = "model.layers.0.self_attn.k_proj.scale"
        tensors[name] = torch.ones(1)
    with pytest.raises(CheckpointError, match=f"1 {change} keys, first {name}"):
        convert(write_teacher(tmp_path / "t", "mixtral", tensors), tmp_path / "c", recipe="smoke")


def test_experts_are_computed_as_in_the_teacher_whichever_was_loaded_first(tmp_path, monkeypatch):
    folder = convert(write_teacher(tmp_path / "t", "mixtral", hub_tensors("mixtral")), tmp_path / "c", recipe="smoke")
    known = "_can_set_experts_implementation_cached_value"  # what an earlier model of the process left
    model, _ = load(folder.path)
    for kind in type(model).__mro__:
        if known in vars(kind):
            monkeypatch.delattr(kind, known)
    model, _ = load(folder.path)
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_a_good_checkpoint_with_experts_passes(tmp_path):
    teacher = write_teacher(tmp_path / "t", "qwen3_moe", hub_tensors("qwen3_moe"))
    folder = convert(teacher, tmp_path / "c", recipe="smoke", overrides=["convert.local={window: 5, sinks: 2}"]).path
    assert verify(folder, reload=False).failed == []
