"""Recall over a distance: key-value pairs and a passkey in documents of a given length, asked for at the end."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import beginning
from .positions import chunk_of, logits_in_pieces, mean_and_error

_PAIRS, _QUERIES = 16, 4  # in a recall document; a list that grew with the length would defeat small teachers too
_CHANCE = sum(1 / (_PAIRS - given) for given in range(_QUERIES)) / _QUERIES

# The wording of the passkey task of Landmark Attention, arXiv 2305.16300.
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_KEY = "The pass key is {0}. Remember it. {0} is the pass key.\n"
_QUESTION = "What is the pass key? The pass key is"


class Document(NamedTuple):
    """Token ids; the positions whose tokens are to be predicted from those before; the values that compete."""

    ids: list[int]
    targets: list[int]
    values: list[int]


def predict(model: Any, documents: Sequence[Document]) -> Iterator[tuple[Document, Tensor]]:
    """Each document with the fp32 logits `[targets, V]` that predict its targets, on the CPU.

    Shorter documents are padded on the right, where a causal model does not look.
    """
    longest = max((len(document.ids) for document in documents), default=1)
    size = max(1, chunk_of(model) // longest)
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


def largest(logits: Tensor) -> Tensor:
    """Index of the largest logit of each row, −1 where one is NaN, which argmax would take for the largest."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def recall(model: Any, tokenizer: Any, length: int, count: int, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Share of right answers to `recall_documents`; "hits" are those of each document.

    "accuracy" is among the values of the list, "exact" among the whole vocabulary.
    """
    documents = recall_documents(tokenizer, length, count, seed, notes)
    among, exact = [], []
    for document, logits in predict(model, documents):
        truth = torch.tensor([document.ids[target] for target in document.targets])
        values = torch.tensor(document.values)
        competing = logits[:, values]
        for query, answer in enumerate(truth):
            competing[query + 1 :, values == answer] = -math.inf  # it stands nearby and is wrong from here on
        best = largest(competing)
        among.append(float(((values[best] == truth) & (best >= 0)).double().mean()))
        exact.append(float((largest(logits) == truth).double().mean()))
    if not documents:
        return []
    exactly, exact_stderr = mean_and_error(exact)
    row = {**_row(length, among), "queries": _QUERIES, "pairs": _PAIRS, "chance": _CHANCE}
    return [{**row, "exact": exactly, "exact_stderr": exact_stderr, "exact_hits": exact}]


def recall_documents(tokenizer: Any, length: int, count: int, seed: int | str, notes: list[str]) -> Sequence[Document]:
    """Associative recall (MQAR, arXiv 2312.04927): a list of pairs of words, filler text, then four of the keys.

    The values are given after each query, so that one pass answers all four; no key comes twice, so that values
    already given no longer compete. Empty, with a note, where the length or the tokenizer does not allow it.
    """
    words = _words(tokenizer)
    if len(words) < 2 * _PAIRS:
        note(notes, "no recall probe: the tokenizer has too few words of one token")
        return []
    between, end, filler = (encode(tokenizer, text) for text in (" =", "\n", _FILLER))
    head = beginning(tokenizer) + filler  # the first pair is not to stand among the sinks of a window
    pair = 2 + len(between) + len(end)
    room = length - len(head) - (_PAIRS + _QUERIES) * pair
    if room < 0:
        note(notes, f"no recall probe at {length} tokens: {_PAIRS} pairs do not fit")
        return []
    rng = random.Random(f"recall {seed} {length}")
    documents = []
    for _ in range(count):
        chosen = rng.sample(words, 2 * _PAIRS)
        pairs = list(zip(chosen[:_PAIRS], chosen[_PAIRS:], strict=True))
        ids = [*head, *(token for key, value in pairs for token in (key, *between, value, *end))]
        ids += filler * (room // len(filler))
        targets = [len(ids) + query * pair + 1 + len(between) for query in range(_QUERIES)]
        ids += [token for key, value in rng.sample(pairs, _QUERIES) for token in (key, *between, value, *end)]
        documents.append(Document(ids, targets, chosen[_PAIRS:]))
    return documents


def passkey(model: Any, tokenizer: Any, length: int, count: int, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Share of `passkey_documents` whose greedy answer is the number.

    It is exactly when each of its tokens has the highest logit after those before it, so that one pass over the
    document with its answer says what decoding would.
    """
    documents = passkey_documents(tokenizer, length, count, seed, notes)
    right = [
        float(largest(logits).tolist() == [document.ids[target] for target in document.targets])
        for document, logits in predict(model, documents)
    ]
    return [_row(length, right)] if documents else []


def passkey_documents(tokenizer: Any, length: int, count: int, seed: int | str, notes: list[str]) -> Sequence[Document]:
    """A number of five digits in filler text (arXiv 2305.16300), asked for at the end; its depths are evenly spread.

    Empty, with a note, where the length or the tokenizer does not allow it.
    """
    rng = random.Random(f"passkey {seed} {length}")
    filler, head = encode(tokenizer, _FILLER), beginning(tokenizer) + encode(tokenizer, _TASK)
    question = encode(tokenizer, _QUESTION)
    documents = []
    for place in range(count):
        number = rng.randrange(10_000, 100_000)
        key = encode(tokenizer, _KEY.format(number))
        asked = encode(tokenizer, f"{_QUESTION} {number}")
        answer = asked[len(question) :]
        if asked[: len(question)] != question or not answer:
            note(notes, "no passkey probe: the tokenizer joins question and answer")
            return []
        room = (length - len(head) - len(key) - len(asked)) // len(filler)
        if room < 0:
            note(notes, f"no passkey probe at {length} tokens: the task does not fit")
            return []
        before = (2 * place + 1) * (room + 1) // (2 * count)
        ids = head + filler * before + key + filler * (room - before) + question
        documents.append(Document(ids + answer, list(range(len(ids), len(ids) + len(answer))), []))
    return documents


def _row(length: int, hits: list[float]) -> dict[str, Any]:
    accuracy, stderr = mean_and_error(hits)
    return {"length": length, "documents": len(hits), "accuracy": accuracy, "stderr": stderr, "hits": hits}


def _words(tokenizer: Any) -> list[int]:
    """Tokens that are a space and a lower-case word of four letters or more, without the very frequent ones.

    Ids of a BPE vocabulary go by frequency; its head is function words and word stems, its tail is rare.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [i for s, i in vocabulary if len(s) > 4 and s[0] in "Ġ▁" and s[1:].isascii() and s[1:].islower()]
    return words[500:3000] if len(words) > 1000 else words


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def note(notes: list[str], text: str) -> None:
    """Add what could not be measured, once."""
    if text not in notes:
        notes.append(text)
