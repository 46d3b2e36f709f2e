"""Each option of the swapped layer: its published formula, gradients, one result with a cache, padding, reloading."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from swapattn.attention import AttentionCall, LightningSwap, swaps
from swapattn.conversion import convert
from swapattn.modeling import load
from swapattn.norms import HeadNorm
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.surgery import apply_, plan

LOCAL = {"window": 5, "sinks": 2, "share": 0.4}
OPTIONS = {
    "relu": {"feature_map": "relu", "normalizer": "sum", "local": None},
    "exp": {"feature_map": "exp", "normalizer": "sum", "local": None},
    "t2r": {"feature_map": "t2r", "normalizer": "sum", "local": LOCAL},
    "qk_norm": {"qk_norm": "rms", "feature_map": "identity", "normalizer": "rms", "local": LOCAL},
    "rms_all": {"feature_map": "silu", "normalizer": "rms_all", "local": None},
}


@pytest.fixture(params=OPTIONS)
def spec(request):
    return OPTIONS[request.param]


def ids_of(rows, length, seed=3):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def swapped(model, values, dtype=torch.float64, noise=0.3):
    """A swapped copy of a model whose new parameters are moved away from their start."""
    model = copy.deepcopy(model)
    apply_(model, plan(model.config, ConvertSpec.model_validate(values)))
    move(model, noise)
    return model.to(dtype)


def move(model, noise=0.3):
    generator = torch.Generator().manual_seed(1)
    for swap in swaps(model).values():
        for name, parameter in swap.named_parameters():
            if name != "log_slope":
                parameter.data += noise * torch.randn(parameter.shape, generator=generator)


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
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def llama(tiny_family):
    return tiny_family("llama")  # 4 query heads on 2 KV heads


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefill_chunk_and_single_steps_equal_the_full_forward(spec, name, tiny_family):
    model = swapped(tiny_family(name), spec)
    ids = ids_of(2, 22)
    full = logits_of(model, ids)
    assert torch.isfinite(full).all()
    assert torch.allclose(through_cache(model, ids, [9, 8, 2, 1, 1, 1]), full, rtol=0, atol=1e-6)


def test_padded_rows_equal_the_same_tokens_alone(spec, llama):
    model = swapped(llama, spec)
    ids = ids_of(3, 16)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, 11:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(found[0, 9:], logits_of(model, ids[:1, 9:])[0], rtol=0, atol=1e-6)
    assert torch.allclose(found[1, :11], logits_of(model, ids[1:2, :11])[0], rtol=0, atol=1e-6)
    assert torch.allclose(found[2], logits_of(model, ids[2:])[0], rtol=0, atol=1e-6)
    model.generation_config.pad_token_id = 1
    tokens = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[:1, 9:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[:, 9:], alone)


def test_packed_sequences_equal_separate_ones(spec, llama):
    model = swapped(llama, spec)
    ids = ids_of(1, 21)
    lengths = [4, 9, 1, 7]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits_of(model, ids, position_ids=positions)
    separate = torch.cat([logits_of(model, piece) for piece in ids.split(lengths, 1)], 1)
    assert torch.allclose(packed, separate, rtol=0, atol=1e-6)


def test_training_gives_every_parameter_gradient_from_the_start(spec, llama):
    model = swapped(llama, spec, dtype=torch.float32, noise=0)
    model(input_ids=ids_of(2, 20), use_cache=False).logits.square().mean().backward()
    for path, swap in swaps(model).items():
        for name, parameter in swap.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (path, name)
                assert parameter.grad.abs().sum() > 0, (path, name)
                assert torch.isfinite(parameter.grad).all(), (path, name)


def test_the_option_is_stored_and_survives_saving(spec, tiny_teacher, tmp_path):
    recipe = parse_recipe({"name": "mine", "convert": spec})
    model, _ = load(convert(tiny_teacher, tmp_path / "c", recipe=recipe).path)
    move(model)
    expected = logits_of(model, ids_of(1, 12))
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert torch.equal(logits_of(again, ids_of(1, 12)), expected)
    assert ConvertSpec.model_validate(again.config.swapattn["spec"]) == recipe.convert
    half = swaps(load(tmp_path / "again", dtype=torch.bfloat16)[0])
    assert {parameter.dtype for swap in half.values() for parameter in swap.parameters()} == {torch.float32}


def call_of(seed=0, length=9, **more):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    return AttentionCall(q, k, v, 0.3, None, 0, **more)


def layer(slopes=(0.2, 0.7), **values):
    shape = {"layer_idx": 0, "heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8, "hidden_size": 32}
    values = {"feature_map": "identity", "normalizer": "none", "local": None, **values}
    spec = ConvertSpec.model_validate(values).model_dump(mode="json")
    return LightningSwap(shape, spec, torch.tensor(slopes)).double()


def plain(q, k, v, slopes=(0.2, 0.7), scaling=0.3):
    """Σ_{s≤t} λ^{t−s} (q_t·k_s) v_s with two query heads on each key head, `[B, T, 4, D]`."""
    t = torch.arange(q.shape[1])
    back = (t[:, None] - t).clamp(min=0)
    heads = []
    for h in range(4):
        weights = scaling * q[:, :, h] @ k[:, :, h // 2].mT * (-slopes[h // 2] * back).exp()
        heads.append(weights.tril() @ v[:, :, h // 2])
    return torch.stack(heads, 2)


def rms(x, dims=(-1,)):
    return x / (x.square().mean(dims, keepdim=True) + 1e-6).sqrt()


def test_the_qk_norm_is_an_rms_norm_with_a_gain_per_head():
    call = call_of()
    swap = layer(qk_norm="rms")
    swap.q_norm.gain.data = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    swap.k_norm.gain.data = torch.tensor([0.7, 1.3]).double()
    q, k = rms(call.q) * swap.q_norm.gain[:, None], rms(call.k) * swap.k_norm.gain[:, None]
    assert torch.allclose(swap(call), plain(q, k, call.v), atol=1e-7)


def test_a_head_norm_commutes_with_a_rotation():
    x = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    norm = HeadNorm(2)
    norm.gain.data = torch.tensor([0.5, 2.0])
    assert torch.allclose(norm(x @ turn), norm(x) @ turn, atol=1e-6)


@pytest.mark.parametrize(("normalizer", "dims"), [("rms", (-1,)), ("rms_all", (-2, -1))])
def test_output_norms_average_over_a_head_or_over_all(normalizer, dims):
    call = call_of()
    assert torch.allclose(layer(normalizer=normalizer)(call), rms(plain(call.q, call.k, call.v), dims), atol=1e-7)
