"""`inspect` finds attention in the graph of any family, and agrees with what conversion finds by running it."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig

from swapattn.cli import common, main
from swapattn.inspection import inspect_config
from swapattn.recipe import load_recipe
from swapattn.surgery import attention_sites

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
OTHERS = {
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6, "head_dim": 8},
    "mixtral": {"num_local_experts": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
    | {"qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "bloom": GPT,
    "gptj": GPT,
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 5},
    "llama4_text": {"num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 5},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "mamba": {},
}


def look(config, *overrides):
    return inspect_config(config, load_recipe("short", overrides))


def config_of(kind, **more):
    return AutoConfig.for_model(kind, **{**SIZES, **OTHERS[kind], **more})


def assert_agrees(config):
    found = look(config)
    assert (found.tracer, found.fallback, found.refusal) == ("torch.export", "", None)
    probed = attention_sites(config)
    assert [site.path for site in found.sites] == [site.path for site in probed]
    for seen, site in zip(found.sites, probed, strict=True):
        shapes = (seen.heads, seen.kv_heads, seen.head_dim, seen.value_dim)
        assert shapes == (site.heads, site.kv_heads, site.head_dim, site.value_dim)
        assert seen.window == site.sliding_window
        assert seen.mask == ("sliding window" if site.sliding_window else "causal")
        assert seen.scale == pytest.approx(site.scaling if site.scaling is not None else site.head_dim**-0.5)
        assert (seen.softcap, seen.sinks, seen.bias) == (site.softcap, site.sinks, False)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gpt2", "opt", "granite"])
def test_the_graph_agrees_with_what_conversion_finds(tiny_family, kind):
    assert_agrees(tiny_family(kind).config)


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "deepseek_v3"])
def test_the_graph_agrees_for_sinks_experts_and_latent_attention(kind):
    assert_agrees(config_of(kind))


def test_the_graph_agrees_where_heads_are_repeated_before_they_are_rotated():
    assert_agrees(config_of("falcon", new_decoder_architecture=True, num_kv_heads=2))


REFUSED = ("xglm", "llama4_text")


@pytest.mark.parametrize(
    ("kind", "path", "mask", "bias", "kv_heads"),
    [
        ("bloom", "transformer.h.1.self_attention", "causal", True, 4),
        ("gptj", "transformer.h.1.attn", "causal", False, 4),
        ("falcon", "transformer.h.1.self_attention", "causal", False, 1),
        ("mpt", "transformer.blocks.1.attn", "causal", True, 4),
        ("xglm", "model.layers.1.self_attn", "causal", False, 4),
        ("gpt_neo", "transformer.h.1.attn.attention", "causal", False, 4),
        ("llama4_text", "model.layers.1.self_attn", "chunked", False, 2),
    ],
)
def test_attention_outside_the_interface_is_shown_and_what_becomes_of_it(kind, path, mask, bias, kv_heads):
    """Some of these families have an adapter, the others a reason why not."""
    found = look(config_of(kind))
    assert bool(found.refusal) == (kind in REFUSED)
    assert set(found.actions) == {"refused" if kind in REFUSED else "swap"}
    assert len(found.sites) == 2
    last = found.sites[-1]
    assert (last.path, last.mask, last.bias) == (path, mask, bias)
    assert (last.heads, last.kv_heads, last.head_dim, last.value_dim) == (4, kv_heads, 8, 8)
    assert last.scale == pytest.approx(1.0 if kind in ("gpt_neo", "xglm") else 8**-0.5)
    assert (f"refused: {found.refusal}" in found.to_table()) == (kind in REFUSED)


def test_an_encoder_decoder_shows_both_halves():
    found = look(config_of("t5"))
    assert "encoder-decoder" in str(found.refusal)
    assert [site.mask for site in found.sites] == ["none", "none", "causal", "none", "causal", "none"]


def test_a_model_without_attention_has_no_sites():
    found = look(config_of("mamba"))
    assert found.sites == ()
    assert "no softmax attention" in found.to_table()


def test_what_conversion_would_do_follows_the_recipe(tiny_family):
    found = look(tiny_family("gemma2").config, "convert.keep_softmax=[0]")
    assert found.actions == ("keep", "swap", "swap")
    table = found.to_table()
    assert "2 swap, 1 keep" in table
    assert "note: the softcap" in table
    assert "sliding window 6" in table


@pytest.mark.parametrize("kind", ["bloom", "gptj", "gpt_oss", "mixtral"])
def test_what_export_cannot_trace_is_recorded(monkeypatch, kind):
    config = config_of(kind)
    exported = look(config)

    def fail(*args, **kwargs):
        raise RuntimeError("cannot")

    monkeypatch.setattr(torch.export, "export", fail)
    recorded = look(config)
    assert recorded.tracer == "dispatch"
    assert recorded.fallback == "RuntimeError: cannot"
    assert "torch.export failed: RuntimeError: cannot" in recorded.to_table()
    assert recorded.sites == exported.sites


def test_a_config_is_enough(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_quiet_libraries", lambda: None)
    tiny_family("qwen3").config.save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--json", "--set", "convert.keep_softmax={count: 1}"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["model_type"] == "qwen3"
    assert [site["action"] for site in data["sites"]] == ["swap", "keep", "swap"]
    assert {(site["heads"], site["kv_heads"], site["head_dim"]) for site in data["sites"]} == {(4, 2, 8)}
