"""Each option of the swapped layer: its published formula, gradients, one result with a cache, padding, reloading."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from swapattn.attention import observing, only_branch, swaps
from swapattn.call import AttentionCall
from swapattn.conversion import convert
from swapattn.errors import UnsupportedModelError
from swapattn.loading import load, load_teacher
from swapattn.norms import HeadNorm
from swapattn.objectives import align_loss
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.surgery import AttentionSite, _check_options, apply_, plan, revert_
from swapattn.swap import LightningSwap, of_queries

LOCAL = {"window": 5, "sinks": 2, "share": 0.4}
OPTIONS = {
    "relu": {"feature_map": "relu", "normalizer": "sum", "local": None},
    "exp": {"feature_map": "exp", "normalizer": "sum", "local": None},
    "t2r": {"feature_map": "t2r", "normalizer": "sum", "local": LOCAL},
    "qk_norm": {"qk_norm": "rms", "feature_map": "identity", "normalizer": "rms", "local": LOCAL},
    "rms_all": {"feature_map": "silu", "normalizer": "rms_all", "local": None},
    "decay_gate": {"feature_map": "elu1", "decay": {"gate": True}, "local": LOCAL},
    "decay_gate_heads": {"feature_map": "elu1", "decay": {"gate": True, "per": "query_head"}, "local": None},
    "head_gate": {"feature_map": "elu1", "output_gate": "head", "local": LOCAL},
    "channel_gate": {"feature_map": "silu", "normalizer": "rms", "output_gate": "channel", "local": None},
    "joint": {"feature_map": "hedgehog_mlp", "local": {**LOCAL, "mix": "joint"}},
    "joint_gates": {"feature_map": "elu1", "decay": {"gate": True}, "local": {**LOCAL, "mix": "joint", "sinks": 0}},
    "half_lives": {"feature_map": "hedgehog", "decay": {"half_lives": [3]}, "local": None},
    "signed": {"feature_map": "hedgehog", "decay": {"half_lives": [3], "signed": True}, "local": None},
    "joint_signed": {
        "feature_map": "elu1",
        "decay": {"half_lives": [2.5], "signed": True},
        "local": {**LOCAL, "mix": "joint"},
    },
    "joint_half_lives": {
        "feature_map": "elu1",
        "decay": {"gate": True, "per": "query_head", "half_lives": [2.5]},
        "local": {**LOCAL, "mix": "joint"},
    },
    "joint_rope": {"feature_map": "elu1", "rope": {"linear": "drop"}, "local": {**LOCAL, "mix": "joint"}},
    "rope_linear": {"feature_map": "elu1", "rope": {"linear": "drop"}, "local": LOCAL},
    "rope_both": {
        "feature_map": "elu1",
        "rope": {"linear": "drop", "kept": "drop"},
        "keep_softmax": [1],
        "local": None,
    },
}
TOGETHER = {"qk_norm": "rms", "feature_map": "elu1", "decay": {"gate": True}, "output_gate": "head", "local": LOCAL}


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


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_prefill_chunk_and_single_steps_equal_the_full_forward(spec, name, tiny_family):
    model = swapped(tiny_family(name), spec)
    ids = ids_of(2, 22)
    full = logits_of(model, ids)
    assert torch.isfinite(full).all()
    assert torch.allclose(through_cache(model, ids, [9, 8, 2, 1, 1, 1]), full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "gpt2", "opt", "phi3", "cohere", "qwen3", "mistral"])
def test_gates_and_norms_together_in_other_families(name, tiny_family):
    model = swapped(tiny_family(name), TOGETHER)
    ids = ids_of(2, 18)
    full = logits_of(model, ids)
    assert torch.allclose(through_cache(model, ids, [9, 7, 1, 1]), full, rtol=0, atol=1e-6)
    for swap in swaps(model).values():
        swap.output_gate.weight.data.zero_()
    assert not torch.allclose(logits_of(model, ids), full, rtol=0, atol=1e-3), "the gate reads nothing"


def test_aligning_trains_the_gates_on_the_teachers_inputs(llama):
    model = swapped(llama, TOGETHER, torch.float32, noise=0)
    for recompute in (False, True):
        model.zero_grad()
        align_loss(model, ids_of(2, 20), recompute=recompute).backward()
        for swap in swaps(model).values():
            for gate in (swap.decay_gate, swap.output_gate):
                assert gate.weight.grad.abs().sum() > 0
            assert swap.found.inputs is None


def test_recomputed_activations_give_the_same_gradients(llama):
    found = []
    for recompute in (False, True):
        model = swapped(llama, {**TOGETHER, "rope": {"linear": "drop"}}, torch.float32)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids_of(2, 20), use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-9) for name, grad in found[0].items())


def test_every_option_compiles_into_one_graph(llama):
    model = swapped(llama, {**TOGETHER, "rope": {"linear": "drop", "kept": "drop"}, "keep_softmax": [1]}, torch.float32)
    ids = ids_of(2, 1)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, logits_of(model, ids), rtol=0, atol=1e-5)


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
    ids = ids_of(2, 15)
    cuts = [[4, 9, 2], [7, 8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in cuts])
    packed = logits_of(model, ids, position_ids=positions)
    for row, cut in enumerate(cuts):
        separate = torch.cat([logits_of(model, piece) for piece in ids[row : row + 1].split(cut, 1)], 1)
        assert torch.allclose(packed[row : row + 1], separate, rtol=0, atol=1e-6)


def test_training_gives_every_parameter_gradient_from_the_start(spec, llama):
    model = swapped(llama, spec, dtype=torch.float32, noise=0)
    model(input_ids=ids_of(2, 20), use_cache=False).logits.square().mean().backward()
    for path, swap in swaps(model).items():
        for name, parameter in swap.named_parameters():
            if parameter.requires_grad and not name.endswith("_map.up"):  # what follows starts as 0
                assert parameter.grad is not None, (path, name)
                assert parameter.grad.abs().sum() > 0, (path, name)
                assert torch.isfinite(parameter.grad).all(), (path, name)


def test_the_option_is_stored_and_survives_saving(spec, tiny_teacher, tmp_path):
    recipe = parse_recipe({"name": "mine", "convert": spec})
    model, _ = load(convert(tiny_teacher, tmp_path / "c", recipe=recipe).path)
    direct, _ = load_teacher(tiny_teacher)
    apply_(direct, plan(direct.config, recipe.convert))
    assert torch.equal(logits_of(model, ids_of(1, 12)), logits_of(direct, ids_of(1, 12)))
    move(model)
    expected = logits_of(model, ids_of(1, 12))
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert torch.equal(logits_of(again, ids_of(1, 12)), expected)
    assert ConvertSpec.model_validate(again.config.swapattn["spec"]) == recipe.convert
    half = swaps(load(tmp_path / "again", dtype=torch.bfloat16)[0])
    assert {parameter.dtype for swap in half.values() for parameter in swap.parameters()} == {torch.float32}


def call_of(seed=0, length=9):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    hidden = torch.randn(2, length, 32, generator=generator, dtype=torch.float64)
    return AttentionCall(q, k, v, 0.3, None, 0, hidden=hidden)


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


def filled(parameter, seed=7, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parameter.data


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_the_decay_gate_is_the_step_size_of_mamba_2(per):
    call = call_of()
    slopes = (0.2, 0.7) if per == "kv_head" else (0.2, 0.3, 0.7, 1.1)
    swap = layer(slopes, decay={"gate": True, "per": per})
    weight = filled(swap.decay_gate.weight)
    step = (1 + (call.hidden @ weight.T + swap.decay_gate.bias).exp()).log()  # [B, T, Hs]
    expected = torch.zeros(2, 9, 4, 8, dtype=torch.float64)
    for h in range(4):
        state = h // 2 if per == "kv_head" else h
        memory = torch.zeros(2, 8, 8, dtype=torch.float64)
        for t in range(9):
            memory *= (-slopes[state] * step[:, t, state]).exp()[:, None, None]
            memory += call.k[:, t, h // 2, :, None] * call.v[:, t, h // 2, None, :]
            expected[:, t, h] = 0.3 * (call.q[:, t, h, None] @ memory)[:, 0]
    assert torch.allclose(swap(call), expected, atol=1e-7)
    assert float(step.detach().std()) > 0.1


def test_further_half_lives_are_attentions_under_one_denominator():
    call = call_of()
    swap = layer((0.2, 0.7, 0.05, 0.05, 1.1, 1.1), feature_map="elu1", normalizer="sum", decay={"half_lives": [9, 0.6]})
    merge, query = filled(swap.merge), filled(swap.merge_query, seed=8)
    root, above, below = 0.3**0.5, 0.0, 0.0
    q, k = (F.elu(root * x) + 1 for x in (call.q, call.k))
    for branch, slopes in enumerate(((0.2, 0.7), (0.05, 0.05), (1.1, 1.1))):
        factor = 1.0
        if branch:
            factor = (merge[branch - 1] + torch.einsum("bthd,hd->bth", call.q, query[branch - 1])).exp()[..., None]
        above = above + factor * plain(q, k, call.v, slopes, 1.0)
        below = below + factor * plain(q, k, torch.ones_like(call.v), slopes, 1.0)
    assert torch.allclose(swap(call), above / below, atol=1e-6)


def test_signed_branches_are_subtracted_with_weights_that_sum_to_one():
    call = call_of()
    decay = {"half_lives": [0.6], "signed": True}
    swap = layer((0.2, 0.7, 1.1, 1.1), feature_map="elu1", normalizer="sum", decay=decay)
    shift, query = filled(swap.shift), filled(swap.shift_query, seed=8)
    q, k = (F.elu(0.3**0.5 * x) + 1 for x in (call.q, call.k))
    ones, slopes = torch.ones_like(call.v), ((0.2, 0.7), (1.1, 1.1))
    above, below = (torch.stack([plain(q, k, v, each, 1.0) for each in slopes]) for v in (call.v, ones))
    moved = (torch.einsum("bthd,nhd->nbth", call.q, query) + shift[:, None, None])[..., None]
    weights = below / below.sum(0) + moved - moved.mean(0)
    assert torch.allclose(swap(call), (weights * above / below).sum(0), atol=1e-5)
    assert torch.allclose(weights.sum(0), torch.ones_like(weights[0]), atol=1e-6)
    assert float(weights.min().detach()) < 0


@pytest.mark.parametrize("number", [1, 3])
def test_what_queries_weigh_has_the_gradients_of_a_product(number):
    q = filled(torch.zeros(2, 5, 4, 6, dtype=torch.double)).requires_grad_()
    weights = filled(torch.zeros(number, 4, 6, dtype=torch.double), seed=8).requires_grad_()
    assert torch.allclose(of_queries(q, weights), torch.einsum("bthd,nhd->btnh", q, weights))
    assert torch.autograd.gradcheck(of_queries, (q, weights))
    half = q.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = of_queries(half, weights.float())
    assert found.dtype == torch.float32
    of_q, of_weights = torch.autograd.grad(found.sum(), (half, weights))
    assert torch.allclose(of_q.double(), weights.sum(0).expand_as(q), rtol=2e-2, atol=2e-2)
    assert torch.allclose(of_weights, q.sum((0, 1)).expand(number, -1, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("values", [{"decay": {"gate": True}}, {"output_gate": "head"}, {"output_gate": "channel"}])
def test_a_gate_starts_as_the_layer_without_it(values):
    call = call_of()
    swap = layer(**values)
    assert torch.allclose(swap(call), layer()(call), atol=1e-6)
    for gate in (swap.decay_gate, swap.output_gate):
        if gate is not None:
            filled(gate.weight)
    assert not torch.allclose(swap(call), layer()(call), atol=1e-2)


@pytest.mark.parametrize(("kind", "channels"), [("head", 1), ("channel", 8)])
def test_the_output_gate_is_twice_a_sigmoid_of_the_input(kind, channels):
    call = call_of()
    swap = layer(output_gate=kind)
    weight = filled(swap.output_gate.weight)
    assert weight.shape == (4 * channels, 32)
    factor = 2 / (1 + (-(call.hidden @ weight.T)).exp())
    assert torch.allclose(swap(call), plain(call.q, call.k, call.v) * factor.view(2, 9, 4, channels), atol=1e-7)


def test_under_autocast_the_decay_is_as_exact_as_without(llama):
    gate = swapped(llama, OPTIONS["decay_gate"], torch.float32)
    swap = next(iter(swaps(gate).values()))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = swap.decay_gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(swap.decay_gate(x), expected)


def test_the_module_does_not_hold_on_to_its_input(llama):
    model = swapped(llama, OPTIONS["head_gate"])
    logits_of(model, ids_of(1, 5))
    assert all(swap.found.inputs is None for swap in swaps(model).values())


def test_a_gate_is_refused_where_the_input_is_not_shown():
    site = AttentionSite("attn", 0, 4, 2, 8, 8, None, None, None, False)
    _check_options("odd", ConvertSpec(), (site,))
    for values in ({"decay": {"gate": True}}, {"output_gate": "head"}):
        with pytest.raises(UnsupportedModelError, match=r"'odd' does not show the input .* convert\.(decay|output_)"):
            _check_options("odd", ConvertSpec.model_validate(values), (site,))


def test_a_checkpoint_of_the_first_schema_still_loads(tiny_teacher, tmp_path):
    folder = convert(tiny_teacher, tmp_path / "c", recipe="smoke").path
    expected = logits_of(load(folder)[0], ids_of(1, 12))
    config = json.loads((folder / "config.json").read_text())
    block = config["swapattn"]
    block["version"] = 1
    for key in ("qk_norm", "output_gate", "rope"):
        del block["spec"][key]
    del block["nope"]
    del block["spec"]["decay"]["gate"]
    for shape in block["layers"].values():
        del shape["hidden_size"], shape["rotary"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(load(folder)[0], ids_of(1, 12)), expected)


ROTARY = ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "phi", "gpt_neox", "cohere", "glm", "stablelm", "gpt_oss"]


def precision(name):
    """gpt_oss multiplies its experts in fp32 at most, cohere rotates in fp32."""
    return (torch.float32, 1e-4) if name == "gpt_oss" else (torch.float64, 1e-6)


@contextmanager
def rotated_by_nothing(model, layers):
    """The model with cos = 1 and sin = 0 for the attention of the given layers."""

    def still(_module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    modules = [m for m in model.modules() if getattr(m, "layer_idx", None) in layers and hasattr(m, "config")]
    handles = [m.register_forward_pre_hook(still, with_kwargs=True) for m in modules if hasattr(m, "is_causal")]
    assert len(handles) == len(layers)
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ROTARY)
def test_a_linear_layer_without_rope_sees_what_was_not_rotated(name, tiny_family):
    model = tiny_family(name)
    dtype, near = precision(name)
    values = {"feature_map": "elu1", "local": None}
    ids = ids_of(2, 14)
    kept = swapped(model, values, dtype)
    with rotated_by_nothing(kept, [0, 1, 2]):
        expected = logits_of(kept, ids)
    dropped = swapped(model, {**values, "rope": {"linear": "drop"}}, dtype)
    assert torch.allclose(logits_of(dropped, ids), expected, rtol=0, atol=near)
    assert not torch.allclose(logits_of(kept, ids), expected, rtol=0, atol=1e-3)


def test_beside_a_window_the_linear_branch_takes_over_what_was_not_rotated(llama):
    values, ids = {"feature_map": "elu1", "local": {**LOCAL, "mix": "joint"}}, ids_of(2, 14)
    kept, dropped = (swapped(llama, {**values, "rope": {"linear": how}}) for how in ("keep", "drop"))
    with only_branch(kept, "linear"), only_branch(dropped, "linear"):
        with rotated_by_nothing(kept, [0, 1, 2]):
            expected = logits_of(kept, ids)
        assert torch.allclose(logits_of(dropped, ids), expected, rtol=0, atol=1e-9)
        assert not torch.allclose(logits_of(kept, ids), expected, rtol=0, atol=1e-3)


def test_the_window_beside_it_keeps_its_rope(llama):
    ids = ids_of(2, 14)
    with_rope, without = (swapped(llama, {"local": LOCAL, "rope": {"linear": how}}) for how in ("keep", "drop"))
    assert not torch.allclose(logits_of(with_rope, ids), logits_of(without, ids), atol=1e-3)
    with only_branch(with_rope, "local"), only_branch(without, "local"):
        assert torch.equal(logits_of(with_rope, ids), logits_of(without, ids))


@pytest.mark.parametrize("name", ROTARY)
def test_kept_layers_without_rope_are_rotated_by_nothing(name, tiny_family):
    model = tiny_family(name)
    dtype, _ = precision(name)
    values = {"feature_map": "elu1", "keep_softmax": [0, 2], "local": None}
    ids = ids_of(2, 14)
    kept = swapped(model, values, dtype)
    with rotated_by_nothing(kept, [0, 2]):
        expected = logits_of(kept, ids)
    dropped = swapped(model, {**values, "rope": {"kept": "drop"}}, dtype)
    assert torch.equal(logits_of(dropped, ids), expected)
    assert not torch.allclose(logits_of(kept, ids), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_a_model_without_rope_is_still_its_own_teacher_and_can_be_reverted(name, tiny_family):
    teacher = tiny_family(name)
    model = swapped(teacher, OPTIONS["rope_both"], torch.float32)
    ids = ids_of(2, 14)
    before = logits_of(model, ids)
    with observing(model, lambda *_: None):
        assert torch.equal(logits_of(model, ids), logits_of(teacher, ids))
    assert torch.equal(logits_of(model, ids), before)
    assert not torch.allclose(before, logits_of(teacher, ids), atol=1e-3)
    revert_(model)
    assert torch.equal(logits_of(model, ids), logits_of(teacher, ids))
    assert not any("nope" in path for path, _ in model.named_modules())


def test_layers_that_never_rotate_are_left_as_they_are(tiny_family):
    found = plan(tiny_family("smollm3", num_hidden_layers=4).config, ConvertSpec.model_validate(OPTIONS["rope_linear"]))
    assert [site.rotary for site in found.swap] == [8, 8, 8, 0]


def test_a_share_of_kept_layers_goes_without_rope_too(llama):
    spec = ConvertSpec.model_validate({"keep_softmax": {"share": 0.3, "first": 1}, "rope": {"kept": "drop"}})
    assert plan(llama.config, spec).nope() == ["model.layers.0.self_attn"]


def test_a_module_that_does_not_run_by_itself_is_refused(tiny_family, monkeypatch):
    def broken(*_):
        raise IndexError("odd")

    monkeypatch.setattr("swapattn.rotary_check._tried", broken)
    with pytest.raises(UnsupportedModelError, match=r"cannot be undone; leave convert.rope.linear at keep"):
        plan(tiny_family("llama").config, ConvertSpec.model_validate(OPTIONS["rope_linear"]))


@pytest.mark.parametrize("rope", [{"linear": "drop"}, {"kept": "drop"}])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropping_rope_is_refused_where_there_is_none_to_drop(name, rope, tiny_family):
    spec = ConvertSpec.model_validate({"keep_softmax": [0], "rope": rope})
    with pytest.raises(UnsupportedModelError, match=f"'{name}' hands no rotary embedding .* convert.rope"):
        plan(tiny_family(name).config, spec)


@pytest.mark.parametrize(
    ("name", "becomes"),
    [("llama", "drop"), ("smollm3", "drop"), ("gpt2", "keep"), ("bloom", "keep"), ("opt", "keep")],
)
def test_auto_drops_rope_where_that_can_be_done(name, becomes, tiny_family):
    config = tiny_family(name).config
    auto, said = (
        plan(config, ConvertSpec.model_validate({"rope": {"linear": how}, "local": None})) for how in ("auto", becomes)
    )
    assert auto == said
    assert auto.config_block()["spec"]["rope"] == {"linear": becomes, "kept": "keep"}


def test_auto_keeps_the_rope_that_cannot_be_undone(tiny_family, monkeypatch):
    monkeypatch.setattr("swapattn.rotary_check._tried", lambda *_: None)
    found = plan(tiny_family("llama").config, ConvertSpec.model_validate({"rope": {"linear": "auto"}}))
    assert found.spec.rope.linear == "keep"
    assert not any(site.rotary for site in found.swap)


def test_a_rotation_that_is_not_undone_is_refused(tiny_family, monkeypatch):
    def turned_at_the_end(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = (x.unsqueeze(unsqueeze_dim)[..., :4] for x in (cos, sin))
        half = lambda x: torch.cat((-x[..., 2:], x[..., :2]), -1)  # noqa: E731
        turn = lambda x: torch.cat((x[..., :4], x[..., 4:] * cos + half(x[..., 4:]) * sin + sin), -1)  # noqa: E731
        return turn(q), turn(k)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", turned_at_the_end)
    with pytest.raises(UnsupportedModelError, match=r"rotary embedding of model.layers.0.self_attn cannot be undone"):
        plan(tiny_family("llama").config, ConvertSpec.model_validate(OPTIONS["rope_linear"]))
