"""Every family that is supported computes one result, however the tokens arrive; every other is refused by name."""

from __future__ import annotations

import pytest
import torch
from every_type import cache_error, ids_of, padding_error, swapped, tiny_model

from swapattn import families
from swapattn.attention import only_branch, swaps
from swapattn.errors import UnsupportedModelError
from swapattn.surgery import attention_sites

# Decoder families that people convert; the rest of the types are under `slow`.
COMMON = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3"),
    *("gpt_neox", "gpt2", "opt", "olmo", "olmo2", "olmo3"),
    *("smollm3", "granite", "granitemoe", "starcoder2", "cohere", "cohere2"),
    *("glm", "glm4", "exaone4", "nemotron", "stablelm", "deepseek_v2"),
    *("deepseek_v3", "gpt_oss", "minimax", "qwen3_next", "seed_oss", "apertus"),
]


@pytest.mark.parametrize("kind", COMMON)
def test_prefill_chunk_and_single_steps_equal_the_full_forward(kind):
    model = swapped(kind)
    assert swaps(model)
    error = cache_error(model)
    if error > 1e-6:  # a delta rule that computes in fp32, say
        assert error < 3e-5
        assert error < 10 * cache_error(tiny_model(kind))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "phi"])
def test_a_left_padded_row_equals_the_same_tokens_alone(kind):
    assert padding_error(swapped(kind)) < 1e-6
    assert padding_error(swapped(kind, keep=(1,))) < 1e-6


def local_equals(teacher, model, tolerance=1e-6):
    """Whether the swaps' local branches, at full weight, are the teacher's attention."""
    with torch.no_grad(), only_branch(model, "local"):
        found = model(input_ids=ids_of(), use_cache=False).logits
        expected = teacher(input_ids=ids_of(), use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("granite", {"attention_multiplier": 0.4}),  # a scale other than d^-0.5
        ("gemma3_text", {"query_pre_attn_scalar": 3, "sliding_window": 64}),
        ("opt", {}),  # scales its queries itself
        ("phi", {}),  # partial rotary embeddings
        ("gpt_neox", {}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("deepseek_v3", {}),  # latent attention: keys wider than values
        ("qwen3_moe", {}),  # q/k norm, experts in one tensor
    ],
)
def test_scale_rotary_embedding_and_norms_arrive_as_the_teacher_has_them(kind, overrides):
    assert local_equals(tiny_model(kind, **overrides), swapped(kind, window=64, **overrides))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_sliding_window_gives_way_to_the_recipes_window_and_an_unbounded_linear_branch(kind):
    model = swapped(kind, window=64, sliding_window=6)
    teacher = tiny_model(kind, sliding_window=6)
    assert not local_equals(teacher, model, 1e-2)
    sites = {site.path: site for site in attention_sites(families.tiny_config(kind, sliding_window=6))}
    for path, swap in swaps(model).items():
        if sites[path].sliding_window:
            swap.window, swap.sinks = 6, 0
    assert local_equals(teacher, model)


def test_a_softcap_is_dropped_in_swapped_layers():
    capped = {"attn_logit_softcapping": 0.5, "sliding_window": 64}
    model = swapped("gemma2", window=64, **capped)
    teacher = tiny_model("gemma2", **capped)
    teacher.set_attn_implementation("eager")  # sdpa leaves the cap out, in transformers 5.17 without a word
    assert not local_equals(teacher, model, 1e-3)
    assert local_equals(tiny_model("gemma2", sliding_window=64, attn_logit_softcapping=None), model)


def test_learned_sinks_do_nothing_in_swapped_layers_and_stay_as_they_are():
    teacher, model = tiny_model("gpt_oss", sliding_window=64), swapped("gpt_oss", window=64, sliding_window=64)
    assert not local_equals(teacher, model, 1e-3)
    sinks = [name for name, _ in teacher.named_parameters() if name.endswith("sinks")]
    assert len(sinks) == families.LAYERS
    assert all(torch.equal(teacher.get_parameter(name), model.get_parameter(name)) for name in sinks)
    for name in sinks:
        teacher.get_parameter(name).data.fill_(-1e4)  # a column that no softmax gives any weight
    assert local_equals(teacher, model)


def test_tied_embeddings_stay_tied():
    model = swapped("gemma2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert swapped("gemma2", tie_word_embeddings=False).lm_head.weight is not model.model.embed_tokens.weight


def reason_for(kind, **overrides):
    with pytest.raises(UnsupportedModelError) as caught:
        attention_sites(families.tiny_config(kind, **overrides))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model type {kind!r} ")
    assert "swapattn models --types" in text
    return text


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("deepseek_v32", "sparse-attention indexer"),
        ("glm_moe_dsa", "sparse-attention indexer"),
        ("gemma3n_text", "shares keys and values"),
        ("mamba", "no softmax attention"),
        ("diffllama", "more than once in a layer"),
        ("doge", "numbers of each head's own"),
        ("zaya", "convolution state"),
        ("recurrent_gemma", "returns no cache"),
        ("xglm", "outside transformers' AttentionInterface"),
        ("llama4_text", "within chunks"),
    ],
)
def test_what_cannot_be_swapped_is_refused_with_its_reason(kind, reason):
    assert reason in reason_for(kind)
    row = families.support(kind)
    assert not row.supported
    assert reason in row.reason


def test_other_refusals_depend_on_the_config():
    assert "encoder-decoder" in reason_for("bart", is_encoder_decoder=True)
    assert "shares keys and values" in reason_for("gemma4_text", num_kv_shared_layers=1)
    text = families.tiny_config("gemma4_unified_text", num_kv_shared_layers=1)
    assert "shares keys and values" in reason_for("gemma4_unified", text_config=text.to_dict())
    assert families.support("gemma4_unified").supported
    assert "both directions" in reason_for("bert", is_decoder=False)
    assert families.support("bart").supported


@pytest.mark.slow
def test_every_supported_type_computes_one_result_however_the_tokens_arrive():
    """`pytest -m slow tests/test_families.py`: all types of the installed transformers, a minute or two."""
    rows = [families.support(kind) for kind in families.types()]
    supported = [row.kind for row in rows if row.supported]
    assert all(row.reason for row in rows if not row.supported)
    wrong = {}
    for kind in supported:
        error = cache_error(swapped(kind))
        if error > 1e-6 and error > 10 * cache_error(tiny_model(kind)):
            wrong[kind] = error
    assert not wrong
    assert len(supported) >= 131
