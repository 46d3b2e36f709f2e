"""What a context costs: exact bytes, lengths that are left out, a clock that is read in the right places."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch

from swapattn import cost
from swapattn.attention import only_branch
from swapattn.errors import UsageError
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan

SOFTMAX_BYTES = 2 * 2 * 2 * 8 * 4  # a token: 2 layers, keys and values, 2 KV heads of 8 numbers, 4 bytes


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(max_position_embeddings=8192)


def swapped(model, **convert):
    student = copy.deepcopy(model)
    apply_(student, plan(student.config, ConvertSpec.model_validate(convert)))
    return student


@pytest.fixture(scope="module")
def student(model):
    return swapped(model, local={"window": 8, "sinks": 2})


class Clock:
    """A clock that gains a second each time it is read."""

    def __init__(self):
        self.reads = itertools.count()

    def __call__(self, device):
        return float(next(self.reads))


def test_the_cache_of_softmax_grows_with_the_length(model):
    rows = cost.measure(model, lengths=(64, 128, 1000), new_tokens=4)["rows"]
    assert [row["length"] for row in rows] == [64, 128, 1000]
    assert [row["state_bytes"] for row in rows] == [length * SOFTMAX_BYTES for length in (64, 128, 1000)]


def test_the_state_of_a_swapped_model_does_not(student):
    rows = cost.measure(student, lengths=(64, 128, 1000), new_tokens=4)["rows"]
    assert len({row["state_bytes"] for row in rows}) == 1
    assert rows[0]["state_bytes"] < 1000 * SOFTMAX_BYTES


def test_a_hybrid_grows_with_its_kept_layers_only(model):
    rows = cost.measure(swapped(model, keep_softmax=[0]), lengths=(64, 164), new_tokens=4)["rows"]
    assert rows[1]["state_bytes"] - rows[0]["state_bytes"] == 100 * SOFTMAX_BYTES // 2


def test_a_long_prefill_comes_in_pieces(model, monkeypatch):
    lengths = []
    original = model.forward

    def watched(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    (row,) = cost.measure(model, lengths=(5000,), new_tokens=2, long_on_cpu=True)["rows"]
    warm, timed = [2048, 2048, 1, 1], [2048, 2048, 902, 1, 1]
    assert lengths == warm + timed
    assert row["state_bytes"] == 5000 * SOFTMAX_BYTES


def test_speed_is_tokens_by_the_clock(model, monkeypatch):
    monkeypatch.setattr(cost, "_now", Clock())
    (row,) = cost.measure(model, lengths=(100,), new_tokens=10)["rows"]
    assert row["prefill_tokens_per_second"] == 90
    assert row["decode_tokens_per_second"] == row["decode_seconds"] == 1


def test_one_slow_token_does_not_count(model, monkeypatch):
    times = iter([*range(4), 10.0, 11.0, 20.0, 20.5, 21.0, 99.0])  # the warm-up, the prefill, three tokens
    monkeypatch.setattr(cost, "_now", lambda device: next(times))
    (row,) = cost.measure(model, lengths=(64,), new_tokens=3)["rows"]
    assert row["prefill_tokens_per_second"] == 61
    assert row["decode_seconds"] == 0.5


def test_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    cost._now(torch.device("cpu"))
    assert waited == []
    cost._now(torch.device("cuda:0"))
    assert waited == [torch.device("cuda:0")]


def test_what_is_left_out_is_named(model, tiny_llama):
    found = cost.measure(model, lengths=(64, 2000, 9000), new_tokens=2)
    assert [row["length"] for row in found["rows"]] == [64]
    assert found["skipped"] == [
        {"length": 2000, "reason": "too slow on a CPU"},
        {"length": 9000, "reason": "the model has 8,192 positions"},
    ]
    short = tiny_llama(max_position_embeddings=64)
    assert cost.measure(short, lengths=(128,), new_tokens=2)["rows"] == []
    assert len(cost.measure(short, lengths=(128,), new_tokens=2, beyond=True)["rows"]) == 1


GPT2 = {"n_positions": 64, "max_position_embeddings": 64}
MPT = {"n_layers": 1, "n_heads": 4, "d_model": 32, "max_seq_len": 64, "max_position_embeddings": None}


@pytest.mark.parametrize(("kind", "settings"), [("gpt2", GPT2), ("mpt", MPT)])
def test_learned_positions_are_never_passed(tiny_family, kind, settings):
    model = tiny_family(kind, **settings)
    found = cost.measure(model, lengths=(64, 128), new_tokens=2, beyond=True)
    assert [row["length"] for row in found["rows"]] == [64]
    assert found["skipped"][0]["reason"] == "the model has 64 positions"


def test_the_model_is_left_as_it_was(student):
    student.train()
    with only_branch(student, "local"):
        found = cost.measure(student, lengths=(64,), new_tokens=2)
    assert student.training
    student.eval()
    assert (found["dtype"], found["new_tokens"]) == ("float32", 2)
    assert "CPU" in found["device"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"lengths": (32,)}])
def test_there_must_be_something_to_measure(model, wrong):
    with pytest.raises(UsageError, match="new tokens"):
        cost.measure(model, **wrong)


def test_table():
    def side(*rows):
        names = ("length", "state_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")
        skipped = [{"length": 32768, "reason": "the model has 8,192 positions"}]
        found = [dict(zip(names, row, strict=True)) for row in rows]
        return {"device": "NVIDIA H100", "dtype": "bfloat16", "new_tokens": 32, "rows": found, "skipped": skipped}

    teacher = side((1024, 47_185_920, 40_000.4, 41.26), (8192, 377_487_360, 30_000.0, 39.0))
    student = side((1024, 3_000, 50_000.0, 44.0))
    lines = cost.to_table(student, teacher).split("\n")
    assert lines[0].startswith("tokens  state, teacher  state, student  prefill tok/s, teacher")
    assert lines[1].split() == ["1,024", "45.0", "MiB", "2.9", "KiB", "40,000", "50,000", "41.3", "44.0"]
    assert lines[2].split() == ["8,192", "360.0", "MiB", "-", "30,000", "-", "39.0", "-"]
    assert lines[3:] == [
        "not measured at 32,768 tokens: the model has 8,192 positions",
        "NVIDIA H100, bfloat16, batch of 1",
    ]
    assert "teacher" not in cost.to_table(student, None)
    assert cost._bytes(500) == "500 B"
