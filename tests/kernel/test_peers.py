"""The op and the layer against implementations that are not ours."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning_attention import lightning_attention
from torch.nn import functional as F

from swapattn.decay import decay_slopes
from swapattn.inputs import LayerInputs
from swapattn.swap import LightningSwap
from swapattn.wheels import CarriedWheel, unpacked

FLA = CarriedWheel(
    "fla-core",
    "0.6.0",
    "b0708b70e0b119cd58a0a5146ea56cb175cef6ed969d8ac60267e3e077ce3ebd",
    megabytes=1,
    members=("fla/ops/simple_gla/naive.py", "*.dist-info/licenses/LICENSE"),
)


def results(form, leaves):
    """Output, final state and the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, state = form(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (out, state))
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.real
@pytest.mark.parametrize("slope", [0.0, 0.0039, 0.96, 7.9, "data"])
def test_recurrence_of_fla(slope, monkeypatch):
    """flash-linear-attention's recurrence token by token, the file alone: its package needs a GPU's Triton."""
    if importlib.util.find_spec("einops") is None:  # imported there, for another function
        monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=None))
    spec = importlib.util.spec_from_file_location("naive", unpacked(FLA) / "fla/ops/simple_gla/naive.py")
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 150, 4, 16, generator=generator)
    state = torch.randn(2, 4, 16, 16, generator=generator)
    shape = (2, 150, 4)
    log_decay = -torch.rand(shape, generator=generator) if slope == "data" else torch.full(shape, -slope)

    def theirs(q, k, v, log_decay, state):
        return naive.naive_recurrent_simple_gla(q, k, v, log_decay, initial_state=state, output_final_state=True)

    def ours(q, k, v, log_decay, state):
        return lightning_attention(q, k, v, log_decay, initial_state=state, output_final_state=True)

    leaves = (q, k, v, log_decay, state)
    for found, wanted in zip(results(ours, leaves), results(theirs, leaves), strict=True):
        assert (found - wanted).norm() <= 1e-5 * max(wanted.norm(), 0.1 * wanted.numel() ** 0.5)


@pytest.fixture
def tiny_minimax():
    """A random MiniMax of four layers, lightning attention in three of them."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MiniMaxConfig(
            vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, block_size=8, num_local_experts=2, initializer_range=0.3,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
            layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        )  # fmt: skip
        model = MiniMaxForCausalLM(config).eval()
        for layer in model.model.layers[:2]:
            layer.self_attn.norm.weight.data.uniform_(0.5, 2.0)
        return model


def as_swapped(attention, layer):
    """The forward of MiniMax's lightning attention by our layer, on the same parameters."""
    heads, dim = attention.num_attention_heads, attention.head_dim
    shape = {"layer_idx": layer, "heads": heads, "kv_heads": heads, "head_dim": dim, "value_dim": dim,
             "hidden_size": attention.qkv_proj.in_features, "rotary": 0}  # fmt: skip
    spec = {"decay": {"per": "kv_head", "learnable": False}, "normalizer": "rms_all", "feature_map": "silu",
            "local": None, "output_gate": "channel"}  # fmt: skip
    swap = LightningSwap(shape, spec, decay_slopes("minimax", heads, layer, 4))
    del swap.out_scale, swap.output_gate.weight

    def forward(hidden_states, position_embeddings=None, attention_mask=None, **_):
        mask = None if attention_mask is None else attention_mask.bool()
        packed = attention.qkv_proj(hidden_states).unflatten(2, (heads, 3 * dim))
        q, k, v = (x.transpose(1, 2) for x in packed.split(dim, 3))
        swap.out_scale = attention.norm.weight.view(heads, dim) / 2  # our gate is twice the sigmoid
        swap.output_gate.weight = attention.output_gate.weight
        swap.found.inputs = LayerInputs(hidden_states, None)
        out = swap(swap.call(q, k, F.silu(v), mask, 0, {"scaling": 1.0}))
        return attention.out_proj(out.flatten(2)), None

    return forward


@pytest.mark.parametrize(("padded", "kernels"), [(False, "torch"), (True, "torch"), (False, "triton")])
def test_lightning_layers_of_minimax(tiny_minimax, padded, kernels, monkeypatch):
    """Its slopes, SiLU, norm and gate: logits and the gradient of every parameter are those of transformers."""
    monkeypatch.setenv("SWAPATTN_KERNELS", kernels)
    tokens = torch.arange(2 * 21).view(2, 21) % 50
    mask = torch.ones(2, 21, dtype=torch.long)
    if padded:
        mask[1, :9] = 0

    def run():
        tiny_minimax.zero_grad()
        logits = tiny_minimax(tokens, attention_mask=mask, use_cache=False).logits
        (logits * mask[..., None]).sin().sum().backward()
        return logits[mask.bool()].detach(), {name: x.grad for name, x in tiny_minimax.named_parameters()}

    wanted, slopes = run(), []
    for i, layer in enumerate(tiny_minimax.model.layers):
        if hasattr(layer.self_attn, "slope_rate"):
            slopes.append((decay_slopes("minimax", 4, i, 4) - layer.self_attn.slope_rate.flatten()).abs().max())
            monkeypatch.setattr(layer.self_attn, "forward", as_swapped(layer.self_attn, i))
    found = run()
    assert len(slopes) == 3
    assert max(slopes) < 1e-5  # theirs add 1e-5 once more, to the number of layers
    assert (found[0] - wanted[0]).norm() <= 1e-4 * wanted[0].norm()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-3 * gradient.norm(), name
