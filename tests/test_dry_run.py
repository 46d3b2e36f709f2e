"""`convert --dry-run`: the plan and its figures from config.json alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from swapattn import sources
from swapattn.conversion import convert
from swapattn.errors import SourceError, UsageError
from swapattn.footprint import LENGTHS, kv_bytes
from swapattn.recipe import ConvertSpec
from swapattn.surgery import plan


@pytest.fixture
def config_folder(tiny_teacher, tmp_path):
    """A folder with nothing but the tiny teacher's config."""
    folder = tmp_path / "only-config"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_teacher / "config.json").read_bytes())
    return folder


def test_the_config_alone_gives_what_the_conversion_gives(tiny_teacher, config_folder, tmp_path):
    overrides = ["convert.keep_softmax=[0]"]
    planned = convert(config_folder, recipe="smoke", overrides=overrides, dry_run=True)
    made = convert(tiny_teacher, tmp_path / "c", recipe="smoke", overrides=overrides)
    assert planned.plan == made.plan
    for key in ("kept_parameters", "new_parameters", "new_bytes", "teacher", "converted"):
        assert getattr(planned.footprint, key) == getattr(made.footprint, key), key
    assert planned.footprint.kept_bytes == 4 * planned.kept_parameters
    # headers of the file
    assert 0 < made.footprint.kept_bytes - planned.footprint.kept_bytes < 8192
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "only-config"]


def test_without_dry_run_a_folder_needs_weights(config_folder):
    with pytest.raises(UsageError, match=r"neither model.safetensors nor an index"):
        convert(config_folder, recipe="smoke")


def test_damaged_weights_show_in_a_dry_run(config_folder):
    (config_folder / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(Exception, match="cut short"):
        convert(config_folder, recipe="smoke", dry_run=True)


def test_of_the_hub_only_the_config_is_fetched(config_folder, monkeypatch, tmp_path):
    asked = []

    def download(repository, name, *, local_files_only=False):
        asked.append((repository, name, local_files_only))
        if local_files_only:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not here")
        return str(config_folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched more"))
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    result = convert("somebody/some-model", recipe="smoke", dry_run=True)
    assert asked == [("somebody/some-model", "config.json", True), ("somebody/some-model", "config.json", False)]
    assert result.kept_parameters > 0
    assert result.path.name == "some-model-swapattn"
    monkeypatch.undo()
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(SourceError, match="cannot be reached"):
        convert("somebody/some-model", recipe="smoke", dry_run=True)


def test_a_tied_matrix_counts_once(tiny_family, tmp_path):
    tiny_family("llama", tie_word_embeddings=True).config.save_pretrained(tmp_path / "tied")
    tiny_family("llama").config.save_pretrained(tmp_path / "free")
    tied, free = (convert(tmp_path / n, recipe="smoke", dry_run=True).kept_parameters for n in ("tied", "free"))
    assert free - tied == 320 * 32


@pytest.mark.parametrize("length", [20, 50])
def test_the_memory_of_a_sequence_is_what_a_cache_holds(tiny_family, tmp_path, length):
    model = tiny_family("llama").bfloat16()
    sites = plan(model.config, ConvertSpec())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(length)[None], past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes((*sites.swap, *sites.keep), length) == held


def test_a_sliding_window_bounds_the_cache(tiny_family, tmp_path):
    config = tiny_family("mistral").config  # window 6
    sites = plan(config, ConvertSpec())
    assert kv_bytes(sites.swap, 100_000) == kv_bytes(sites.swap, 6) > kv_bytes(sites.swap, 5)


def test_the_table_says_what_it_would_cost(config_folder):
    result = convert(config_folder, recipe="smoke", overrides=["convert.keep_softmax=[1]"], dry_run=True)
    table = result.to_table()
    lines = {line[:22].strip(): line[22:] for line in table.splitlines()}
    assert lines["layers swapped"].strip() == "1 of 2 (kept softmax: 1)"
    assert lines["memory a sequence"].split() == ["4K", "32K", "128K"]
    # 2 layers of 2 KV heads of 8 numbers, keys and values, two bytes each
    assert lines["teacher's KV cache"].split() == ["0.5", "MiB", "4.0", "MiB", "16.0", "MiB"]
    assert lines["converted"].split()[::2] == ["0.3", "2.0", "8.0"]
    figures = json.loads(json.dumps(result.to_dict()))["memory_bytes"]
    assert figures["4096"]["teacher"] == 4096 * 2 * 2 * 2 * 8 * 2
    grown = [figures[str(length)]["converted"] - result.plan.state_bytes() for length in LENGTHS]
    assert grown == [length * 2 * 2 * 8 * 2 for length in LENGTHS]
