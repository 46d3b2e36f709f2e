"""A step as a CUDA graph: the same weights as without, and what cannot be recorded is called as it is."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import time
import weakref

import pytest
import torch

from swapattn import progress, replay, training
from swapattn.compilation import align_function
from swapattn.objectives import align_loss, distill_loss, hidden_states
from swapattn.recipe import ConvertSpec
from swapattn.stages import AlignStage, DistillStage
from swapattn.surgery import apply_, plan
from swapattn.training import run_stage


def stage(kind="distill", **values):
    settings = {"stage": kind, "length": 24, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "tokens": 5 * 96}
    settings |= {"train": "all", "backbone_learning_rate": 1e-3} if kind == "distill" else {}
    return (AlignStage if kind == "align" else DistillStage).model_validate(settings | values)


class Windows(torch.utils.data.IterableDataset):
    def __init__(self, length=24):
        self.length = length

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield {"input_ids": torch.randint(2, 320, (self.length,), generator=generator)}


def student(tiny_family, family="llama", **values):
    model = tiny_family(family, **values)
    apply_(model, plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2, "mix": "joint"}})))
    return model


def loss_of(what, teacher, amp=False):
    if isinstance(what, AlignStage):
        return functools.partial(align_loss, amp=amp)
    return functools.partial(distill_loss, stage=what, teacher=teacher, amp=amp)


def train(model, what, folder, loss, device="cpu"):
    folder.mkdir()
    data = Windows(what.length)
    log = folder / "log.jsonl"
    run_stage(model, what, loss, data, title="it", folder=folder / "run", log=log, device=device, seed=0)
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


@pytest.fixture
def recorder(monkeypatch):
    """Stands in for a GPU: a recording calls the function again and writes its result where the first one lies."""
    made = []

    def record(call):
        result = call().clone()
        made.append(0)

        def again():
            made[-1] += 1
            result.copy_(call())

        return again, result

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(replay, "beside", contextlib.nullcontext)
    monkeypatch.setattr(replay, "clean_up", lambda: None)
    monkeypatch.setattr(training, "_recordable", lambda *_: True)
    return made


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_replays_train_the_same_weights(tiny_family, tmp_path, monkeypatch, recorder, kind):
    what, teacher = stage(kind), tiny_family("llama")
    found = train(student(tiny_family), what, tmp_path / "replayed", loss_of(what, teacher))
    assert recorder == [1 + 2 * 5]  # compared once, then two micro-batches in each of five steps
    monkeypatch.setattr(training, "_recordable", lambda *_: False)
    expected = train(student(tiny_family), what, tmp_path / "plain", loss_of(what, teacher))
    assert recorder == [1 + 2 * 5]
    start = dict(student(tiny_family).named_parameters())
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-8, msg=name)


def test_what_cannot_be_recorded_is_called_as_it_is(tiny_family, tmp_path, monkeypatch, recorder, capsys):
    def refuse(call):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("a previous error")

    what, teacher = stage(), tiny_family("llama")
    monkeypatch.setattr(replay, "record", refuse)
    found = train(student(tiny_family), what, tmp_path / "refused", loss_of(what, teacher))
    assert "CUDA graph (operation not permitted when stream is capturing): its kernels" in capsys.readouterr().err
    monkeypatch.setattr(training, "_recordable", lambda *_: False)
    expected = train(student(tiny_family), what, tmp_path / "plain", loss_of(what, teacher))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_replay_that_does_something_else_is_not_trained_with(
    tiny_family, tmp_path, monkeypatch, recorder, capsys, wrong
):
    def record(call):
        result = call().clone()

        def again():
            kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            result.copy_(call() * (1.1 if wrong == "loss" else 1))
            if wrong == "gradient":
                for p, grad in zip((p for p in model.parameters() if p.grad is not None), kept, strict=True):
                    p.grad.copy_(grad)

        return again, result

    monkeypatch.setattr(replay, "record", record)
    model, what, teacher = student(tiny_family), stage(), tiny_family("llama")
    found = train(model, what, tmp_path / "wrong", loss_of(what, teacher))
    assert "differ when replayed" in capsys.readouterr().err
    monkeypatch.setattr(training, "_recordable", lambda *_: False)
    expected = train(student(tiny_family), what, tmp_path / "plain", loss_of(what, teacher))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-8, msg=name)


def test_out_of_memory_is_no_reason_to_launch_one_by_one(tiny_family, tmp_path, monkeypatch, recorder):
    def refuse(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "record", refuse)
    what, teacher = stage(), tiny_family("llama")
    with pytest.raises(training.TrainingError, match=r"lower micro_batch .* or set cuda_graph: false"):
        train(student(tiny_family), what, tmp_path / "oom", loss_of(what, teacher))


def test_a_reason_without_words_is_named_by_its_kind(tiny_family, tmp_path, monkeypatch, recorder, capsys):
    monkeypatch.setattr(replay, "record", lambda call: next(iter(())))
    what = stage("align")
    train(student(tiny_family), what, tmp_path / "refused", loss_of(what, None))
    assert "CUDA graph (StopIteration)" in capsys.readouterr().err


def test_a_recording_ends_with_its_stage(tiny_family, tmp_path, monkeypatch, recorder):
    found, own = [], replay.record

    def record(call):
        again, result = own(call)
        found.append(weakref.ref(again))
        return again, result

    monkeypatch.setattr(replay, "record", record)
    what = stage("align")
    gc.disable()  # Trainer and callbacks hold each other until it is collected; a GPU's memory must not wait for that
    try:
        train(student(tiny_family), what, tmp_path / "it", loss_of(what, None))
        assert [ref() for ref in found] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)])
def test_the_time_of_a_step_leaves_the_recording_out(tiny_family, tmp_path, monkeypatch, recorder, steps):
    own = replay.record

    def record(call):
        time.sleep(1)
        return own(call)

    def slow(model, ids):
        time.sleep(0.1)
        return align_loss(model, ids)

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(progress, "immediate", lambda device: False)  # figures one step late, as on a GPU
    what = stage("align", tokens=steps * 96)
    (tmp_path / "it").mkdir()
    log = tmp_path / "log.jsonl"
    places = {"title": "it", "folder": tmp_path / "it", "log": log, "device": "cpu", "seed": 0}
    figures = run_stage(student(tiny_family), what, slow, Windows(), **places)
    assert 0.2 < figures["step_seconds"] < 0.6


@pytest.mark.parametrize(
    ("values", "device", "count", "expected"),
    [
        ({}, "cuda", 1, True),
        ({}, "cpu", 1, False),
        ({}, "cuda", 2, False),
        ({"cuda_graph": False}, "cuda", 1, False),
        ({"gradient_checkpointing": True}, "cuda", 1, False),
        ({"document_mask": True}, "cuda", 1, False),
    ],
)
def test_which_stages_are_recorded(monkeypatch, values, device, count, expected):
    monkeypatch.setattr(training.processes, "count", lambda: count)
    assert training._recordable(stage(**values), device) is expected


def test_masks_are_made_as_without_a_recording(tiny_family, monkeypatch):
    """transformers makes a quadratic mask for a model that it takes for traced."""
    from transformers import masking_utils

    model, ids = tiny_family("llama"), torch.arange(2, 26)[None]
    seen = []
    own = masking_utils.create_causal_mask

    def kept(*args, **kwargs):
        seen.append(own(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(sys.modules[type(model).__module__], "create_causal_mask", kept)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    model.set_attn_implementation("sdpa")
    hidden_states(model, ids)
    with replay._nothing_packed():
        hidden_states(model, ids)
    hidden_states(model, ids)
    assert [mask is None for mask in seen] == [False, True, False]


SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FAMILIES = {
    "llama": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {},
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["align", "distill"])
def test_on_a_gpu(tiny_family, tmp_path, capsys, kind, compiled, family):
    teacher = tiny_family(family, **SIZES | FAMILIES[family]).cuda().bfloat16().eval()
    found = []
    for graph in (True, False):
        what = stage(kind, length=256, tokens=5 * 4 * 256, cuda_graph=graph, compile=compiled)
        loss = align_function(what, amp=True) if kind == "align" else loss_of(what, teacher, amp=True)
        model = student(tiny_family, family, **SIZES | FAMILIES[family])
        found.append(train(model, what, tmp_path / str(graph), loss, "cuda"))
    assert "cannot be recorded" not in capsys.readouterr().err
    start = dict(student(tiny_family, family, **SIZES | FAMILIES[family]).named_parameters())
    moved = sum((found[1][name] - start[name]).norm() ** 2 for name in start) ** 0.5
    apart = sum((found[0][name] - found[1][name]).norm() ** 2 for name in start) ** 0.5
    assert apart < 0.05 * moved


@pytest.mark.gpu
@on_gpu
def test_a_gpu_goes_on_after_a_recording_that_broke_off(tiny_family, tmp_path, capsys):
    def waits(model, ids):
        loss = align_loss(model, ids, amp=True)
        return loss * (1 if loss.item() > 0 else 2)

    found = []
    for graph in (True, False):
        what = stage("align", length=256, tokens=5 * 4 * 256, cuda_graph=graph)
        found.append(train(student(tiny_family, **SIZES), what, tmp_path / str(graph), waits, "cuda"))
        assert ("cannot be recorded" in capsys.readouterr().err) is graph
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5))(torch.ones(64, device="cuda"))
    for name, weight in found[1].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-2, atol=1e-4, msg=name)
