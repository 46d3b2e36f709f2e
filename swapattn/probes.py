"""What log-likelihood on short tasks hides: perplexity by position, recall, passkey, continuations, letter bias.

`collect` measures one model, `compare` puts the teacher beside it, `to_table` prints both. Everything is made from the
embedded held-out text, from the tokenizer's vocabulary or from sentences in this file, never from an evaluation set.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import CACHE
from .data import heldout_windows
from .errors import UsageError
from .positions import (
    CHUNK,
    aligned,
    compare_perplexity,
    device_of,
    finite,
    logits_in_pieces,
    mean_and_error,
    measuring,
    number,
    perplexity_of_file,
    perplexity_of_text,
    perplexity_table,
    positions_of,
    side_by_side,
    windows_of,
    with_error,
)

__all__ = [
    "collect",
    "compare",
    "compare_perplexity",
    "perplexity_of_file",
    "perplexity_of_text",
    "perplexity_table",
    "repetition",
    "to_table",
]

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LETTERS = "ABCD"
_CPU = {
    "lengths": 3,
    "documents": 4,
    "windows": 8,
    "new_tokens": 64,
}  # some 30,000 tokens: two minutes at 135 M parameters
_PAIRS, _QUERIES = 16, 4  # in a recall document; a list that grew with the length would defeat small teachers too
_CHANCE = sum(1 / (_PAIRS - given) for given in range(_QUERIES)) / _QUERIES
_PROMPTS, _PROMPT_TOKENS = 8, 32

# The wording of the passkey task of Landmark Attention, arXiv 2305.16300.
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_KEY = "The pass key is {0}. Remember it. {0} is the pass key.\n"
_QUESTION = "What is the pass key? The pass key is"
_CHOICES = (
    ("Which of these is a colour?", "green", "table", "seven", "river"),
    ("Which of these is a fruit?", "banana", "hammer", "carpet", "engine"),
    ("Which of these is an animal?", "horse", "window", "copper", "Sunday"),
    ("Which of these is a number?", "twelve", "forest", "shirt", "honest"),
    ("Which of these is a day of the week?", "Monday", "winter", "bottle", "north"),
    ("Which of these is a metal?", "iron", "paper", "butter", "wool"),
    ("Which of these is a part of the body?", "elbow", "ladder", "cloud", "mirror"),
    ("Which of these is a piece of furniture?", "chair", "onion", "music", "rain"),
    ("Which of these is something to drink?", "milk", "brick", "glove", "chalk"),
    ("Which of these is a musical instrument?", "violin", "bridge", "potato", "garden"),
    ("Which of these is a country?", "France", "pencil", "summer", "yellow"),
    ("Which of these can fly?", "an eagle", "a spoon", "a house", "a shoe"),
)


class _Document(NamedTuple):
    """Token ids; the positions whose tokens are to be predicted from those before; the values that compete."""

    ids: list[int]
    targets: list[int]
    values: list[int]


def collect(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    lengths: Sequence[int] | None = None,
    documents: int | None = None,
    windows: int | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All probes on one model, as JSON-able values; what is None follows the device: all on a GPU, little on a CPU.

    Args:
        model: a causal LM, converted or not; put in evaluation mode for the time.
        tokenizer: its tokenizer.
        text: for the perplexity; None = the embedded held-out text.
        lengths: tokens of the recall and passkey documents; those above the model's positions become a note.
        documents: recall and passkey documents a length (50, on a CPU 4).
        windows: at most this many perplexity windows, evenly spread (all, on a CPU 8).
        new_tokens: of each greedy continuation (128, on a CPU 64).
        seed: of words, numbers and depths; teacher and student see the same documents if their tokenizers agree.

    Returns:
        "perplexity" (see `perplexity_of_text`), "recall" and "passkey" (one row a length), "continuations" (token
        ids), "repetition" (share of repeated 4-grams), "letters", "seed", "seconds", "notes".

    Raises:
        UsageError: a count or a length that is not positive, or a text of less than two tokens.
    """
    start = time.perf_counter()
    if any(x is not None and x < 1 for x in (documents, windows, new_tokens, *(lengths or ()))):
        raise UsageError("probes: lengths, documents, windows and new tokens must be positive")
    on_cpu = device_of(model).type == "cpu"
    asked = lengths or (LENGTHS[: _CPU["lengths"]] if on_cpu else LENGTHS)
    documents = documents or (_CPU["documents"] if on_cpu else 50)
    fitting = [length for length in asked if length <= positions_of(model)]
    notes = [
        f"no probe at {n:,} tokens: the model has {positions_of(model):,} positions" for n in asked if n not in fitting
    ]
    perplexity = perplexity_of_text(model, tokenizer, text, windows=windows or (_CPU["windows"] if on_cpu else None))
    with measuring(model):
        recall, passkey = [], []
        for length in tqdm(fitting, desc="recall and passkey", unit="length", file=sys.stderr):
            recall += _recall(model, tokenizer, length, documents, seed, notes)
            passkey += _passkey(model, tokenizer, length, documents, seed, notes)
        continuations = _continuations(model, tokenizer, new_tokens or (_CPU["new_tokens"] if on_cpu else 128))
        letters = _letters(model, tokenizer, notes)
    return {
        "perplexity": perplexity,
        "recall": recall,
        "passkey": passkey,
        "continuations": continuations,
        "repetition": sum(map(repetition, continuations)) / len(continuations),
        "letters": letters,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "notes": notes,
    }


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the n-grams of `tokens` that occurred before: 0 for none, close to 1 for one token for ever."""
    grams = list(zip(*(tokens[start:] for start in range(size)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compare(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    """Two results of `collect` side by side; without a teacher its figures are None.

    "agreement" is about the greedy continuations: "share" is the mean share of tokens before the first that differs.
    """
    other: Mapping[str, Any] = teacher or {}
    return {
        "perplexity": compare_perplexity(student["perplexity"], other.get("perplexity")),
        **{name: side_by_side(student[name], other.get(name, ())) for name in ("recall", "passkey")},
        "agreement": _agreement(student["continuations"], other["continuations"]) if teacher else None,
        **{
            name: {"student": student[name], "teacher": other.get(name)}
            for name in ("repetition", "letters", "seconds")
        },
        "notes": list(dict.fromkeys([*student["notes"], *other.get("notes", ())])),
    }


def to_table(compared: Mapping[str, Any]) -> str:
    """The result of `compare` as plain text."""
    rows: list[tuple[str, ...]] = [("probe", "tokens", "documents", "teacher", "student")]
    for name, key in (("recall, among the values", "accuracy"), ("recall, exact", "exact")):
        rows += [_accuracy_cells(name, row, key) for row in compared["recall"]]
    rows += [_accuracy_cells("passkey", row, "accuracy") for row in compared["passkey"]]
    found = compared["repetition"]
    rows.append(("repeated 4-grams", "", "", number(found["teacher"]), number(found["student"])))
    letters = [(compared["letters"][side] or {}) for side in ("teacher", "student")]
    for key, name in (
        ("max_share", "letters, share of the most frequent"),
        ("entropy", "letters, entropy of 2 bits"),
        ("accuracy", "letters, right"),
    ):
        rows.append((name, "", "", *(number(side.get(key)) for side in letters)))
    lines = [perplexity_table(compared["perplexity"]), "", aligned(rows)]
    agreement = compared["agreement"]
    if agreement:
        lines.append(
            f"greedy continuation: equal to the teacher's for {agreement['first_divergence']:.1f} of "
            f"{agreement['tokens']} tokens ({agreement['share']:.0%}), {agreement['identical']:.0%} to the end"
        )
    return "\n".join([*lines, *compared["notes"]])


def _predict(model: Any, documents: Sequence[_Document]) -> Iterator[tuple[_Document, Tensor]]:
    """Each document with the fp32 logits `[targets, V]` that predict its targets, on the CPU.

    Shorter documents are padded on the right, where a causal model does not look.
    """
    longest = max(len(document.ids) for document in documents)
    size = max(1, CHUNK // longest)
    for first in range(0, len(documents), size):
        batch = documents[first : first + size]
        width = max(len(document.ids) for document in batch)
        ids = torch.tensor([document.ids + [0] * (width - len(document.ids)) for document in batch])
        rows: list[list[Tensor]] = [[] for _ in batch]
        for start, logits in logits_in_pieces(model, ids):
            for row, document in enumerate(batch):
                here = [t - 1 - start for t in document.targets if start <= t - 1 < start + logits.shape[1]]
                rows[row].append(logits[row, here].float().cpu())
        for row, document in enumerate(batch):
            yield document, torch.cat(rows[row])


def _recall(model: Any, tokenizer: Any, length: int, count: int, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Associative recall (MQAR, arXiv 2312.04927): a list of pairs of words, filler text, then four of the keys.

    The values are given after each query, so that one pass answers all four; no key comes twice, so that values
    already given no longer compete.
    """
    words = _words(tokenizer)
    if len(words) < 2 * _PAIRS:
        _note(notes, "no recall probe: the tokenizer has too few words of one token")
        return []
    start, between, end, filler = _start(tokenizer), *(_encode(tokenizer, x) for x in (" =", "\n", _FILLER))
    pair = 2 + len(between) + len(end)
    room = length - len(start) - (_PAIRS + _QUERIES) * pair
    if room < 0:
        _note(notes, f"no recall probe at {length} tokens: {_PAIRS} pairs do not fit")
        return []
    rng = random.Random(f"recall {seed} {length}")
    documents = []
    for _ in range(count):
        chosen = rng.sample(words, 2 * _PAIRS)
        pairs = list(zip(chosen[:_PAIRS], chosen[_PAIRS:], strict=True))
        ids = [*start, *(token for key, value in pairs for token in (key, *between, value, *end))]
        ids += filler * (room // len(filler))
        targets = [len(ids) + query * pair + 1 + len(between) for query in range(_QUERIES)]
        ids += [token for key, value in rng.sample(pairs, _QUERIES) for token in (key, *between, value, *end)]
        documents.append(_Document(ids, targets, chosen[_PAIRS:]))
    among, exact = [], []
    for document, logits in _predict(model, documents):
        truth = torch.tensor([document.ids[target] for target in document.targets])
        values = torch.tensor(document.values)
        competing = logits[:, values]
        for query, answer in enumerate(truth):
            competing[query + 1 :, values == answer] = -math.inf  # it stands nearby and is wrong from here on
        among.append(float((values[competing.argmax(-1)] == truth).double().mean()))
        exact.append(float((logits.argmax(-1) == truth).double().mean()))
    accuracy, stderr = mean_and_error(among)
    exactly, exact_stderr = mean_and_error(exact)
    row = {"length": length, "documents": count, "queries": _QUERIES, "pairs": _PAIRS, "accuracy": accuracy}
    return [{**row, "stderr": stderr, "exact": exactly, "exact_stderr": exact_stderr, "chance": _CHANCE}]


def _passkey(model: Any, tokenizer: Any, length: int, count: int, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """A number of five digits at a random depth of filler text (arXiv 2305.16300), asked for at the end.

    The greedy answer is the number exactly when each of its tokens has the highest logit after those before it, so
    that one pass over the document with its answer says what decoding would.
    """
    rng = random.Random(f"passkey {seed} {length}")
    filler, head = _encode(tokenizer, _FILLER), _start(tokenizer) + _encode(tokenizer, _TASK)
    question = _encode(tokenizer, _QUESTION)
    documents = []
    for _ in range(count):
        number = rng.randrange(10_000, 100_000)
        key = _encode(tokenizer, _KEY.format(number))
        answer = _encode(tokenizer, f"{_QUESTION} {number}")[len(question) :]
        room = (length - len(head) - len(key) - len(question) - len(answer)) // len(filler)
        if room < 0:
            _note(notes, f"no passkey probe at {length} tokens: the task does not fit")
            return []
        before = rng.randint(0, room)
        ids = head + filler * before + key + filler * (room - before) + question
        documents.append(_Document(ids + answer, list(range(len(ids), len(ids) + len(answer))), []))
    right = []
    for document, logits in _predict(model, documents):
        right.append(float(logits.argmax(-1).tolist() == [document.ids[target] for target in document.targets]))
    accuracy, stderr = mean_and_error(right)
    return [{"length": length, "documents": count, "accuracy": accuracy, "stderr": stderr}]


def _continuations(model: Any, tokenizer: Any, new_tokens: int) -> list[list[int]]:
    """Greedy tokens after the first 32 tokens of eight held-out places; the end-of-text token is forbidden."""
    ids = windows_of(heldout_windows(tokenizer, length=1).flatten(), _PROMPT_TOKENS, _PROMPTS).to(device_of(model))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    forbidden = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    cache, found = None, []
    for _ in range(max(1, min(new_tokens, positions_of(model) - _PROMPT_TOKENS))):
        out = model(input_ids=ids, use_cache=True, **{CACHE: cache})
        cache, logits = out[CACHE], out.logits[:, -1].float()
        logits[:, list(forbidden)] = -math.inf
        ids = logits.argmax(-1, keepdim=True)
        found.append(ids)
    rows: list[list[int]] = torch.cat(found, 1).tolist()
    return rows


def _letters(model: Any, tokenizer: Any, notes: list[str]) -> dict[str, Any] | None:
    """Which letter the model prefers on easy questions, each asked four times so that every letter is right once.

    "shares" are of the most likely letter, "probabilities" the mean softmax over the four: small models name one
    letter always, and only the second shows whether the student leans as far.
    """
    encoded = [_encode(tokenizer, f"Answer: {letter}") for letter in LETTERS]
    if len({tuple(ids[:-1]) for ids in encoded}) > 1 or len({ids[-1] for ids in encoded}) < len(LETTERS):
        _note(notes, "no letter probe: the tokenizer has no token for each of A, B, C, D")
        return None
    letters = [ids[-1] for ids in encoded]
    documents = []
    for question, *options in _CHOICES:
        for right in range(len(LETTERS)):
            turned = options[-right:] + options[:-right]  # the right option, first in the list, is now at `right`
            lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, turned, strict=True))
            ids = _start(tokenizer) + _encode(tokenizer, f"{question}\n{lines}Answer: {LETTERS[right]}")
            documents.append(_Document(ids, [len(ids) - 1], letters))
    counts, hits, probabilities = [0] * len(LETTERS), 0, torch.zeros(len(LETTERS), dtype=torch.float64)
    for document, logits in _predict(model, documents):
        chosen = int(logits[0, letters].argmax())
        counts[chosen] += 1
        hits += letters[chosen] == document.ids[-1]
        probabilities += logits[0, letters].double().softmax(-1) / len(documents)
    shares = [count / len(documents) for count in counts]
    return {
        "prompts": len(documents),
        "shares": dict(zip(LETTERS, shares, strict=True)),
        "probabilities": dict(zip(LETTERS, map(finite, probabilities.tolist()), strict=True)),
        "max_share": max(shares),
        "entropy": -sum(share * math.log2(share) for share in shares if share) + 0.0,
        "accuracy": hits / len(documents),
    }


def _words(tokenizer: Any) -> list[int]:
    """Tokens that are a space and a lower-case word of four letters or more, without the very frequent ones.

    Ids of a BPE vocabulary go by frequency; its head is function words and word stems, its tail is rare.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [i for s, i in vocabulary if len(s) > 4 and s[0] in "Ġ▁" and s[1:].isascii() and s[1:].islower()]
    return words[500:3000] if len(words) > 1000 else words


def _start(tokenizer: Any) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def _agreement(student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> dict[str, Any]:
    tokens = min(len(student[0]), len(teacher[0]))
    first = [
        next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), tokens)
        for own, other in zip(student, teacher, strict=True)
    ]
    share, error = mean_and_error([i / tokens for i in first])
    identical = sum(i == tokens for i in first) / len(first)
    found = {"prompts": len(first), "tokens": tokens, "share": share, "stderr": error}
    return {**found, "first_divergence": share * tokens, "identical": identical}


def _accuracy_cells(name: str, row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    error = "exact_stderr" if key == "exact" else "stderr"
    sides = (row["teacher"] or {}, row["student"])
    cells = (f"{row['length']:,}", str(row["student"]["documents"]))
    return (name, *cells, *(with_error(side.get(key), side.get(error)) for side in sides))
