"""Streaming text: the same tokens as `generate`, and honest figures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from swapattn import checkpoint as checkpoint_module
from swapattn import generation, loading
from swapattn.cost import state_bytes
from swapattn.errors import UsageError
from swapattn.generation import GenerationStats, answer, open_model
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan

PROMPT = "Call me Ishmael. Some years ago"


@pytest.fixture(scope="module")
def model(tiny_llama):
    built = tiny_llama()
    built.generation_config.eos_token_id = None  # random weights may say the end at once
    return built


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    return tokenizer


def greedy(model, tokenizer, prompt, count):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_pieces_are_what_generate_gives(model, tiny_tokenizer):
    pieces = []
    made = answer(model, tiny_tokenizer, PROMPT, show=pieces.append, max_new_tokens=24)
    assert "".join(pieces) == made.text == greedy(model, tiny_tokenizer, PROMPT, 24)


def test_tokens_that_come_several_at_a_time_are_all_counted(model, tiny_tokenizer, monkeypatch):
    times = []
    monkeypatch.setattr(generation._Streamer, "put", _noting(generation._Streamer.put, times))
    monkeypatch.setattr(model.generation_config, "prompt_lookup_num_tokens", 4)
    made = answer(model, tiny_tokenizer, "one two one two one two", max_new_tokens=96)
    assert made.stats.tokens == 96
    assert len(times) < 97, "no draft was taken"


def _noting(put, times):
    def noting(self, value):
        times.append(value.numel())
        put(self, value)

    return noting


@pytest.mark.parametrize("own", [{"use_cache": False}, {"num_beams": 3}])
def test_settings_of_the_model_that_a_stream_cannot_have_are_passed_over(model, tiny_tokenizer, monkeypatch, own):
    expected = answer(model, tiny_tokenizer, PROMPT, show=lambda _: None, max_new_tokens=6)
    for key, value in own.items():
        monkeypatch.setattr(model.generation_config, key, value)
    found = answer(model, tiny_tokenizer, PROMPT, show=lambda _: None, max_new_tokens=6)
    assert (found.text, found.stats.state_bytes) == (expected.text, expected.stats.state_bytes)


def test_stop_strings_of_the_model_end_the_text(model, tiny_tokenizer, monkeypatch):
    whole = answer(model, tiny_tokenizer, PROMPT, max_new_tokens=16).text
    stop = next(letter for letter in whole[2:] if letter.isalpha())
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    found = answer(model, tiny_tokenizer, PROMPT, max_new_tokens=16).text
    assert stop in found
    assert whole.startswith(found)
    assert len(found) < len(whole)


def test_text_comes_in_pieces(model, tiny_tokenizer):
    pieces = []
    answer(model, tiny_tokenizer, PROMPT, show=pieces.append, max_new_tokens=150, temperature=2.0)
    assert len(pieces) > 3
    assert all(pieces)


def test_figures_are_counted_and_measured(model, tiny_tokenizer):
    stats = answer(model, tiny_tokenizer, PROMPT, max_new_tokens=16).stats
    prompt_tokens = len(tiny_tokenizer(PROMPT)["input_ids"])
    assert stats.prompt_tokens == prompt_tokens
    assert stats.tokens == 16
    assert 0 < stats.prefill_seconds < stats.seconds
    assert stats.tokens_per_second == pytest.approx(15 / (stats.seconds - stats.prefill_seconds))
    # keys and values: 2 layers x 2 KV heads x 8 numbers of 4 bytes; the last token is never fed back
    assert stats.state_bytes == (prompt_tokens + 15) * 2 * 2 * 2 * 8 * 4
    assert f"state {stats.state_bytes:,} bytes" in stats.to_line()
    assert stats.to_dict()["tokens"] == 16


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_token_has_no_rate(model, tiny_tokenizer, tokens):
    stats = answer(model, tiny_tokenizer, PROMPT, max_new_tokens=tokens).stats
    assert stats.tokens == tokens
    assert (stats.tokens_per_second > 0) == (tokens > 1)


def test_a_compiled_step_says_the_same(tiny_llama, tiny_tokenizer, compiled_on_cpu, monkeypatch, capsys):
    model = tiny_llama()
    apply_(model, plan(model.config, ConvertSpec()))
    model.generation_config.eos_token_id = None
    with pytest.raises(UsageError, match=r"LlamaForCausalLM on cpu cannot be compiled: leave out --compile"):
        answer(model, tiny_tokenizer, PROMPT, compiled=True)
    settings = {"max_new_tokens": 16, "temperature": 1.5, "seed": 3}
    plain = answer(model, tiny_tokenizer, PROMPT, **settings)
    model.generation_config.compile_config = compiled_on_cpu
    monkeypatch.setattr(generation, "compiles", lambda model: True)
    made = answer(model, tiny_tokenizer, PROMPT, compiled=True, **settings)
    assert made.text == plain.text
    assert counters["stats"]["unique_graphs"] == 1
    assert made.stats.compile_seconds > 10 * made.stats.seconds  # nothing is left to compile when the clock runs
    assert made.stats.to_line().endswith(f"bytes, compiled in {made.stats.compile_seconds:.1f} s before")
    assert plain.stats.compile_seconds == 0
    assert "compiling the step" in capsys.readouterr().err


def test_the_chat_template_is_used_unless_raw(model, chat_tokenizer):
    spoken = answer(model, chat_tokenizer, PROMPT, max_new_tokens=12)
    assert spoken.text == greedy(model, chat_tokenizer, f"[user] {PROMPT}\n[assistant]", 12)
    raw = answer(model, chat_tokenizer, PROMPT, max_new_tokens=12, raw=True)
    assert raw.text == greedy(model, chat_tokenizer, PROMPT, 12)
    assert raw.stats.prompt_tokens < spoken.stats.prompt_tokens


def test_sampling_follows_the_seed(model, tiny_tokenizer):
    def sample(seed):
        return answer(model, tiny_tokenizer, PROMPT, max_new_tokens=24, temperature=1.5, seed=seed).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"prompt": ""}, "prompt is empty"), ({"max_new_tokens": 0}, "at least 1"), ({"temperature": -1}, "at least 0")],
)
def test_what_cannot_be_answered_is_refused(model, tiny_tokenizer, settings, words):
    settings = {"prompt": PROMPT, **settings}
    with pytest.raises(UsageError, match=words):
        answer(model, tiny_tokenizer, settings.pop("prompt"), **settings)


def test_a_blank_message_is_refused_although_the_template_has_tokens(model, chat_tokenizer):
    with pytest.raises(UsageError, match="prompt is empty"):
        answer(model, chat_tokenizer, " \n")


def test_a_reader_that_leaves_early_ends_it(model, tiny_tokenizer):
    pieces = []

    def show(piece):
        pieces.append(piece)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        answer(model, tiny_tokenizer, PROMPT, show=show, max_new_tokens=3000)
    assert len(pieces) == 1


def test_state_bytes_counts_shared_memory_once_and_looks_into_containers():
    class Layer:
        def __init__(self):
            self.state = torch.zeros(2, 3)
            self.view = self.state[0]
            self.nested = {"ring": [torch.zeros(5, dtype=torch.float16)]}
            self.length = 7

    class Cache:
        def __init__(self):
            self.layers = [Layer(), Layer()]

    assert state_bytes(Cache()) == 2 * (2 * 3 * 4 + 5 * 2)
    assert state_bytes(None) == 0


def test_open_model_takes_the_checkpoint_or_its_teacher(monkeypatch, tmp_path):
    class Found:
        path = tmp_path / "mine"

    asked = []
    monkeypatch.setattr(checkpoint_module, "find", lambda directory, model=None: asked.append(model) or Found())
    monkeypatch.setattr(loading, "load", lambda path, device: (path, "tokenizer"))
    monkeypatch.setattr(loading, "load_teacher", lambda found, device: ("teacher", "tokenizer"))
    assert open_model(None) == (Found.path, "tokenizer", str(Found.path))
    assert open_model("some/where", teacher=True) == ("teacher", "tokenizer", f"the teacher of {Found.path}")
    assert asked == [None, "some/where"]


def test_a_checkpoint_without_a_tokenizer_cannot_read_a_prompt(monkeypatch, tmp_path):
    class Found:
        path = tmp_path

    monkeypatch.setattr(checkpoint_module, "find", lambda directory, model=None: Found())
    monkeypatch.setattr(loading, "load", lambda path, device: ("model", None))
    with pytest.raises(UsageError, match="has no tokenizer"):
        open_model(tmp_path)


@pytest.mark.parametrize(("device", "words"), [("cuda", "finds no GPU"), ("gpu", "no device 'gpu': say cpu, cuda")])
def test_a_device_that_is_not_there_is_named(monkeypatch, tmp_path, device, words):
    class Found:
        path = tmp_path

    monkeypatch.setattr(checkpoint_module, "find", lambda directory, model=None: Found())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=words):
        open_model(tmp_path, device=device)


def test_the_line_of_figures_is_one_line():
    stats = GenerationStats(3, 2, 1.0, 0.5, 2.0, 4096)
    assert (
        stats.to_line() == "2 tokens in 1.00 s, 2.0 tokens/s after a prefill of 3 tokens in 0.50 s, state 4,096 bytes"
    )
