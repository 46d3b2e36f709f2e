"""The recurrent cache layer under everything that `generate` does with a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters, get_static_address_type
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from swapattn.attention import swaps
from swapattn.cache import LightningCacheLayer, adopt
from swapattn.families import tiny_config
from swapattn.recipe import ConvertSpec, load_recipe
from swapattn.surgery import apply_, plan

JOINT = {"local": {"window": 6, "sinks": 2, "mix": "joint"}, "rope": {"linear": "drop"}}


@pytest.fixture(scope="module", params=[((), {}), ((1,), {}), ((0, 2), JOINT)], ids=["all-swapped", "keep-1", "joint"])
def model(request, tiny_family):
    keep, spec = request.param
    return build(tiny_family("llama"), keep, **spec)


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


def lightning(cache):
    return [layer for layer in cache.layers if isinstance(layer, LightningCacheLayer)]


def held(layer):
    """All tensors of a layer by name."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def addresses(cache):
    return [{name: tensor.data_ptr() for name, tensor in held(layer).items()} for layer in lightning(cache)]


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


def test_generate_hands_a_padding_mask_on_as_it_does_for_the_teacher(model):
    """No mask of all keys for every step; libraries that change the inputs, as peft's prompt tuning, know no other."""
    shapes, mask = [], torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    generate(model, ids_of(2, 5), new=3, attention_mask=mask)
    handle.remove()
    assert shapes == [(2, 5), (2, 6), (2, 7)]


def test_drafts_of_a_model_that_was_swapped_in_memory(model):
    ids = ids_of(1, 6).repeat(1, 3)
    found = generate(model, ids, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids))
    assert not any(layer.record_past for layer in lightning(found.past_key_values))


def test_static_cache_gives_the_same(linear_model):
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = generate(linear_model, ids, attention_mask=mask)
    assert torch.equal(generate(linear_model, ids, attention_mask=mask, cache_implementation="static"), expected)


@pytest.fixture
def compiled(compiled_on_cpu):
    """Settings under which `generate` compiles its step; counts from nought."""
    return {"compile_config": compiled_on_cpu}


def assert_compiled_once():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param("short", ["convert.local.window=6"], marks=pytest.mark.slow),
        ("short", ["convert.local.window=6", "convert.keep_softmax=[0]"]),
        pytest.param("short-pure", [], marks=pytest.mark.slow),
    ],
    ids=["window", "keep-0", "linear"],
)
def test_a_static_cache_compiles_one_step_for_all(tiny_llama, compiled, recipe, overrides):
    """The number of tokens seen is no constant of the graph, nor is the cache: a second one is served by it too."""
    model = tiny_llama()
    apply_(model, plan(model.config, load_recipe(recipe, overrides).convert))
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    padded = mask.clone()
    padded[0, :5] = 0
    for given in (padded, mask):
        expected = generate(model, ids, 24, attention_mask=given)
        assert expected[:, 12:].unique().numel() > 3, "the outputs do not vary: the test says nothing"
        static = {"cache_implementation": "static", **compiled}
        assert torch.equal(generate(model, ids, 24, attention_mask=given, **static), expected)
        assert_compiled_once()


@pytest.mark.parametrize(
    ("kind", "padding"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("bloom", 0), ("bloom", 5), ("falcon", 5))],
)
def test_alibi_compiles_one_step_for_all(compiled, kind, padding):
    settings = {"tie_word_embeddings": False, **({"alibi": True} if kind == "falcon" else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **settings)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    build(model, ()).float()
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :padding] = 0
    expected = generate(model, ids, attention_mask=mask)
    assert expected[:, 12:].unique().numel() > 3, "the outputs do not vary: the test says nothing"
    found = generate(model, ids, attention_mask=mask, cache_implementation="static", **compiled)
    assert torch.equal(found, expected)
    assert_compiled_once()


@pytest.mark.slow
def test_a_compiled_prefill_in_chunks(tiny_family, compiled):
    """The recurrent layers are in the cache before the first chunk: no graph is broken to look at stock's."""
    model, ids = build(tiny_family("llama"), (1,)), ids_of(2, 15)
    expected = generate(model, ids)
    settings = {"prefill_chunk_size": 5, "cache_implementation": "static", **compiled}
    assert torch.equal(generate(model, ids, **settings), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # as stock: the first chunk, the others, one token


@pytest.mark.parametrize("keep", [(1,), *(pytest.param(x, marks=pytest.mark.slow) for x in ((), (0, 2)))], ids=str)
def test_a_static_cache_serves_a_second_turn_after_compiled_steps(tiny_family, keep, compiled):
    model = build(tiny_family("llama"), keep)
    ids, cache = ids_of(1, 9), StaticCache(config=model.config, max_cache_len=80)
    first = generate(model, ids, past_key_values=cache, **compiled)
    assert torch.equal(first, generate(model, ids, use_cache=False))
    longer = torch.cat((first, ids_of(1, 25, seed=8)), 1)
    before = addresses(cache)
    second = generate(model, longer, past_key_values=cache, **compiled)
    assert torch.equal(second, generate(model, longer, use_cache=False))
    assert_compiled_once()
    assert addresses(cache) == before
    assert cache.get_seq_length() == second.shape[1] - 1


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_a_static_cache_changes_its_tensors_in_place(model, padding):
    """What a recorded CUDA graph reads and writes is where it was: after steps, a long call, a crop, and for beams."""
    ids, mask = ids_of(2, 30), torch.ones(2, 40, dtype=torch.long)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = StaticCache(config=model.config, max_cache_len=40), DynamicCache(config=model.config)

    def run(start, stop):
        more = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        found, expected = (model(input_ids=ids[:, start:stop], past_key_values=x, **more).logits for x in caches)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)
        assert all(int(layer.get_seq_length()) == stop for cache in caches for layer in cache.layers)

    run(0, 8)
    before = addresses(caches[0])
    # of a joint layer alone, whose linear branch takes other keys over
    without = set() if any(swap.rotary_dims for swap in swaps(model).values()) else {"ring_linear"}
    assert all(set(found) == {"seen", *LightningCacheLayer.TENSORS} - without for found in before)
    for layer in lightning(caches[0]):
        assert all(get_static_address_type(tensor) == "unguarded" for tensor in held(layer).values())
        assert layer.get_mask_sizes(1) == (40, 0)
    for start, stop in ((8, 9), (9, 10), (10, 13), (13, 25), (25, 26)):
        run(start, stop)
    for cache in caches:
        for layer in lightning(cache):
            layer.activate_past_recording()
    run(26, 29)
    cropped = 2 if caches[0].is_croppable else 0  # kept static layers cannot in transformers 5.17
    for cache in caches if cropped else ():
        cache.crop(-cropped)
    run(29 - cropped, 30)
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 1]))
    ids[0], mask[0], positions[0] = ids[1], mask[1], positions[1]
    ids = torch.cat((ids, ids_of(2, 2, seed=8)), 1)
    run(30, 32)
    assert addresses(caches[0]) == before


def test_a_cache_of_inference_mode_is_gone_on_from_outside_of_it(model):
    ids = ids_of(2, 9)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=caches[0], use_cache=True)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=caches[1], use_cache=True)
        found, expected = (
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits for cache in caches
        )
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_inference_mode_is_taken_back_and_reordered_outside_of_it(linear_model, static):
    ids = ids_of(2, 20)
    expected = linear_model(input_ids=ids, use_cache=False).logits
    config = linear_model.config
    cache = StaticCache(config=config, max_cache_len=30) if static else DynamicCache(config=config)
    with torch.inference_mode():
        linear_model(input_ids=ids[:, :5], past_key_values=cache)
        cache.activate_past_recording()
        linear_model(input_ids=ids[:, 5:15], past_key_values=cache)
    cache.crop(-4)
    with torch.inference_mode():
        linear_model(input_ids=ids[:, 11:13], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = linear_model(input_ids=ids[:, 13:].flip(0), past_key_values=cache).logits
    assert torch.allclose(found.flip(0), expected[:, 13:], rtol=0, atol=1e-9)


def test_rows_are_kept_by_number_or_by_truth(linear_model):
    ids = ids_of(3, 9)
    caches = [DynamicCache(config=linear_model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, rows in zip(caches, (torch.tensor([2, 0]), torch.tensor([True, False, True])), strict=True):
            linear_model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache.batch_select_indices(rows)
        found = [linear_model(input_ids=ids[:2, :1], past_key_values=cache, use_cache=True).logits for cache in caches]
        alone = linear_model(input_ids=torch.cat((ids[:1], ids[:1, :1]), 1)).logits[:, -1:]
    assert torch.allclose(found[1][:1], alone, atol=1e-9)
    assert [logits.shape[0] for logits in found] == [2, 2]


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_drafts_with_a_static_cache(model, compiled, helper):
    """A kept layer does not see the tokens that were taken back, and the recorded step is not compiled."""
    if not hasattr(StaticLayer, "crop"):
        pytest.skip("static layers cannot take tokens back in this transformers")
    ids, cache = ids_of(1, 6).repeat(1, 3), StaticCache(config=model.config, max_cache_len=60)
    twin = copy.deepcopy(model)
    twin.get_output_embeddings().weight.data.mul_(torch.tensor([1.0, 0.5]).repeat(160)[:, None])
    drafts = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": twin}
    expected = generate(model, ids, 20)
    assert torch.equal(generate(model, ids, 20, **drafts), expected)
    assert torch.equal(generate(model, ids, 20, past_key_values=cache, **drafts, **compiled), expected)
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("keep", [(), pytest.param((1,), marks=pytest.mark.slow)], ids=["all-swapped", "keep-1"])
def test_a_static_cache_of_sliding_layers_alone(tiny_family, compiled, keep):
    """None of them has room for all tokens, so nothing says how many there can be."""
    model = build(tiny_family("mistral", sliding_window=6), keep)
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    expected = generate(model, ids, attention_mask=mask)
    found = generate(model, ids, attention_mask=mask, cache_implementation="static", **compiled)
    assert torch.equal(found, expected)
    if not keep:  # stock sliding layers count on the host
        assert_compiled_once()


@torch.no_grad()
def test_more_tokens_than_a_static_cache_is_long_for(linear_model):
    """The state has room for any number; only a graph, which cannot look, refuses them."""
    ids, mask = ids_of(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = mask[0, 20:24] = mask[1, 26:] = 0
    for length in (18, 22):
        caches = StaticCache(config=linear_model.config, max_cache_len=length), DynamicCache()
        for start, stop in ((0, 12), (12, 13), (13, 28), (28, 40)):
            more = {"attention_mask": mask[:, :stop], "position_ids": torch.arange(start, stop)[None]}
            found, expected = (
                linear_model(input_ids=ids[:, start:stop], past_key_values=cache, **more).logits for cache in caches
            )
            assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    cache = StaticCache(config=linear_model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="a mask of 8 tokens for 40 new ones: the static cache is too short"):
        linear_model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    cache = StaticCache(config=linear_model.config, max_cache_len=13)
    linear_model(input_ids=ids[:, :12], past_key_values=cache)
    step = torch.compile(linear_model, backend="eager", fullgraph=True)
    step(input_ids=ids[:, 12:13], past_key_values=cache)
    with pytest.raises(RuntimeError, match="static cache of 13 tokens is full"):
        step(input_ids=ids[:, 13:14], past_key_values=cache)


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
