"""Decay schedules and feature maps against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from swapattn.decay import decay_slopes, slope_of_distance
from swapattn.feature_map import FEATURE_MAPS
from swapattn.recipe import POSITIVE_MAPS

FORMULAS = {
    "alibi": lambda h, heads, layer, layers: 2 ** (-8 * (h + 1) / heads),
    "minimax": lambda h, heads, layer, layers: 2 ** (-8 * (h + 1) / heads) * (1 - layer / (layers - 1) + 1e-5),
    "transnormer": lambda h, heads, layer, layers: 8 * (h + 1) / heads * (1 - layer / layers),
    "retnet": lambda h, heads, layer, layers: -math.log(1 - 2 ** (-5 - h)),
    "none": lambda h, heads, layer, layers: 0.0,
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(("heads", "layer", "layers"), [(4, 0, 3), (6, 2, 3), (1, 1, 30)])
def test_slopes_are_those_of_the_formula(schedule, heads, layer, layers):
    expected = [FORMULAS[schedule](h, heads, layer, layers) for h in range(heads)]
    found = decay_slopes(schedule, heads, layer, layers)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert bool((found >= 0).all())


def test_a_model_of_one_layer_has_slopes():
    assert torch.isfinite(decay_slopes("minimax", 4, 0, 1)).all()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown decay schedule 'lightning'"):
        decay_slopes("lightning", 4, 0, 2)


def test_the_slope_halves_the_weight_at_the_distance():
    slopes = slope_of_distance(torch.tensor([1.0, 10.0, 100.0]))
    assert torch.allclose((-slopes * torch.tensor([1.0, 10.0, 100.0])).exp(), torch.tensor(0.5))
    assert slope_of_distance(torch.tensor([1e-3, 1e6])).tolist() == pytest.approx([5.0, 0.001])


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_keep_dtype_and_say_their_width(name):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    feature_map = FEATURE_MAPS[name](3, 8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = feature_map(x.to(dtype))
        assert y.dtype == dtype
        assert y.shape == (2, 5, 3, feature_map.out_dim)
        assert torch.isfinite(y).all()
    assert bool((feature_map(x) >= 0).all()) is (name in POSITIVE_MAPS)


def test_feature_maps_are_their_formulas():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FEATURE_MAPS["identity"](3, 8)(x), x)
    assert torch.allclose(FEATURE_MAPS["silu"](3, 8)(x), x / (1 + (-x).exp()))
    assert torch.allclose(FEATURE_MAPS["elu1"](3, 8)(x), torch.where(x > 0, x + 1, x.exp()))
    assert torch.equal(FEATURE_MAPS["relu"](3, 8)(x), torch.where(x > 0, x, 0.0))
    assert torch.allclose(FEATURE_MAPS["exp"](3, 8)(x), math.e**x)
    assert torch.allclose(FEATURE_MAPS["softmax"](3, 8)(x), x.exp() / x.exp().sum(-1, keepdim=True))


def test_exp_is_finite_in_half_precision_whatever_comes():
    assert torch.isfinite(FEATURE_MAPS["exp"](1, 2)(torch.tensor([60.0, 1e4], dtype=torch.float16))).all()


def test_t2r_is_a_relu_of_one_affine_map_per_head_and_starts_as_relu():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator)
    t2r = FEATURE_MAPS["t2r"](3, 8)
    assert torch.equal(t2r(x), x.relu())
    t2r.weight.data = torch.randn(3, 8, 8, generator=generator)
    t2r.bias.data = torch.randn(3, 8, generator=generator)
    for h in range(3):
        expected = (x[:, :, h] @ t2r.weight[h] + t2r.bias[h]).clamp(min=0)
        assert torch.allclose(t2r(x)[:, :, h], expected, atol=1e-5)


def test_hedgehog_has_one_matrix_per_head_and_starts_as_twice_the_identity():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    hedgehog = FEATURE_MAPS["hedgehog"](3, 8)
    weights = torch.cat((2 * x, -2 * x), -1).exp()
    assert torch.allclose(hedgehog(x), weights / weights.sum(-1, keepdim=True))
    before = hedgehog(x)
    hedgehog.weight.data[1, 0, 2] += 1.0  # feature 2 of head 1 now also reads channel 0
    changed = (hedgehog(x) - before).abs().amax((0, 1, 3)) > 0
    assert changed.tolist() == [False, True, False]
    weights = torch.cat((2 * x[:, :, 1], -2 * x[:, :, 1]), -1)
    weights[..., 2] += x[:, :, 1, 0]
    weights[..., 10] -= x[:, :, 1, 0]
    assert torch.allclose(hedgehog(x)[:, :, 1], weights.softmax(-1), atol=1e-6)
