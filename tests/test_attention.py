"""The swapped attention inside real model types: one result, however the tokens arrive."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from swapattn.attention import observing, only_branch, swaps
from swapattn.call import AttentionCall
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan, revert_
from swapattn.swap import LightningSwap

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_neox", "gpt2", "opt"]
SPEC = ConvertSpec.model_validate({"local": {"window": 5, "sinks": 2, "share": 0.4}})
MAPS = [("identity", "none"), ("identity", "rms"), ("silu", "none"), ("silu", "rms")]
MAPS += [(name, norm) for name in ("elu1", "softmax", "hedgehog") for norm in ("none", "sum", "rms")]


def swapped(model, spec=SPEC, keep=(), dtype=torch.float64):
    """A swapped copy of a model in fp64, with parameters of the swaps that differ between heads."""
    model = copy.deepcopy(model)
    spec = spec.model_copy(update={"keep_softmax": tuple(keep)})
    apply_(model, plan(model.config, spec))
    generator = torch.Generator().manual_seed(1)
    for swap in swaps(model).values():
        for name, parameter in swap.named_parameters():
            if name != "log_slope":
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def ids_of(rows, length, seed=3):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def through_cache(model, ids, pieces):
    """Logits of all tokens when they come in pieces of the given lengths."""
    cache, start, found = DynamicCache(config=model.config), 0, []
    for piece in pieces:
        found.append(model(input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True).logits)
        start += piece
    assert start == ids.shape[1]
    return torch.cat(found, 1)


@torch.no_grad()
def recompute(model, ids, new):
    """Greedy decoding without any cache."""
    for _ in range(new):
        ids = torch.cat((ids, logits_of(model, ids)[:, -1:].argmax(-1)), 1)
    return ids


def greedy(model, ids, new, **kwargs):
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=1, eos_token_id=None, **kwargs)


@pytest.fixture(scope="module")
def llama(tiny_family):
    return tiny_family("llama")


@pytest.fixture(scope="module", params=[(), (1,)], ids=["all-swapped", "keep-1"])
def keep(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_family, keep):
    return swapped(tiny_family(request.param), keep=keep)


def test_prefill_chunk_and_single_steps_equal_the_full_forward(family):
    ids = ids_of(2, 30)
    full = logits_of(family, ids)
    # prefill, a continuation longer than window and sinks, a short one, single steps
    assert torch.allclose(through_cache(family, ids, [9, 11, 3] + [1] * 7), full, rtol=0, atol=1e-6)
    # the first piece is shorter than window and sinks
    assert torch.allclose(through_cache(family, ids, [1, 1, 4, 1, 12, 11]), full, rtol=0, atol=1e-6)


def test_greedy_generate_equals_recomputing_the_whole_sequence(family):
    ids = ids_of(1, 8)
    found = greedy(family, ids, 20)
    assert torch.equal(found, recompute(family, ids, 20))
    assert len(set(found[0, 8:].tolist())) > 3, "the outputs do not vary: the test says nothing"


def test_a_left_padded_row_equals_the_same_prompt_alone(family):
    ids = ids_of(2, 16)
    ids[0, :9] = 1
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    batch = greedy(family, ids, 14, attention_mask=mask)
    assert torch.equal(batch[0, 9:], greedy(family, ids[:1, 9:], 14)[0])
    assert torch.equal(batch[1], greedy(family, ids[1:], 14)[0])


def test_right_padded_rows_equal_the_same_tokens_alone(family):
    ids = ids_of(2, 18)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    found = logits_of(family, ids, attention_mask=mask)
    assert torch.allclose(found[0, :11], logits_of(family, ids[:1, :11])[0], rtol=0, atol=1e-6)
    assert torch.allclose(found[1], logits_of(family, ids[1:])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_eager_as_the_base_implementation_gives_the_same(name, tiny_family):
    model = swapped(tiny_family(name), keep=(1,))
    ids = ids_of(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    expected = logits_of(model, ids, attention_mask=mask)[mask.bool()]
    stock = tiny_family(name)
    stock.set_attn_implementation("eager")
    eager = swapped(stock, keep=(1,))
    assert eager.config._attn_implementation == "swapattn_eager"
    found = logits_of(eager, ids, attention_mask=mask)[mask.bool()]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)  # of transformers 5.24 the softmax is float32's
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    found = [m.generate(ids, **options, cache_implementation=c) for m in (model, eager) for c in (None, "static")]
    assert all(torch.equal(tokens, found[0]) for tokens in found)


def test_packed_sequences_equal_separate_ones(llama, keep):
    model = swapped(llama, keep=keep)
    ids = ids_of(1, 21)
    lengths = [4, 9, 1, 7]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits_of(model, ids, position_ids=positions)
    separate = torch.cat([logits_of(model, piece) for piece in ids.split(lengths, 1)], 1)
    assert torch.allclose(packed, separate, rtol=0, atol=1e-9)


def test_packed_sequences_in_a_batch_of_rows(llama):
    model = swapped(llama)
    ids = ids_of(2, 12)
    cuts = [[5, 7], [8, 4]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in cuts])
    packed = logits_of(model, ids, position_ids=positions)
    for row, cut in enumerate(cuts):
        separate = torch.cat([logits_of(model, piece) for piece in ids[row : row + 1].split(cut, 1)], 1)
        assert torch.allclose(packed[row : row + 1], separate, rtol=0, atol=1e-9)


@pytest.mark.parametrize("local", [None, {"window": 5, "sinks": 2, "share": 0.4}], ids=["linear", "local"])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize(("feature_map", "normalizer"), MAPS)
def test_every_kind_of_layer_runs_the_same_with_and_without_cache(llama, feature_map, normalizer, per, local):
    spec = {"feature_map": feature_map, "normalizer": normalizer, "decay": {"per": per}, "local": local}
    model = swapped(llama, ConvertSpec.model_validate(spec))
    ids = ids_of(2, 20)
    full = logits_of(model, ids)
    assert torch.isfinite(full).all()
    assert torch.allclose(through_cache(model, ids, [8, 9, 1, 1, 1]), full, rtol=0, atol=1e-6)
    states = {swap.log_slope.numel() for swap in swaps(model).values()}
    assert states == {2 if per == "kv_head" else 4}


def call_of(seed=0, length=13, scaling=0.3):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    return q, k, v, AttentionCall(q, k, v, scaling, None, 0)


def layer(seed=5, **spec):
    shape = {"layer_idx": 0, "heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8}
    full = ConvertSpec.model_validate(spec).model_dump(mode="json")
    per_kv = full["decay"]["per"] == "kv_head"
    swap = LightningSwap(shape, full, torch.linspace(0.1, 0.9, 2 if per_kv else 4)).double()
    generator = torch.Generator().manual_seed(seed)
    swap.out_scale.data += torch.randn(swap.out_scale.shape, generator=generator, dtype=torch.float64)
    if swap.mix is not None:
        swap.mix.data += torch.randn(swap.mix.shape, generator=generator, dtype=torch.float64)
    return swap


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_the_linear_layer_is_its_formula(per):
    q, k, v, call = call_of()
    swap = layer(feature_map="identity", normalizer="none", local=None, decay={"per": per})
    expected = torch.zeros(2, 13, 4, 8, dtype=torch.float64)
    for h in range(4):
        slope = float(swap.log_slope[h // 2 if per == "kv_head" else h].float().exp())
        for t in range(13):
            for s in range(t + 1):
                weight = 0.3 * (q[:, h, t] * k[:, h // 2, s]).sum(-1) * 2.718281828459045 ** (-slope * (t - s))
                expected[:, t, h] += weight[:, None] * v[:, h // 2, s] * swap.out_scale[h]
    assert torch.allclose(swap(call), expected, rtol=0, atol=1e-7)


def test_the_share_of_a_joint_layer_does_not_depend_on_where_alibi_counts_from():
    """Its window's denominator does: the bias grows with the position of the key, not with its distance."""
    q, k, v, _ = call_of(length=30)
    swap = layer(local={"window": 5, "sinks": 2, "mix": "joint"}, feature_map="elu1", normalizer="sum")
    outputs, shares = [], []
    for count in (None, torch.tensor([1000, 3])):
        call = AttentionCall(q, k, v, 0.3, None, 0, alibi=([0.5, 0.25, 0.1, 0.01], count))
        outputs.append(swap(call))
        shares.append(swap.parts(call).share)
    assert shares[0][:, 10:].min() < 0.9
    assert torch.allclose(*shares, rtol=0, atol=1e-9)
    assert torch.allclose(*outputs, rtol=0, atol=1e-9)


def test_the_mixed_layer_is_its_formula():
    q, k, v, call = call_of()
    swap = layer(feature_map="elu1", normalizer="sum", local={"window": 4, "sinks": 2, "share": 0.3})
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    expected = torch.zeros(2, 13, 4, 8, dtype=torch.float64)
    t = torch.arange(13)
    back = t[:, None] - t
    for h in range(4):
        scores = 0.3 * q[:, h] @ k[:, h // 2].mT
        seen = (back >= 0) & ((back < 4) | (t < 2))
        local = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, h // 2]
        slope = swap.log_slope[h // 2].float().exp().double()
        weights = phi(q[:, h] * 0.3**0.5) @ phi(k[:, h // 2] * 0.3**0.5).mT * (-slope * back.clamp(min=0)).exp()
        weights = weights.tril()
        linear = weights @ v[:, h // 2] / weights.sum(-1, keepdim=True)
        share = swap.mix[h].sigmoid()
        expected[:, :, h] = (1 - share) * swap.out_scale[h] * linear + share * local
    assert torch.allclose(swap(call), expected, rtol=0, atol=1e-7)
    swap.branch = "local"
    assert not torch.allclose(swap(call), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_joint_layer_is_its_formula(sinks):
    q, k, v, call = call_of()
    swap = layer(feature_map="elu1", normalizer="sum", local={"window": 4, "sinks": sinks, "mix": "joint"})
    generator = torch.Generator().manual_seed(6)
    for parameter in (swap.mix_query, swap.mix_sum):
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    expected = torch.zeros(2, 13, 4, 8, dtype=torch.float64)
    t = torch.arange(13)
    back = t[:, None] - t
    inside = (back >= 0) & ((back < 4) | (t < sinks))
    outside = (back >= 4) & (t >= sinks)
    for h in range(4):
        scores = 0.3 * q[:, h] @ k[:, h // 2].mT
        window = scores.masked_fill(~inside, -torch.inf).exp()
        slope = swap.log_slope[h // 2].float().exp().double()
        fade = (-slope * (back - 4).clamp(min=0)).exp()
        weights = phi(q[:, h] * 0.3**0.5) @ phi(k[:, h // 2] * 0.3**0.5).mT * fade * outside
        total = weights.sum(-1, keepdim=True)
        linear = swap.out_scale[h] * (weights @ v[:, h // 2] / total.masked_fill(total == 0, 1))
        beyond = (swap.mix[h] + (q[:, h] * swap.mix_query[h]).sum(-1, keepdim=True)).exp() * total ** swap.mix_sum[h]
        beyond = beyond.masked_fill(total == 0, 0)
        both = window @ v[:, h // 2] + beyond * linear
        expected[:, :, h] = both / (window.sum(-1, keepdim=True) + beyond)
    assert torch.allclose(swap(call), expected, rtol=0, atol=1e-7)


def test_a_joint_layer_mixes_what_its_parts_are():
    """Where the cache has no window yet, as without one, branches and share are one operator."""
    _, _, _, call = call_of()
    swap = layer(feature_map="elu1", normalizer="sum", local={"window": 4, "sinks": 2, "mix": "joint"})
    parts = swap.parts(call)
    mixed = parts.linear * ((1 - parts.share) * swap.out_scale) + parts.local * parts.share
    assert torch.equal(swap(call), mixed)


def test_a_joint_layer_is_the_window_alone_while_nothing_has_left_it():
    _, _, _, call = call_of(length=13)
    swap = layer(feature_map="elu1", normalizer="sum", local={"window": 9, "sinks": 2, "mix": "joint"})
    both = swap(call)
    swap.branch = "local"
    assert torch.equal(swap(call)[:, :11], both[:, :11])
    assert not torch.allclose(swap(call)[:, 11:], both[:, 11:], rtol=0, atol=1e-3)


def test_only_branch_computes_one_branch_at_full_weight(llama):
    model = swapped(llama)
    ids = ids_of(1, 25)
    both = logits_of(model, ids)
    with only_branch(model, "linear"):
        linear = logits_of(model, ids)
    with only_branch(model, "local"):
        local = logits_of(model, ids)
        model_swaps = list(swaps(model).values())
        model_swaps[0].log_slope.data += 1  # the linear branch is not in it
        assert torch.equal(logits_of(model, ids), local)
        model_swaps[0].log_slope.data -= 1
    assert not torch.allclose(linear, both, atol=1e-3)
    assert not torch.allclose(local, both, atol=1e-3)
    assert torch.equal(logits_of(model, ids), both)


@pytest.mark.parametrize("name", FAMILIES)
def test_observed_model_computes_exactly_its_teachers_softmax(name, tiny_family):
    teacher = tiny_family(name)
    model = swapped(teacher, dtype=torch.float32)
    ids = ids_of(2, 17)
    seen = []
    with observing(model, lambda swap, call, output: seen.append((swap.layer_idx, call.q.shape, output.shape))):
        assert torch.equal(logits_of(model, ids), logits_of(teacher, ids))
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert not torch.allclose(logits_of(model, ids), logits_of(teacher, ids), atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_revert_gives_the_teacher_back(name, tiny_family):
    teacher = tiny_family(name)
    model = swapped(teacher, dtype=torch.float32)
    revert_(model)
    ids = ids_of(1, 17)
    assert not swaps(model)
    assert torch.equal(logits_of(model, ids), logits_of(teacher, ids))
    assert torch.equal(greedy(model, ids, 5), greedy(teacher, ids, 5))


def test_hidden_tokens_may_hold_anything(llama):
    model = swapped(llama)
    ids = ids_of(1, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    other = ids.clone()
    other[0, :5] = 77
    assert torch.equal(
        logits_of(model, ids, attention_mask=mask)[:, 5:], logits_of(model, other, attention_mask=mask)[:, 5:]
    )


def test_bf16_model_keeps_outputs_finite_and_near_fp32(llama):
    model = swapped(llama, dtype=torch.float32)
    ids = ids_of(2, 30)
    expected = logits_of(model, ids)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for swap in swaps(half).values():
        swap.float()
    found = logits_of(half, ids).float()
    assert ((found - expected).norm() / expected.norm()) < 0.1
    assert half.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 34)


def test_gradients_reach_every_parameter_of_a_swap(llama):
    spec = ConvertSpec.model_validate({"decay": {"learnable": True}, "local": {"window": 5}})
    model = swapped(llama, spec)
    model(input_ids=ids_of(2, 20), use_cache=False).logits.square().mean().backward()
    for path, swap in swaps(model).items():
        for name, parameter in swap.named_parameters():
            assert parameter.grad is not None, (path, name)
            assert parameter.grad.abs().sum() > 0, (path, name)


def test_autocast_reaches_the_operators(tiny_llama):
    """RoPE hands on fp32 queries and keys; a kernel would then multiply everything in fp32."""
    from lightning_attention import local_attention

    model = tiny_llama()
    apply_(model, plan(model.config, ConvertSpec()))
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):

        def spy(q, k, v, **options):
            seen.append({q.dtype, k.dtype, v.dtype})
            return local_attention(q, k, v, **options)

        patch.setattr("swapattn.swap.local_attention", spy)
        model(torch.arange(12)[None])
    assert seen == [{torch.bfloat16}] * 2
