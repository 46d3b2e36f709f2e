"""Probes against direct computation and against models made by hand whose answers are known."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import zstandard
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from swapattn import positions, probes, recall
from swapattn.attention import only_branch
from swapattn.cache import CACHE
from swapattn.data import heldout_tokens, windows_of
from swapattn.errors import SourceError, UsageError
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan

WORDS = "amber basil cedar delta ember fable grove haven inlet jewel kiosk lemon maple noble ocean pearl quartz raven"
WORDS += (
    " silver timber urban velvet willow yellow zephyr anchor bridge candle dragon engine falcon garden hammer island"
)
SMALL = {"longest": 256, "documents": 2, "windows": 1, "new_tokens": 6}


@pytest.fixture(scope="module")
def word_tokenizer():
    """A byte-level BPE tokenizer in which each of `WORDS` after a space is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = "There is an important info hidden inside a lot of irrelevant text. The pass key is Remember it. "
    tokenizer.train_from_iterator([f" {WORDS} {sentences}" * 3 + "A B C D Answer:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class ByHand(nn.Module):
    """A stand-in for a causal LM: the logits are a function of all ids so far, the cache is those ids."""

    def __init__(self, function, vocabulary=1000):
        super().__init__()
        self.function = function
        self.vocabulary = vocabulary
        self.place = nn.Parameter(torch.zeros(1))
        self.config = PreTrainedConfig(max_position_embeddings=8192)

    def forward(self, input_ids, use_cache=False, **given):
        past = given.get(CACHE)
        ids = input_ids if past is None else torch.cat((past, input_ids), 1)
        logits = torch.stack([self.function(row, self.vocabulary) for row in ids])[:, -input_ids.shape[1] :]
        return CausalLMOutputWithPast(logits=logits, **{CACHE: ids if use_cache else None})


def copying(ids, vocabulary):
    """What followed the longest earlier occurrence of what was just read."""
    logits = torch.zeros(len(ids), vocabulary)
    match = torch.zeros(len(ids) + 1, dtype=torch.long)  # [j + 1]: length of the common suffix of ids[:p], ids[:j]
    for position in range(len(ids)):
        match[1:] = torch.where(ids == ids[position], match[:-1] + 1, 0)
        if position:
            logits[position, ids[int(match[1 : position + 1].argmax()) + 1]] = 1.0
    return logits


def guessing(ids, vocabulary):
    return torch.rand(len(ids), vocabulary, generator=torch.Generator().manual_seed(int(ids.sum())))


def broken(ids, vocabulary):
    return torch.full((len(ids), vocabulary), math.nan)


@pytest.fixture(scope="module")
def text():
    from swapattn.data import _read_embedded

    return _read_embedded("heldout")[:9000]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def student(model):
    swapped = copy.deepcopy(model)
    spec = ConvertSpec.model_validate({"local": {"window": 8, "sinks": 2}})
    apply_(swapped, plan(swapped.config, spec))
    return swapped


@torch.no_grad()
def direct_nats(model, tokens, length):
    """`[N, length]` by one forward pass a window; the first column is unknown."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in rows])
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten(), reduction="none")
    return torch.cat((torch.full((len(rows), 1), math.nan), loss.view(len(rows), -1)), 1)


class TestPerplexity:
    @pytest.mark.parametrize("which", ["model", "student"])
    def test_it_is_what_one_pass_a_window_gives(self, which, request, tiny_tokenizer, text):
        model = request.getfixturevalue(which)
        found = probes.perplexity_of_text(model, tiny_tokenizer, text)
        tokens = heldout_tokens(tiny_tokenizer, text)
        nats = direct_nats(model, tokens, 1024)
        assert (found["window"], found["windows"]) == (1024, len(nats))
        assert found["tokens"] == len(nats) * 1023
        assert found["nats"] == pytest.approx(float(nats[:, 1:].mean()), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["nats"]))
        assert found["far"]["tokens"] == len(nats) * 768
        assert found["far"]["nats"] == pytest.approx(float(nats[:, 256:].mean()), rel=1e-5)
        assert found["window_far_nats"] == pytest.approx(nats[:, 256:].mean(1).tolist(), rel=1e-5)

    @pytest.mark.parametrize("which", ["model", "student"])
    def test_the_bins_are_those_of_long_windows_that_come_in_pieces(self, which, request, tiny_tokenizer, text):
        model = request.getfixturevalue(which)
        found = probes.perplexity_of_text(model, tiny_tokenizer, text)
        tokens = heldout_tokens(tiny_tokenizer, text)
        assert found["long_window"] == 4096  # what the model has; the text is longer
        assert found["long_windows"] == len(tokens) // 4096
        nats = direct_nats(model, tokens, 4096)
        assert [(b["start"], b["end"]) for b in found["bins"]] == [
            *((0, 64), (64, 256), (256, 1024)),
            *((1024, 2048), (2048, 4096)),
        ]
        for row in found["bins"]:
            expected = nats[:, max(row["start"], 1) : row["end"]]
            assert row["tokens"] == expected.numel()
            assert row["nats"] == pytest.approx(float(expected.mean()), rel=1e-4)

    def test_windows_begin_as_the_tokenizer_begins_a_text(self, model, opening_tokenizer):
        text = "It is a truth universally acknowledged. " * 3
        ids = torch.tensor(opening_tokenizer(text)["input_ids"])
        found = probes.perplexity_of_text(model, opening_tokenizer, text)
        assert (found["window"], found["tokens"]) == (len(ids), len(ids) - 1)
        assert found["nats"] == pytest.approx(float(direct_nats(model, ids, len(ids))[:, 1:].mean()), rel=1e-5)

    def test_a_short_text_is_one_window(self, model, tiny_tokenizer, text):
        tokens = len(tiny_tokenizer(text[:300])["input_ids"])
        found = probes.perplexity_of_text(model, tiny_tokenizer, text[:300])
        assert found["window"] == found["long_window"] == tokens
        assert found["windows"] == 1
        assert found["bins"][-1]["end"] == tokens
        assert sum(row["tokens"] for row in found["bins"]) == found["tokens"] == tokens - 1

    def test_mpt_names_its_positions_in_its_own_way(self, tiny_family, tiny_tokenizer, text):
        settings = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_position_embeddings": None}
        model = tiny_family("mpt", max_seq_len=64, **settings)
        found = probes.perplexity_of_text(model, tiny_tokenizer, text[:1000])
        assert found["window"] == found["long_window"] == 64

    def test_few_windows_are_spread_and_not_long(self, model, tiny_tokenizer, text):
        found = probes.perplexity_of_text(model, tiny_tokenizer, text, windows=2)
        assert (found["windows"], found["long_windows"], found["long_window"]) == (2, 2, 1024)
        whole = probes.perplexity_of_text(model, tiny_tokenizer, text)["window_nats"]
        assert found["window_nats"] == pytest.approx([whole[0], whole[len(whole) // 2]])

    def test_a_text_without_context_is_refused(self, model, tiny_tokenizer):
        with pytest.raises(UsageError, match="tokens"):
            probes.perplexity_of_text(model, tiny_tokenizer, "")
        with pytest.raises(UsageError, match="too few tokens"):
            probes.perplexity_of_text(model, tiny_tokenizer, "a")

    def test_files_plain_and_packed(self, model, tiny_tokenizer, text, tmp_path):
        plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.zst"
        text = text[:2000] + "\r\nThe end."  # line ends stay as they are
        data = text.encode()
        plain.write_bytes(data)
        frames = data[: len(data) // 2], data[len(data) // 2 :]
        packed.write_bytes(b"".join(map(zstandard.compress, frames)))  # tools write a frame for each part
        expected = probes.perplexity_of_text(model, tiny_tokenizer, text)
        for path in (plain, packed):
            found = probes.perplexity_of_file(model, tiny_tokenizer, path)
            assert found == {**expected, "text": str(path)}
            table = probes.perplexity_table(probes.compare_perplexity(found, None))
            assert f"{found['perplexity']:.2f}" in table

    def test_unreadable_files(self, model, tiny_tokenizer, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            probes.perplexity_of_file(model, tiny_tokenizer, tmp_path / "none.txt")
        for name in ("bad.txt", "bad.txt.zst"):
            (tmp_path / name).write_bytes(b"\xff\xfe\xfd broken")
            with pytest.raises(SourceError, match="cannot be read"):
                probes.perplexity_of_file(model, tiny_tokenizer, tmp_path / name)


def test_logits_that_exist_at_a_time_fit_the_device():
    def on(device, **sizes):
        text = SimpleNamespace(**sizes)
        place = SimpleNamespace(device=SimpleNamespace(type=device))
        config = SimpleNamespace(get_text_config=lambda: text)
        return positions.chunk_of(SimpleNamespace(parameters=lambda: iter([place]), config=config))

    assert on("cpu", vocab_size=49152) == 2048
    assert on("cuda", vocab_size=49152) == 10922
    assert on("cuda", vocab_size=2**20) == on("cuda") == 2048


class TestRecall:
    @pytest.mark.parametrize("length", [256, 2304])  # in one pass, and in pieces through the cache
    def test_a_model_that_copies_recalls_everything(self, word_tokenizer, length):
        arguments = (ByHand(copying), word_tokenizer, length, 2, 0, [])
        (recalled,), (found,) = recall.recall(*arguments), recall.passkey(*arguments)
        assert (recalled["accuracy"], recalled["exact"], recalled["stderr"]) == (1.0, 1.0, 0.0)
        assert (found["accuracy"], found["stderr"], found["length"]) == (1.0, 0.0, length)

    def test_a_model_that_guesses_is_at_chance(self, word_tokenizer):
        arguments = (ByHand(guessing), word_tokenizer, 256, 60, 0, [])
        (recalled,), (found,) = recall.recall(*arguments), recall.passkey(*arguments)
        assert recalled["chance"] == pytest.approx((1 / 16 + 1 / 15 + 1 / 14 + 1 / 13) / 4)
        assert abs(recalled["accuracy"] - recalled["chance"]) < 4 * recalled["stderr"] < 0.1
        assert recalled["exact"] < 0.02
        assert found["accuracy"] == 0

    def test_documents_fit_their_length_and_depend_on_the_seed(self, word_tokenizer):
        seen = []

        def watching(ids, vocabulary):
            seen.append(ids.tolist())
            return guessing(ids, vocabulary)

        for seed in (0, 0, 1):
            recall.recall(ByHand(watching), word_tokenizer, 512, 1, seed, [])
            recall.passkey(ByHand(watching), word_tokenizer, 512, 1, seed, [])
        assert seen[0:2] == seen[2:4]
        assert seen[0] != seen[4]
        assert seen[1] != seen[5]
        filler = len(recall.encode(word_tokenizer, recall._FILLER))
        assert all(512 - filler < len(ids) <= 512 for ids in seen)

    def test_the_query_is_of_a_listed_key_and_the_number_stands_in_the_text(self, word_tokenizer):
        seen = []
        model = ByHand(lambda ids, vocabulary: seen.append(ids) or guessing(ids, vocabulary))
        recall.recall(model, word_tokenizer, 300, 1, 0, [])
        lines = word_tokenizer.decode(seen[0]).split("\n")
        listed, asked = lines[1:17], lines[-5:-1]  # behind a line of filler, whose tokens a window keeps as sinks
        assert len(set(listed)) == 16
        assert set(asked) <= set(listed)
        recall.passkey(model, word_tokenizer, 300, 1, 0, [])
        decoded = word_tokenizer.decode(seen[1])
        number = decoded[-5:]
        assert number.isdigit()
        assert f"The pass key is {number}. Remember it." in decoded

    def test_values_already_given_do_not_compete(self, word_tokenizer):
        def repeating(ids, vocabulary):
            """Every value so far, the last one first: what a model that sees nothing but a window says."""
            logits = torch.zeros(len(ids), vocabulary)
            for position in range(len(ids)):
                logits[position, ids[: position + 1]] = torch.arange(1.0, position + 2)
            return logits

        (row,) = recall.recall(ByHand(repeating), word_tokenizer, 256, 60, 0, [])
        assert row["exact"] == 0
        assert abs(row["accuracy"] - row["chance"]) < 4 * row["stderr"]

    def test_depths_are_spread_and_keys_vary(self, word_tokenizer):
        seen = []
        model = ByHand(lambda ids, vocabulary: seen.append(ids) or guessing(ids, vocabulary))
        recall.passkey(model, word_tokenizer, 512, 8, 0, [])
        texts = [word_tokenizer.decode(ids) for ids in seen]
        before = [text[: text.index("The pass key is")].count("There and back again.") for text in texts]
        room = texts[0].count("There and back again.")
        assert before == sorted(before)
        assert len({text[-5:] for text in texts}) == 8
        for number, count in enumerate(before):  # the middle of each eighth
            assert abs(count - room * (number + 0.5) / 8) <= 1
        seen.clear()
        recall.recall(model, word_tokenizer, 256, 20, 0, [])
        lines = [word_tokenizer.decode(ids).split("\n") for ids in seen]
        assert len({row[1:17].index(row[-2]) for row in lines}) > 6

    def test_the_first_tokens_hold_no_pair(self, word_tokenizer):
        """A window with sinks keeps them for ever."""
        seen = []
        model = ByHand(lambda ids, vocabulary: seen.append(ids) or guessing(ids, vocabulary))
        recall.recall(model, word_tokenizer, 256, 1, 0, [])
        assert "=" not in word_tokenizer.decode(seen[0][:16])

    def test_a_tokenizer_that_joins_question_and_answer(self, word_tokenizer):
        class Joining:
            bos_token_id = None

            def __call__(self, text, **_):
                return {"input_ids": [len(text)]}

        notes: list[str] = []
        assert recall.passkey(ByHand(guessing), Joining(), 256, 1, 0, notes) == []
        assert notes == ["no passkey probe: the tokenizer joins question and answer"]

    def test_what_cannot_be_measured_is_a_note(self, tiny_tokenizer, word_tokenizer):
        notes: list[str] = []
        model = ByHand(guessing)
        assert recall.recall(model, tiny_tokenizer, 256, 1, 0, notes) == []
        assert recall.recall(model, word_tokenizer, 40, 1, 0, notes) == []
        assert recall.passkey(model, word_tokenizer, 20, 1, 0, notes) == []
        assert probes._letters(model, SingleLetter(), notes) is None
        assert [note.split(":")[0] for note in notes] == [
            "no recall probe",
            "no recall probe at 40 tokens",
            "no passkey probe at 20 tokens",
            "no letter probe",
        ]


class SingleLetter:
    """A tokenizer that does not tell letters apart."""

    bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [7]}


class TestLetters:
    def test_a_model_with_one_letter_is_right_once_in_four(self, tiny_tokenizer):
        letter = recall.encode(tiny_tokenizer, "Answer: B")[-1]
        always = ByHand(lambda ids, v: torch.zeros(len(ids), v).index_fill_(1, torch.tensor([letter]), 1.0))
        found = probes._letters(always, tiny_tokenizer, [])
        assert found["shares"] == {"A": 0.0, "B": 1.0, "C": 0.0, "D": 0.0}
        assert (found["max_share"], found["entropy"], found["accuracy"]) == (1.0, 0.0, 0.25)
        assert found["prompts"] == 4 * len(probes._CHOICES)
        assert found["probabilities"]["B"] == pytest.approx(math.e / (math.e + 3))
        assert sum(found["probabilities"].values()) == pytest.approx(1)

    def test_a_model_that_knows_spreads_its_letters(self, tiny_tokenizer):
        def knowing(ids, vocabulary):
            prompt = tiny_tokenizer.decode(ids)
            options = {answer: wrong for _, answer, *wrong in probes._CHOICES}
            letter = next(line[0] for line in prompt.split("\n")[1:5] if line[3:] in options)
            logits = torch.zeros(len(ids), vocabulary)
            logits[:, recall.encode(tiny_tokenizer, f"Answer: {letter}")[-1]] = 1.0
            return logits

        # documents alone, so that no padding follows the prompt
        found = probes._letters(ByHand(knowing), tiny_tokenizer, [])
        assert (found["accuracy"], found["max_share"], found["entropy"]) == (1.0, 0.25, 2.0)


class TestContinuations:
    @pytest.mark.parametrize("which", ["model", "student"])
    def test_they_are_what_generate_gives(self, which, request, tiny_tokenizer):
        model = request.getfixturevalue(which)
        with torch.no_grad():
            found = probes._continuations(model, tiny_tokenizer, 12, [])
        prompts = windows_of(heldout_tokens(tiny_tokenizer), 32, 8, [])
        expected = model.generate(prompts, do_sample=False, min_new_tokens=12, max_new_tokens=12, pad_token_id=1)
        assert found == expected[:, 32:].tolist()

    def test_a_logit_that_is_nan_is_no_token(self, tiny_llama, tiny_tokenizer):
        model, notes = tiny_llama(), []
        model.model.norm.weight.data.fill_(torch.nan)
        with torch.no_grad():
            assert probes._continuations(model, tiny_tokenizer, 3, notes) == []
        assert notes == ["no continuations: a logit is NaN"]
        assert probes._agreement([], [[1, 2]]) is None

    def test_repetition(self):
        assert probes.repetition([5] * 128) == pytest.approx(1 - 1 / 125)
        assert probes.repetition(list(range(128))) == 0
        assert probes.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
        assert probes.repetition([1, 2]) == 0

    def test_agreement_counts_to_the_first_difference(self):
        found = probes._agreement([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]])
        assert (found["prompts"], found["tokens"]) == (2, 4)
        assert found["share"] == pytest.approx((1 + 0.25) / 2)
        assert found["first_divergence"] == pytest.approx(2.5)
        assert found["identical"] == 0.5


class TestTogether:
    @pytest.fixture(scope="class")
    def results(self, model, student, tiny_tokenizer):
        return [probes.collect(each, tiny_tokenizer, **SMALL) for each in (student, model)]

    def test_a_model_agrees_with_itself(self, results):
        compared = probes.compare(results[1], results[1])
        assert compared["perplexity"]["ratio"] == compared["perplexity"]["far_ratio"] == 1.0
        assert all(row["ratio"] == 1.0 for row in compared["perplexity"]["bins"])
        assert (compared["agreement"]["share"], compared["agreement"]["identical"]) == (1.0, 1.0)
        assert compared["passkey"][0]["student"] == compared["passkey"][0]["teacher"]

    def test_student_and_teacher(self, results):
        compared = probes.compare(*results)
        json.dumps(compared, allow_nan=False)
        ratio = results[0]["perplexity"]["perplexity"] / results[1]["perplexity"]["perplexity"]
        assert compared["perplexity"]["ratio"] == pytest.approx(ratio)
        assert compared["perplexity"]["ratio_stderr"] is None  # of one window
        table = probes.to_table(compared)
        for wanted in (f"{ratio:.3f}", "far: from 256 on", "positions 64-255", "passkey", "greedy continuation"):
            assert wanted in table
        assert "no recall probe: the tokenizer has too few words of one token" in table

    def test_the_share_of_the_teachers_recall_is_paired(self, results):
        sides = [copy.deepcopy(result) for result in results]
        for side, hits in zip(sides, ([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]), strict=True):
            side["passkey"][0].update(hits=hits, accuracy=sum(hits) / 4)
        row = probes.compare(*sides)["passkey"][0]
        deviations = torch.tensor([0 - 2 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64)
        assert row["share"] == pytest.approx(2 / 3)
        assert row["share_stderr"] == pytest.approx(float(deviations.std()) / 2 / 0.75)
        assert "0.667 ±" in probes.to_table(probes.compare(*sides))
        assert probes.compare(*reversed(sides))["passkey"][0]["share"] == pytest.approx(1.5)
        sides[1]["passkey"][0].update(hits=[0.0] * 4, accuracy=0.0)
        assert probes.compare(*sides)["passkey"][0]["share"] is None
        assert probes.compare(sides[0], None)["passkey"][0]["share"] is None

    def test_the_longest_length_bounds_documents_and_windows(self, model, tiny_tokenizer, text):
        found = probes.collect(model, tiny_tokenizer, **{**SMALL, "longest": 600}, generation=False)
        assert [row["length"] for row in found["passkey"]] == [256, 512, 600]
        assert "continuations" not in found
        whole = probes.perplexity_of_text(model, tiny_tokenizer, text, longest=2048)
        assert whole["bins"][-1]["end"] == whole["long_window"] == 2048

    def test_the_error_of_the_ratio_is_paired(self, results):
        sides = [copy.deepcopy(result["perplexity"]) for result in results]
        for side, nats in zip(sides, ([1.1, 2.1, 3.4], [1.0, 2.0, 3.0]), strict=True):
            side["window_nats"] = nats
        compared = probes.compare_perplexity(*sides)
        difference = torch.tensor([0.1, 0.1, 0.4], dtype=torch.float64)
        assert compared["ratio"] == pytest.approx(math.exp(0.2))
        assert compared["ratio_stderr"] == pytest.approx(math.exp(0.2) * float(difference.std()) / 3**0.5)

    def test_other_windows_have_no_ratio(self, results):
        other = {**results[1]["perplexity"], "windows": 9}
        compared = probes.compare_perplexity(results[0]["perplexity"], other)
        assert compared["ratio"] is compared["far_ratio"] is compared["bins"][0]["ratio"] is None
        assert compared["teacher"]["windows"] == 9

    def test_as_many_windows_of_another_tokenizer_have_no_ratio(self, tiny_llama, tiny_tokenizer, word_tokenizer, text):
        model = tiny_llama(vocab_size=1000)
        found = [probes.perplexity_of_text(model, t, text, windows=1) for t in (tiny_tokenizer, word_tokenizer)]
        assert found[0]["tokens"] == found[1]["tokens"]
        compared = probes.compare_perplexity(*found)
        assert compared["ratio"] is compared["ratio_stderr"] is compared["far_ratio"] is None

    def test_without_a_teacher(self, results):
        compared = probes.compare(results[0], None)
        json.dumps(compared, allow_nan=False)
        assert compared["agreement"] is compared["perplexity"]["teacher"] is compared["letters"]["teacher"] is None
        assert "greedy continuation" not in probes.to_table(compared)

    def test_one_branch_alone(self, results, student, tiny_tokenizer):
        with only_branch(student, "local"):
            local = probes.collect(student, tiny_tokenizer, **SMALL)
        assert local["perplexity"]["nats"] != results[0]["perplexity"]["nats"]
        assert local["notes"] == results[0]["notes"]

    def test_the_same_seed_gives_the_same_figures(self, results, student, tiny_tokenizer):
        student.train()
        again = probes.collect(student, tiny_tokenizer, **SMALL)
        assert student.training
        student.eval()
        assert {**again, "seconds": 0} == {**results[0], "seconds": 0}

    def test_lengths_beyond_the_positions_are_named(self, tiny_llama, tiny_tokenizer):
        found = probes.collect(tiny_llama(max_position_embeddings=300), tiny_tokenizer, **{**SMALL, "longest": 512})
        assert [row["length"] for row in found["passkey"]] == [256]
        assert found["notes"][0] == "no probe at 512 tokens: the model has 300 positions"
        assert found["perplexity"]["window"] == 300

    def test_what_is_not_finite_is_none(self, tiny_tokenizer):
        found = probes.collect(ByHand(broken, vocabulary=320), tiny_tokenizer, **SMALL)
        assert found["perplexity"]["perplexity"] is None
        assert found["letters"] is None
        assert recall.largest(torch.tensor([[1.0, 2.0], [math.nan, 3.0]])).tolist() == [1, -1]
        compared = probes.compare(found, found)
        json.dumps(compared, allow_nan=False)
        assert compared["perplexity"]["ratio"] is None
        assert "-" in probes.to_table(compared)

    @pytest.mark.parametrize("wrong", [{"documents": 0}, {"longest": 0}, {"new_tokens": -1}, {"windows": 0}])
    def test_counts_must_be_positive(self, model, tiny_tokenizer, wrong):
        with pytest.raises(UsageError, match="must be positive"):
            probes.collect(model, tiny_tokenizer, **wrong)
