"""Closed-form start values against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swapattn.attention import observing, swaps
from swapattn.calibration import SHARE_RANGE, SINKS_LEFT_OUT, _Gram, attention_distance, calibrate_, fit_output_
from swapattn.call import AttentionCall
from swapattn.errors import TrainingError
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan


def build(tiny_family, name="llama", **values):
    model = tiny_family(name)
    apply_(model, plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2}, **values})))
    return model


def ids_of(rows, length, seed=3):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def brute_distance(call):
    """Mean of t − s under the softmax weights, keys 0 to 3 left out."""
    found = []
    for h in range(call.q.shape[2]):
        moment = mass = 0.0
        for q, k in zip(call.q[:, :, h], call.k[:, :, h // (call.q.shape[2] // call.k.shape[2])], strict=True):
            for t in range(q.shape[0]):
                p = (k[: t + 1] @ q[t] * call.scaling).double().softmax(0)
                moment += sum(float(p[s]) * (t - s) for s in range(4, t + 1))
                mass += sum(float(p[s]) for s in range(4, t + 1))
        found.append(max(1.0, moment / mass))
    return torch.tensor(found)


def test_the_attention_distance_is_the_mean_over_pairs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 19, 8, generator=generator) for h in (4, 2, 2))
    call = AttentionCall(q, k, v, 0.8, None, 0)
    assert torch.allclose(attention_distance(call), brute_distance(call), rtol=1e-4)


@pytest.mark.parametrize(("softcap", "window"), [(2.0, None), (None, 6), (2.0, 6)])
def test_the_attention_distance_is_that_of_a_softcap_and_a_sliding_window(softcap, window):
    q, k, v = (torch.randn(2, 4, 19, 8, generator=torch.Generator().manual_seed(i)) * 2 for i in range(3))
    call = AttentionCall(q, k, v, 0.8, None, 0)
    plain = attention_distance(call)
    call.softcap, call.sliding_window = softcap, window
    scores = 0.8 * q @ k.mT
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    back = torch.arange(19)[:, None] - torch.arange(19)
    p = scores.masked_fill((back < 0) | (back >= (window or 19)), -torch.inf).softmax(-1)[..., SINKS_LEFT_OUT:]
    expected = (p * back[:, SINKS_LEFT_OUT:].clamp(min=0)).sum((0, 2, 3)) / p.sum((0, 2, 3))
    assert torch.allclose(attention_distance(call), expected.clamp(min=1), rtol=1e-4)
    assert not torch.allclose(plain, expected, rtol=1e-2)


def test_the_teachers_softcap_and_window_reach_the_measurement(tiny_family):
    model = tiny_family("gemma2")
    apply_(model, plan(model.config, ConvertSpec()))
    seen = []
    with observing(model, lambda swap, call, _: seen.append((call.softcap, call.sliding_window))):
        model(input_ids=torch.arange(2, 12)[None], use_cache=False)
    assert seen == [(5.0, 6), (5.0, None), (5.0, 6)]


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_slopes_halve_at_the_measured_distance(tiny_family, per):
    model = build(tiny_family, decay={"per": per})
    ids = ids_of(2, 40)
    distances = {}
    with observing(model, lambda swap, call, _: distances.update({swap: brute_distance(call)})), torch.no_grad():
        model(input_ids=ids)
    calibrate_(model, [ids], output=False)
    for swap in swaps(model).values():
        distance = distances[swap]
        if per == "kv_head":
            distance = distance.view(2, 2).log().mean(1).exp()
        assert torch.allclose(-swap.log_decay, math.log(2) / distance, rtol=1e-4)


def test_further_half_lives_stay_as_the_recipe_says(tiny_family):
    first = build(tiny_family)
    model = build(tiny_family, decay={"half_lives": [3, 1.5]})
    for each in (first, model):
        calibrate_(each, [ids_of(2, 40)], output=False)
    for swap, alone in zip(swaps(model).values(), swaps(first).values(), strict=True):
        expected = [*alone.log_decay.tolist(), *[-math.log(2) / 3] * 2, *[-math.log(2) / 1.5] * 2]
        assert torch.allclose(swap.log_decay, torch.tensor(expected))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_a_qk_norm_keeps_the_teachers_mean_norms(tiny_family, name):
    model = build(tiny_family, name, qk_norm="rms")
    ids = ids_of(4, 40)
    calibrate_(model, ids.split(2), output=False)
    seen = {}
    with observing(model, lambda swap, call, _: seen.update({swap: call})), torch.no_grad():
        model(input_ids=ids)
    for swap, call in seen.items():
        for norm, x in ((swap.q_norm, call.q), (swap.k_norm, call.k)):
            teacher, normed = x.norm(dim=-1), norm(x).detach().norm(dim=-1)
            assert torch.allclose(normed.mean((0, 1)), teacher.mean((0, 1)), rtol=1e-3)
            assert float(normed.std(dim=(0, 1)).max()) < 1e-3 * float(teacher.max())
            teacher = teacher.mean((0, 1))
            assert float((teacher / teacher.mean() - 1).abs().max()) > 1e-3, "heads do not differ: it says nothing"


def test_a_qk_norm_without_rope_keeps_the_norms_that_the_linear_branch_sees(tiny_family):
    yarn = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    model = tiny_family("llama", rope_parameters=yarn)  # its cos and sin are 1.35 times as long
    apply_(model, plan(model.config, ConvertSpec.model_validate({"qk_norm": "rms", "rope": {"linear": "drop"}})))
    ids = ids_of(2, 30)
    calibrate_(model, [ids], output=False)
    seen = {}
    with observing(model, lambda swap, call, _: seen.update({swap: call})), torch.no_grad():
        model(input_ids=ids)
    for swap, call in seen.items():
        mean = call.linear_q.norm(dim=-1).mean((0, 1))
        assert torch.allclose(swap.q_norm(call.linear_q).detach().norm(dim=-1).mean((0, 1)), mean, rtol=1e-3)
        assert torch.allclose(call.q.norm(dim=-1).mean((0, 1)), mean * 1.3466, rtol=1e-3)


def test_calibration_measures_no_decay_where_there_is_to_be_none(tiny_family):
    model = build(tiny_family, decay={"schedule": "none"})
    found = calibrate_(model, [ids_of(2, 20)])
    assert all(bool((swap.log_decay == 0).all()) for swap in swaps(model).values())
    assert all(after <= start + 1e-9 for start, after in zip(found.error_before, found.error_after, strict=True))


def test_calibration_leaves_norms_alone_when_told_to(tiny_family):
    model = build(tiny_family, qk_norm="rms")
    calibrate_(model, [ids_of(2, 20)], norms=False)
    assert all(bool((swap.q_norm.gain == 1).all()) for swap in swaps(model).values())


@pytest.mark.parametrize("local", [None, {"window": 6, "sinks": 2}, {"window": 6, "sinks": 2, "mix": "joint"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mistral", "gpt_neox"])
def test_the_error_of_every_layer_goes_down(tiny_family, name, local):
    model = build(tiny_family, name, local=local)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = ids_of(4, 48)
    calibrate_(model, ids.split(2), output=False)  # with other decays the error may be larger or smaller
    found = calibrate_(model, ids.split(2), decay=False)
    assert found.tokens == ids.numel()
    assert all(after <= start + 1e-9 for start, after in zip(found.error_before, found.error_after, strict=True))
    assert max(found.error_after) < 1.0
    again = calibrate_(model, ids.split(2), decay=False)
    assert again.error_before == pytest.approx(found.error_after, rel=1e-3)
    for key, value in model.state_dict().items():
        assert key.endswith((".log_slope", ".out_scale", ".mix", ".mix_query", ".mix_sum")) or torch.equal(
            value, before[key]
        ), key


@pytest.mark.parametrize("pieces", [4, 2])
@pytest.mark.parametrize("mix", ["constant", "joint"])
def test_the_errors_are_those_before_anything_was_set_and_after(tiny_family, mix, pieces):
    model = build(tiny_family, local={"window": 6, "sinks": 2, "mix": mix})
    ids = ids_of(4, 48)

    def errors():
        found = []

        def compare(swap, call, target):
            wanted = target.view(swap(call).shape)
            found.append(float((swap(call) - wanted).square().sum() / wanted.square().sum()))

        with torch.no_grad(), observing(model, compare):
            model(input_ids=ids, use_cache=False)
        return found

    before = errors()
    found = calibrate_(model, ids.split(pieces))
    assert found.error_before == pytest.approx(before, rel=1e-4)
    assert found.error_after == pytest.approx(errors(), rel=1e-4)


def test_every_token_counts_alike_in_the_mean_distance(tiny_family, monkeypatch):
    monkeypatch.setattr("swapattn.calibration.ROWS", 2)
    found = [calibrate_(build(tiny_family), [ids_of(3, 48)]).distance]
    monkeypatch.setattr("swapattn.calibration.ROWS", 1)
    found.append(calibrate_(build(tiny_family), [ids_of(3, 48)]).distance)
    monkeypatch.setattr("swapattn.calibration.attention_distance", lambda call: torch.full((4,), len(call.q) ** 2.0))
    assert calibrate_(build(tiny_family), [ids_of(3, 48)]).distance[0] == 1
    monkeypatch.setattr("swapattn.calibration.ROWS", 2)
    assert calibrate_(build(tiny_family), [ids_of(3, 48)]).distance[0] == pytest.approx((2 * 4 + 1) / 3)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_scale_and_share_are_the_least_squares_fit(tiny_family):
    swap = next(iter(swaps(build(tiny_family)).values()))
    generator = torch.Generator().manual_seed(2)
    linear, local, noise = (torch.randn(2, 30, 4, 8, generator=generator) for _ in range(3))
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.7], [1.5, 0.4], [0.5, 0.5]])
    target = linear * weights[:, :1] + local * weights[:, 1:] + 0.1 * noise
    gram = _Gram()
    with torch.no_grad():
        for rows in (slice(0, 1), slice(1, 2)):
            gram.add([linear[rows], local[rows]], target[rows])
        fit_output_(swap, gram)
    share = swap.mix.sigmoid().detach()
    for h in range(4):
        branches = torch.stack((linear[:, :, h].flatten(), local[:, :, h].flatten()), 1).double().numpy()
        expected, *_ = np.linalg.lstsq(branches, target[:, :, h].flatten().double().numpy(), rcond=None)
        assert float((1 - share[h]) * swap.out_scale[h, 0].detach()) == pytest.approx(expected[0], rel=1e-4)
        assert float(share[h]) == pytest.approx(expected[1], rel=1e-4)


def test_the_scale_alone_is_the_least_squares_fit(tiny_family):
    swap = next(iter(swaps(build(tiny_family, local=None)).values()))
    generator = torch.Generator().manual_seed(2)
    linear = torch.randn(2, 30, 4, 8, generator=generator)
    target = 0.7 * linear + torch.randn(2, 30, 4, 8, generator=generator)
    gram = _Gram()
    with torch.no_grad():
        gram.add([linear], target)
        fit_output_(swap, gram)
    expected = (linear * target).sum((0, 1, 3)) / linear.square().sum((0, 1, 3))
    assert torch.allclose(swap.out_scale[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("wanted", [(-0.5, 0.9), (0.7, -0.4), (0.3, 1.6), (-1.0, 1.5), (-0.3, -0.3), (30.0, 0.5)])
def test_a_fit_outside_the_ranges_is_the_best_within_them(tiny_family, wanted):
    swap = next(iter(swaps(build(tiny_family)).values()))
    generator = torch.Generator().manual_seed(2)
    linear = torch.randn(1, 50, 4, 8, generator=generator)
    local = 0.8 * linear + 0.6 * torch.randn(1, 50, 4, 8, generator=generator)  # alike, as the branches are
    target = wanted[0] * linear + wanted[1] * local
    gram = _Gram()
    with torch.no_grad():
        gram.add([linear, local], target)
        fit_output_(swap, gram)
    best = min(
        float((((1 - share) * scale * linear + share * local) - target).square().sum() / target.square().sum())
        for share in np.linspace(*SHARE_RANGE, 49)
        for scale in np.linspace(0, 10, 201)
    )
    assert gram.error(swap) <= best + 1e-4


def test_broken_weights_are_a_training_error(tiny_family):
    model = build(tiny_family)
    model.model.layers[1].self_attn.v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"calibration of layer \d is not finite"):
        calibrate_(model, [ids_of(2, 20)])
