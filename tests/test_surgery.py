"""Which layers are swapped, what is refused and why, and the proof that nothing quadratic is left."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, MambaConfig

from swapattn.attention import swaps
from swapattn.audit import quadratic_sites
from swapattn.errors import RecipeError, UnsupportedModelError
from swapattn.recipe import ConvertSpec, KeepSpec
from swapattn.surgery import apply_, attention_sites, plan, revert_

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def spec(**values):
    return ConvertSpec.model_validate(values)


def test_sites_are_found_with_their_shapes(tiny_family):
    sites = attention_sites(tiny_family("llama").config)
    assert [site.path for site in sites] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert {(s.heads, s.kv_heads, s.head_dim, s.value_dim) for s in sites} == {(4, 2, 8, 8)}
    gpt2 = attention_sites(tiny_family("gpt2").config)
    assert [site.path for site in gpt2] == [f"transformer.h.{i}.attn" for i in range(3)]
    gemma = attention_sites(tiny_family("gemma2").config)
    assert [site.sliding_window for site in gemma] == [6, None, 6]
    assert {site.softcap for site in gemma} == {5.0}


@pytest.mark.parametrize(
    ("keep", "kept"), [((), []), ((1,), [1]), ((-1,), [2]), ((0, -1), [0, 2]), ((-3, 0), [0]), ((2, 0), [0, 2])]
)
def test_kept_layers_count_from_either_end(tiny_family, keep, kept):
    model = tiny_family("llama")
    planned = plan(model.config, spec(keep_softmax=keep))
    assert [site.layer_idx for site in planned.keep] == list(planned.spec.keep_softmax) == kept
    apply_(model, planned)
    assert [swap.layer_idx for swap in swaps(model).values()] == [i for i in range(3) if i not in kept]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"count": 1}, [1]),
        ({"count": 2}, [0, 2]),
        ({"share": 0.01}, [1]),
        ({"share": 0.6}, [0, 2]),
        ({"count": 1, "first": 1}, [0]),
        ({"count": 2, "first": 1, "last": 1}, [0, 2]),
        ({"count": 2, "last": 1}, [1, 2]),
    ],
)
def test_a_number_of_layers_is_kept(tiny_family, keep, kept):
    planned = plan(tiny_family("llama").config, spec(keep_softmax=keep))
    assert [site.layer_idx for site in planned.keep] == kept
    assert planned.config_block()["spec"]["keep_softmax"] == kept


def test_numbers_are_spread_evenly_between_the_protected_ends():
    assert KeepSpec(count=6).positions(24) == (2, 6, 10, 14, 18, 22)
    assert KeepSpec(share=0.25, first=2, last=2).positions(32) == (0, 1, 5, 12, 19, 26, 30, 31)
    assert KeepSpec(count=8, first=1, last=1).positions(30) == (0, 3, 8, 12, 17, 22, 26, 29)
    for layers in range(2, 40):
        for count in range(1, layers):
            found = KeepSpec(count=count).positions(layers)
            assert len(set(found)) == count
            assert set(found) <= set(range(layers))
            gaps = [b - a for a, b in itertools.pairwise(found)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"count": 3}, "nothing is left to swap"),
        ({"count": 4}, "4 layers are to be kept, the model has 3"),
        ({"count": 1, "first": 1, "last": 1}, "fewer than the 1 first and 1 last"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tiny_family, keep, message):
    with pytest.raises(RecipeError, match=message):
        plan(tiny_family("llama").config, spec(keep_softmax=keep))


@pytest.mark.parametrize("keep", [(3,), (-4,), (0, 17)])
def test_a_kept_layer_that_does_not_exist_is_refused(tiny_family, keep):
    with pytest.raises(RecipeError, match=rf"keep_softmax: {keep[-1]} is out of range, the model has 3"):
        plan(tiny_family("llama").config, spec(keep_softmax=keep))


@pytest.mark.parametrize("keep", [(0, 1, 2), (-1, -2, -3)])
def test_keeping_every_layer_is_refused(tiny_family, keep):
    with pytest.raises(RecipeError, match="nothing is left to swap"):
        plan(tiny_family("llama").config, spec(keep_softmax=keep))


def refused(config):
    with pytest.raises(UnsupportedModelError) as caught:
        plan(config, spec())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mamba_has_no_softmax_attention():
    assert "no softmax attention" in refused(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize("kind", ["gpt_neox_japanese", "xglm"])
def test_attention_outside_the_interface_is_refused(kind):
    sizes = {"vocab_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
    sizes |= {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    assert "outside transformers' AttentionInterface" in refused(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind):
    assert "encoder-decoder" in refused(AutoConfig.for_model(kind))


def test_a_type_that_is_no_language_model_is_refused():
    assert "no causal language model" in refused(AutoConfig.for_model("vit"))


def test_attention_in_both_directions_is_refused():
    sizes = {**SMALL, "num_key_value_heads": 4}
    assert "both directions" in refused(AutoConfig.for_model("bert", **sizes))
    assert len(plan(AutoConfig.for_model("bert", **sizes, is_decoder=True), spec()).swap) == 3


def test_shared_keys_and_values_are_refused():
    config = AutoConfig.for_model("gemma4_text", **SMALL, num_kv_shared_layers=1)
    assert "shares keys and values" in refused(config)


def test_chunked_attention_is_refused():
    assert "within chunks" in refused(AutoConfig.for_model("llama4_text", **SMALL, num_local_experts=2))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_mixtures_of_experts_can_be_planned(kind):
    sizes = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    assert len(plan(AutoConfig.for_model(kind, **SMALL, **sizes), spec()).swap) == 3


def test_planning_leaves_the_config_as_it_was(tiny_family):
    config = tiny_family("llama").config
    before = config.to_dict(), config._attn_implementation
    plan(config, spec())
    assert (config.to_dict(), config._attn_implementation) == before


def test_a_model_swapped_in_memory_is_not_saved_as_one_with_softmax(tiny_family, tmp_path):
    model = tiny_family("llama")
    apply_(model, plan(model.config, spec()))
    with pytest.raises(UnsupportedModelError, match="would be saved as one with softmax"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    revert_(model)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").is_file()


def test_a_swapped_model_cannot_be_swapped_again(tiny_family):
    model = tiny_family("llama")
    planned = plan(model.config, spec())
    apply_(model, planned)
    with pytest.raises(UnsupportedModelError, match="already swapped"):
        apply_(model, planned)
    revert_(model)
    apply_(model, planned)
    assert len(swaps(model)) == 3


def test_a_plan_for_another_model_changes_nothing(tiny_family):
    model = tiny_family("gpt2")
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        apply_(model, plan(tiny_family("llama").config, spec()))
    assert not swaps(model)


def test_revert_leaves_other_hooks_alone(tiny_family):
    model = tiny_family("llama")
    called, kind = [], type(model)
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: called.append(1))
    apply_(model, plan(model.config, spec()))
    revert_(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert called == [1]
    assert type(model) is kind


def test_start_slopes_are_those_of_the_schedule(tiny_family):
    model = tiny_family("llama")
    apply_(model, plan(model.config, spec(decay={"schedule": "alibi", "per": "query_head"})))
    for swap in swaps(model).values():
        assert torch.allclose(-swap.log_decay, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))


def test_no_decay_is_exactly_no_decay(tiny_family):
    model = tiny_family("llama")
    apply_(model, plan(model.config, spec(decay={"schedule": "none"})))
    assert all(bool((swap.log_decay == 0).all()) for swap in swaps(model).values())


@pytest.mark.parametrize("local", [None, {"window": 16, "sinks": 4}])
def test_nothing_quadratic_is_left_outside_the_kept_layers(tiny_family, local):
    model = tiny_family("llama")
    stock = quadratic_sites(model)
    assert sorted(stock) == [f"model.layers.{i}.self_attn" for i in range(3)]
    apply_(model, plan(model.config, spec(local=local)))
    assert quadratic_sites(model) == {}
    revert_(model)
    assert quadratic_sites(model) == stock


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_audit_sees_the_kept_layer_only(tiny_family, implementation):
    model = tiny_family("llama")
    model.set_attn_implementation(implementation)
    apply_(model, plan(model.config, spec(keep_softmax=(1,), local={"window": 16})))
    assert list(quadratic_sites(model)) == ["model.layers.1.self_attn"]


def test_the_audit_runs_without_weights_and_cleans_up(tiny_family):
    model = tiny_family("llama").to("meta")
    assert len(quadratic_sites(model, device="meta")) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
