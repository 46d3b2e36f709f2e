"""Families that compute attention themselves: the swap takes exactly the place of their softmax."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from swapattn import families
from swapattn.adapters import _slopes, needs_adapter
from swapattn.attention import observing, only_branch, swaps
from swapattn.audit import beyond_linear
from swapattn.calibration import attention_distance, calibrate_
from swapattn.call import AttentionCall
from swapattn.errors import UnsupportedModelError
from swapattn.loading import load
from swapattn.modeling import swap_classes
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan, revert_

CASES = {
    "falcon": {"alibi": False},
    "falcon, ALiBi": {"alibi": True},
    "falcon, groups": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, heads": {"alibi": False, "multi_query": False, "num_kv_heads": 4},
    "gptj": {},
    "gpt_neo": {},
    "bloom": {},
    "mpt": {},
}
IDS = torch.randint(2, 300, (2, 21), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :8] = 0


@pytest.fixture(params=CASES)
def teacher(request):
    config = families.tiny_config(request.param.partition(",")[0], **CASES[request.param])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
    return model.double()


def swap_(model, keep=(), window=5, **more):
    spec = {"local": {"window": window, "sinks": 2, "share": 0.4}, "keep_softmax": keep, **more}
    apply_(model, plan(model.config, ConvertSpec.model_validate(spec)))
    return model.double()


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


@torch.no_grad()
def in_pieces(model, ids=IDS, mask=None, pieces=(9, 6, 1, 1, 1, 3)):
    cache, start, found = None, 0, []
    for piece in pieces:
        more = {} if mask is None else {"attention_mask": mask[:, : start + piece]}
        output = model(input_ids=ids[:, start : start + piece], use_cache=True, past_key_values=cache, **more)
        cache, start = output.past_key_values, start + piece
        found.append(output.logits)
    return torch.cat(found, 1)


def near(a, b, tolerance=1e-6):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_over_everything_is_the_teacher(teacher, padded):
    """Heads, scale, rotary embedding and ALiBi arrive in the swap as the stock softmax has them."""
    more = {"attention_mask": MASK} if padded else {}
    teacher = teacher.float() if padded else teacher  # bloom and mpt give NaN for padding in fp64
    expected = logits(teacher, **more)
    model = swap_(teacher, window=64).to(teacher.dtype)
    if model.config.model_type == "gpt_neo":  # every second layer of it looks at its last 6 tokens only
        for index, swap in enumerate(swaps(model).values()):
            swap.window, swap.sinks = (64, 2) if index % 2 == 0 else (6, 0)
    with only_branch(model, "local"):
        found = logits(model, **more)
        assert near(found[MASK.bool()], expected[MASK.bool()], 1e-4 if padded else 1e-5)  # some compute in fp32
        if not padded:
            assert near(in_pieces(model), found)
    assert not near(logits(model, **more)[MASK.bool()], expected[MASK.bool()], 1e-2)


@pytest.mark.parametrize("keep", [(), (1,)], ids=["all-swapped", "keep-1"])
def test_cached_equals_uncached_and_padded_equals_alone(teacher, keep):
    model = swap_(teacher, keep=keep)
    adapted = sum(type(module).__name__.startswith("Adapted") for module in model.modules())
    assert adapted == (4 - len(keep) if needs_adapter(model.config.model_type) else 0)
    assert len(swaps(model)) == 4 - len(keep)
    full = logits(model)
    assert near(in_pieces(model), full, 1e-5 if keep else 1e-6)
    padded = logits(model, attention_mask=MASK, **_positions(model))
    assert near(padded[:1, 8:], logits(model, IDS[:1, 8:]), 1e-5 if keep else 1e-6)
    assert near(padded[1:], full[1:], 1e-5 if keep else 1e-6)
    greedy = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, eos_token_id=None)
    alone = model.generate(IDS[:1, 8:], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy[:1, 8:], alone)


def _positions(model):
    known = model.config.model_type in ("falcon", "gptj", "gpt_neo")
    return {"position_ids": (MASK.cumsum(1) - 1).clamp(min=0)} if known else {}


@pytest.mark.parametrize("keep", [(), (1,)], ids=["all-swapped", "keep-1"])
def test_packed_sequences_are_kept_apart(teacher, keep):
    packed = {"position_ids": torch.cat((torch.arange(9), torch.arange(12)))[None]}

    def apart(model):
        alone = torch.cat((logits(model, IDS[:1, :9]), logits(model, IDS[:1, 9:])), 1)
        assert not near(logits(model, IDS[:1]), alone, 1e-3)
        return near(logits(model, IDS[:1], **packed), alone)

    if teacher.config.model_type in ("bloom", "mpt") or not apart(teacher):
        pytest.skip("is not told positions, or (falcon up to transformers 5.23) makes no mask from them")
    model = swap_(teacher, keep=keep)
    assert apart(model)
    with observing(model, lambda *_: None):
        assert apart(model)


@torch.no_grad()
def test_packed_sequences_in_a_compiled_model_are_an_error():
    torch._dynamo.reset()
    model = swap_(AutoModelForCausalLM.from_config(families.tiny_config("gpt_neo")).eval())
    run = torch.compile(model.forward, backend="eager", fullgraph=True)
    packed = torch.cat((torch.arange(9), torch.arange(12)))[None]
    assert near(run(input_ids=IDS, position_ids=torch.arange(21)[None], use_cache=False).logits, logits(model))
    with pytest.raises(RuntimeError, match="packed sequences in a compiled model"):
        run(input_ids=IDS, position_ids=packed, use_cache=False)
    torch._dynamo.reset()


def test_an_observed_or_reverted_model_is_the_teacher(teacher):
    teacher = teacher.float()
    expected = logits(teacher), logits(teacher, attention_mask=MASK)
    model = swap_(teacher).float()
    seen = []
    with observing(model, lambda swap, call, output: seen.append((call.q.shape[:2], output.shape))):
        assert near(logits(model), expected[0], 1e-5)
        assert near(logits(model, attention_mask=MASK)[MASK.bool()], expected[1][MASK.bool()], 1e-4)
    assert len(seen) == 8
    assert {tuple(shape) for _, shape in seen} == {(2, 21, 4, 8)}
    calibrate_(model, [IDS], output=False)
    found = calibrate_(model, [IDS], decay=False)
    assert sum(found.error_after) < sum(found.error_before)
    revert_(model)
    assert torch.equal(logits(model), expected[0])
    assert not any(type(module).__name__.startswith("Adapted") for module in model.modules())


def test_nothing_quadratic_is_left(teacher):
    model = swap_(teacher).to("meta")
    found = beyond_linear(model, window=5)
    assert not {path: reason for path, reason in found.items() if "pairs" in reason}


def test_kept_layers_compute_exactly_the_stock_softmax(teacher):
    stock = logits(teacher)
    inputs = {}

    def capture(name):
        return lambda module, args, kwargs, output: inputs.update({name: (args, kwargs, output)})

    model = swap_(teacher, keep=(0,))
    first = plan(model.config, ConvertSpec.model_validate({"keep_softmax": (0,)})).keep[0].path
    model.get_submodule(first).register_forward_hook(capture("student"), with_kwargs=True)
    logits(model)
    revert_(model)
    model.get_submodule(first)._forward_hooks.clear()
    model.get_submodule(first).register_forward_hook(capture("teacher"), with_kwargs=True)
    assert torch.equal(logits(model), stock)
    assert torch.equal(inputs["student"][2][0], inputs["teacher"][2][0])


def test_dropping_a_rotary_embedding_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"convert\.rope"):
        plan(families.tiny_config("gptj"), ConvertSpec.model_validate({"rope": {"linear": "drop"}}))


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_a_checkpoint_loads_here_and_in_plain_transformers(tmp_path, kind):
    config = families.tiny_config(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).eval()
    planned = plan(config, ConvertSpec.model_validate({"keep_softmax": (1,), "local": {"window": 5}}))
    config_class, model_class = swap_classes(kind)
    model = model_class(config_class(**{**config.to_dict(), "swapattn": planned.config_block()})).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), expected)
    if kind != "bloom":
        return  # one process of its own is enough
    torch.save((IDS, expected), tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['swapattn'] = None; sys.modules['lightning_attention'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()\n"
        f"ids, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "print((m(input_ids=ids, use_cache=False).logits - expected).abs().max().item() < 1e-6)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "True", result.stderr[-2000:]


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_the_decays_of_schedule_alibi_start_at_the_teachers_slopes(kind):
    config = families.tiny_config(kind)
    planned = plan(config, ConvertSpec.model_validate({"decay": {"schedule": "alibi"}}))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config).get_submodule(planned.swap[0].path)
    for slopes in planned.slopes().values():
        assert torch.allclose(slopes, torch.tensor(_slopes(module, 4)))


def test_the_attention_distance_sees_alibi():
    q, k, v = (torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain = attention_distance(AttentionCall(q, k, v, 0.3, None, 0))
    slopes = (1.0, 0.5, 0.1, 0.0)
    found = attention_distance(AttentionCall(q, k, v, 0.3, None, 0, alibi=(slopes, None)))
    assert bool((found[:3] < plain[:3]).all())
    assert torch.allclose(found[3], plain[3])
    back = torch.arange(40)[:, None] - torch.arange(40)
    scores = (0.3 * q @ k.mT - torch.tensor(slopes)[:, None, None] * back).masked_fill(back < 0, -torch.inf)
    p = scores.softmax(-1)[..., 4:]
    expected = (p * back[:, 4:].clamp(min=0)).sum((0, 2, 3)) / p.sum((0, 2, 3))
    assert torch.allclose(found, expected.clamp(min=1), rtol=1e-4)
