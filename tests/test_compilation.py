"""Compiled decoder layers compute what the layers compute."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from swapattn.compilation import compiled_error, compiled_layers
from swapattn.errors import RecipeError
from swapattn.objectives import align_loss, distill_loss, layer_error
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.stages import DistillStage
from swapattn.surgery import apply_, plan

STAGE = {"stage": "distill", "length": 24, "batch": 4, "tokens": 96, "learning_rate": 1e-3}


def build(model, **values):
    apply_(model, plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2}, **values})))
    return model


def gradients(model, teacher, ids):
    model.zero_grad()
    loss = distill_loss(model, ids, stage=DistillStage.model_validate(STAGE), teacher=teacher)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), found


GATED = {"decay": {"gate": True, "half_lives": [3]}, "output_gate": "head", "local": None, "normalizer": "sum"}


@pytest.mark.parametrize(
    "values", [pytest.param({}, marks=pytest.mark.slow), {"local": {"window": 6, "sinks": 2, "mix": "joint"}}, GATED]
)
@pytest.mark.parametrize("separate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_loss_and_gradients_stay_and_each_class_compiles_few_graphs(tiny_family, separate, values):
    torch._dynamo.reset()
    model = build(tiny_family("llama", num_hidden_layers=4), keep_softmax=(0,), **values)
    teacher = tiny_family("llama", num_hidden_layers=4).eval().requires_grad_(False) if separate else None
    ids = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, wanted = gradients(model, teacher, ids)
    counter = CompileCounterWithBackend("aot_eager")
    with compiled_layers(*([model] if teacher is None else [model, teacher]), backend=counter):
        loss, found = gradients(model, teacher, ids)
        graphs = counter.frame_count
        assert gradients(model, teacher, ids)[0] == loss
        assert counter.frame_count == graphs, "the second step compiled anew"
    assert 0 < graphs <= 3, "layers do not share their graph"
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_the_error_of_a_layer_compiles_once_for_all_layers(tiny_family):
    torch._dynamo.reset()
    model = build(tiny_family("llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".swap." in name)
    ids = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    swap = model.model.layers[1].self_attn.swap
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_error(backend=counter)
    found = []
    for error in (layer_error, compiled, compiled):
        model.zero_grad()
        loss = align_loss(model, ids, error=error)
        loss.backward()
        found.append((float(loss.detach()), swap.q_map.weight.grad.clone()))
    assert counter.frame_count == 1
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def test_compile_and_gradient_checkpointing_are_one_or_the_other():
    both = {**STAGE, "compile": True, "gradient_checkpointing": True}
    with pytest.raises(RecipeError, match="leave one of them out"):
        parse_recipe({"name": "x", "distill": {"stages": [both]}})
