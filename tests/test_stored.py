"""Everything that is trained is found again by who loads the checkpoint, in whatever form its family stores it."""

from __future__ import annotations

import json

import pytest
import torch
from every_type import every_type, saved_type, tiny_model
from safetensors.torch import load_file, save_file

from swapattn.conversion import convert
from swapattn.errors import CheckpointError
from swapattn.loading import load
from swapattn.recipe import ConvertSpec
from swapattn.shards import read_weight_map, write_trained
from swapattn.stored import check_way_back, trained_tensors
from swapattn.streaming import NotStreamableError, streamed_teacher
from swapattn.surgery import plan


@pytest.mark.parametrize("kind", every_type("llama", "gpt_neox", "qwen3_next", "gemma3"))
def test_what_was_trained_is_found_again(kind, tmp_path):
    folder = convert(saved_type(kind, tmp_path / "t"), tmp_path / "c", recipe="smoke").path
    model, weight_map = load(folder)[0].float(), read_weight_map(folder)
    parameters = dict(model.named_parameters())
    check_way_back(folder, weight_map, trained_tensors(folder, weight_map, model, set(parameters)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    (tmp_path / "d").mkdir()
    write_trained(tmp_path / "d", folder, model, set(parameters))
    assert read_weight_map(tmp_path / "d") == weight_map
    again = dict(load(tmp_path / "d")[0].float().named_parameters())
    assert again.keys() == parameters.keys()
    assert all(torch.equal(parameter, again[name]) for name, parameter in parameters.items())


def test_numbers_whose_scale_is_stored_apart_are_neither_trained_nor_streamed(tmp_path):
    teacher = tiny_model("llama").float()
    teacher.save_pretrained(tmp_path / "t")
    shard, settings = tmp_path / "t" / "model.safetensors", tmp_path / "t" / "config.json"
    tensors = load_file(shard)
    for name in [name for name in tensors if name.endswith("proj.weight")]:  # as in the FP8 models of the hub
        scale = tensors[name].abs().max() / 448
        tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.view(1, 1)}
    save_file(tensors, shard, metadata={"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "quantization_config": quantised}))
    folder = convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path
    model, weight_map = load(folder)[0], read_weight_map(folder)
    names = dict(model.named_parameters()).keys()
    new = {name for name in names if ".swap." in name}
    assert trained_tensors(folder, weight_map, model, new).keys() == new
    with pytest.raises(CheckpointError, match=r"down_proj.weight quantised \(F8_E4M3\).*train: new"):
        trained_tensors(folder, weight_map, model, set(names))
    with pytest.raises(NotStreamableError, match="quantised"):
        streamed_teacher(tmp_path / "t", plan(teacher.config, ConvertSpec()), read_weight_map(tmp_path / "t"))
