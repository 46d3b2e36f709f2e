"""The recurrent cache layer under everything that `generate` does with a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from swapattn.cache import LightningCacheLayer, adopt
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan


@pytest.fixture(scope="module", params=[(), (1,), (0, 2)], ids=["all-swapped", "keep-1", "keep-0-2"])
def model(request, tiny_family):
    return build(tiny_family("llama"), request.param)


@pytest.fixture(scope="module")
def linear_model(tiny_family):
    return build(tiny_family("llama"), ())


def build(model, keep, **spec):
    convert = {"local": {"window": 6, "sinks": 2}, "keep_softmax": keep, **spec}
    apply_(model, plan(model.config, ConvertSpec.model_validate(convert)))
    return model.double()


def ids_of(rows, length, seed=3):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new=16, **kwargs):
    settings = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=new, **{**settings, **kwargs})


def storage_bytes(layer):
    """Bytes of all storages that a cache layer holds on to, through whatever attribute or view."""
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    for value in vars(layer).values():
        if isinstance(value, dict | list | tuple):
            items = value.values() if isinstance(value, dict) else value
            tensors += [item for item in items if isinstance(item, torch.Tensor)]
    assert all(tensor._base is None for tensor in tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_a_returned_cache_serves_a_second_turn(model):
    ids = ids_of(1, 9)
    first = generate(model, ids, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, ids_of(1, 25, seed=8)), 1)
    assert torch.equal(
        generate(model, longer, past_key_values=first.past_key_values),
        generate(model, longer, use_cache=False),
    )


def test_a_users_own_cache_is_converted_in_place(model):
    ids = ids_of(1, 12)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids, use_cache=False))
        assert any(isinstance(layer, LightningCacheLayer) for layer in cache.layers)


def test_static_cache_gives_the_same(linear_model):
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = generate(linear_model, ids, attention_mask=mask)
    assert torch.equal(generate(linear_model, ids, attention_mask=mask, cache_implementation="static"), expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("normalizer", ["none", "sum"])
def test_cache_holds_the_same_bytes_after_16_and_1000_tokens(tiny_family, normalizer, padding):
    model = build(tiny_family("llama"), (), normalizer=normalizer)
    sizes = []
    for length in (16, 1000):
        mask = torch.ones(2, length)
        mask[0, :padding] = 0
        with torch.no_grad():
            cache = model(input_ids=ids_of(2, length), attention_mask=mask, use_cache=True).past_key_values
            after_prefill = [storage_bytes(layer) for layer in cache.layers]
            model(input_ids=ids_of(2, 1), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == length + 1
        assert [storage_bytes(layer) for layer in cache.layers] == after_prefill
        assert [layer.nbytes for layer in cache.layers] == after_prefill
        sizes.append(after_prefill)
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 3


@pytest.mark.parametrize("half_lives", [(), (3,)])
def test_plan_states_the_bytes_that_the_state_takes(tiny_family, half_lives):
    model = tiny_family("llama")
    spec = ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2}, "decay": {"half_lives": half_lives}})
    planned = plan(model.config, spec)
    apply_(model, planned)
    model.to(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=ids_of(1, 16), use_cache=True).past_key_values
    held = sum(getattr(layer, name).nbytes for layer in cache.layers for name in ("state", "norm", "ring_k", "ring_v"))
    assert planned.state_bytes() == held


def test_a_state_that_was_not_recorded_cannot_be_rolled_back_and_says_so(linear_model):
    with torch.no_grad():
        cache = linear_model(input_ids=ids_of(1, 6), use_cache=True).past_key_values
    layer = cache.layers[0]
    layer.crop(0)
    with pytest.raises(RuntimeError, match="rolled back by 0 tokens here, not by 2"):
        layer.crop(-2)
    with pytest.raises(ValueError, match="found 2"):
        layer.crop(2)


def test_reset_forgets_everything(linear_model):
    ids = ids_of(1, 10)
    with torch.no_grad():
        cache = linear_model(input_ids=ids_of(1, 6, seed=9), use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        found = linear_model(input_ids=ids, past_key_values=cache).logits
        assert torch.equal(found, linear_model(input_ids=ids, use_cache=True).logits)


def test_a_copied_cache_is_independent(linear_model):
    ids = ids_of(1, 10)
    with torch.no_grad():
        cache = linear_model(input_ids=ids[:, :8], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        linear_model(input_ids=ids[:, :1], past_key_values=cache)
        found = linear_model(input_ids=ids[:, 8:9], past_key_values=twin).logits
        expected = linear_model(input_ids=ids[:, :9], use_cache=False).logits[:, -1:]
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_cache_that_holds_softmax_keys_is_refused(tiny_family, linear_model):
    with torch.no_grad():
        cache = tiny_family("llama")(input_ids=ids_of(1, 6), use_cache=True).past_key_values
    with pytest.raises(TypeError, match="already holds softmax keys for layer 0"):
        linear_model(input_ids=ids_of(1, 2), past_key_values=cache)


def test_adopt_refuses_what_is_no_cache():
    with pytest.raises(TypeError, match="cache of type dict"):
        adopt({}, 0)


def test_foreign_recurrences_are_refused():
    layer = LightningCacheLayer()
    with pytest.raises(TypeError, match="no convolution"):
        layer.update_conv_state(torch.zeros(1))
    with pytest.raises(TypeError, match="keeps its own state"):
        layer.update_recurrent_state(torch.zeros(1))
