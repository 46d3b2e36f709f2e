"""What log-likelihood on short tasks hides: perplexity by position, recall, passkey, continuations, letter bias.

`collect` measures one model, `compare` puts the teacher beside it, `to_table` prints both. Everything is made from the
embedded held-out text, from the tokenizer's vocabulary or from sentences in the code, never from an evaluation set.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from .cache import CACHE
from .cells import aligned, number, with_error
from .data import beginning, heldout_tokens, windows_of
from .errors import UsageError
from .positions import (
    LONGEST,
    compare_perplexity,
    device_of,
    finite,
    mean_and_error,
    measuring,
    perplexity_of_file,
    perplexity_of_text,
    perplexity_table,
    positions_of,
    share_and_error,
    side_by_side,
)
from .recall import Document, encode, largest, note, passkey, predict, recall

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
_GPU = {"longest": LONGEST, "documents": 100, "windows": None, "new_tokens": 128}
_CPU = {"longest": 1024, "documents": 4, "windows": 8, "new_tokens": 64}  # some 30,000 tokens, and twice that for 2,048
_PROMPTS, _PROMPT_TOKENS = 8, 32

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


def collect(
    model: Any,
    tokenizer: Any,
    *,
    text: str | None = None,
    longest: int | None = None,
    documents: int | None = None,
    windows: int | None = None,
    new_tokens: int | None = None,
    generation: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """All probes on one model, as JSON-able values; what is None follows the device: all on a GPU, little on a CPU.

    Args:
        model: a causal LM, converted or not; put in evaluation mode for the time.
        tokenizer: its tokenizer.
        text: for the perplexity; None = the embedded held-out text.
        longest: tokens of the longest recall and passkey document and perplexity window (8,192, on a CPU 1,024);
            documents have this length and the powers of two from 256 below it. What is above the model's positions
            becomes a note.
        documents: recall and passkey documents a length (100, on a CPU 4).
        windows: at most this many perplexity windows, evenly spread (all, on a CPU 8).
        new_tokens: of each greedy continuation (128, on a CPU 64).
        generation: whether continuations, repetition and letters are among the probes.
        seed: of words and numbers; teacher and student see the same documents if their tokenizers agree.

    Returns:
        "perplexity" (see `perplexity_of_text`), "recall" and "passkey" (one row a length), "continuations" (token
        ids), "repetition" (share of repeated 4-grams), "letters", "seed", "seconds", "notes".

    Raises:
        UsageError: a count or a length that is not positive, or a text of less than two tokens.
    """
    start = time.perf_counter()
    if any(x is not None and x < 1 for x in (longest, documents, windows, new_tokens)):
        raise UsageError("probes: lengths, documents, windows and new tokens must be positive")
    sizes: Mapping[str, Any] = _CPU if device_of(model).type == "cpu" else _GPU
    longest, windows = longest or sizes["longest"], windows or sizes["windows"]
    asked = [*(length for length in LENGTHS if length < longest), longest]
    positions = positions_of(model)
    fitting = [length for length in asked if length <= positions]
    notes = [f"no probe at {n:,} tokens: the model has {positions:,} positions" for n in asked if n not in fitting]
    found: dict[str, Any] = {"perplexity": perplexity_of_text(model, tokenizer, text, windows=windows, longest=longest)}
    with measuring(model):
        found |= {"recall": [], "passkey": []}
        for length in tqdm(fitting, desc="recall and passkey", unit="length", file=sys.stderr):
            for name, probe in (("recall", recall), ("passkey", passkey)):
                found[name] += probe(model, tokenizer, length, documents or sizes["documents"], seed, notes)
        if generation:
            continuations = _continuations(model, tokenizer, new_tokens or sizes["new_tokens"], notes)
            found["continuations"] = continuations
            found["repetition"] = sum(map(repetition, continuations)) / len(continuations) if continuations else None
            found["letters"] = _letters(model, tokenizer, notes)
    return {**found, "seed": seed, "seconds": round(time.perf_counter() - start, 1), "notes": notes}


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
        "recall": [
            _shares(row, ("accuracy", "exact")) for row in side_by_side(student["recall"], other.get("recall", ()))
        ],
        "passkey": [_shares(row, ("accuracy",)) for row in side_by_side(student["passkey"], other.get("passkey", ()))],
        "agreement": _agreement(student["continuations"], other.get("continuations", ())),
        **{
            name: {"student": student[name], "teacher": other.get(name)}
            for name in ("repetition", "letters", "seconds")
        },
        "notes": list(dict.fromkeys([*student["notes"], *other.get("notes", ())])),
    }


def to_table(compared: Mapping[str, Any]) -> str:
    """The result of `compare` as plain text."""
    rows: list[tuple[str, ...]] = [("probe", "tokens", "documents", "teacher", "student", "share")]
    for name, key in (("recall, among the values", "accuracy"), ("recall, exact", "exact")):
        rows += [_accuracy_cells(name, row, key) for row in compared["recall"]]
    rows += [_accuracy_cells("passkey", row, "accuracy") for row in compared["passkey"]]
    found = compared["repetition"]
    rows.append(("repeated 4-grams", "", "", number(found["teacher"]), number(found["student"]), ""))
    letters = [(compared["letters"][side] or {}) for side in ("teacher", "student")]
    for key, name in (
        ("max_share", "letters, share of the most frequent"),
        ("entropy", "letters, entropy of 2 bits"),
        ("accuracy", "letters, right"),
    ):
        rows.append((name, "", "", *(number(side.get(key)) for side in letters), ""))
    lines = [perplexity_table(compared["perplexity"]), "", aligned(rows)]
    agreement = compared["agreement"]
    if agreement:
        lines.append(
            f"greedy continuation: equal to the teacher's for {agreement['first_divergence']:.1f} of "
            f"{agreement['tokens']} tokens ({agreement['share']:.0%}), {agreement['identical']:.0%} to the end"
        )
    return "\n".join([*lines, *compared["notes"]])


def _continuations(model: Any, tokenizer: Any, new_tokens: int, notes: list[str]) -> list[list[int]]:
    """Greedy tokens after the first 32 tokens of eight held-out places; the end-of-text token is forbidden.

    Empty, with a note, where a logit is NaN, which argmax would take for the largest.
    """
    prompts = windows_of(heldout_tokens(tokenizer), _PROMPT_TOKENS, _PROMPTS, beginning(tokenizer))
    ids = prompts.to(device_of(model))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    forbidden = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    cache, found = None, []
    count = max(1, min(new_tokens, positions_of(model) - _PROMPT_TOKENS))
    for _ in tqdm(range(count), desc="greedy continuations", unit="token", file=sys.stderr):
        out = model(input_ids=ids, use_cache=True, **{CACHE: cache})
        cache, logits = out[CACHE], out.logits[:, -1].float()
        if logits.isnan().any():
            note(notes, "no continuations: a logit is NaN")
            return []
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
    encoded = [encode(tokenizer, f"Answer: {letter}") for letter in LETTERS]
    if len({tuple(ids[:-1]) for ids in encoded}) > 1 or len({ids[-1] for ids in encoded}) < len(LETTERS):
        note(notes, "no letter probe: the tokenizer has no token for each of A, B, C, D")
        return None
    letters = [ids[-1] for ids in encoded]
    documents = []
    for question, *options in _CHOICES:
        for right in range(len(LETTERS)):
            turned = options[-right:] + options[:-right]  # the right option, first in the list, is now at `right`
            lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, turned, strict=True))
            ids = beginning(tokenizer) + encode(tokenizer, f"{question}\n{lines}Answer: {LETTERS[right]}")
            documents.append(Document(ids, [len(ids) - 1], letters))
    counts, hits, probabilities = [0] * len(LETTERS), 0, torch.zeros(len(LETTERS), dtype=torch.float64)
    predicted = predict(model, documents)
    for document, logits in tqdm(predicted, desc="letters", total=len(documents), unit="prompt", file=sys.stderr):
        chosen = int(largest(logits[0, letters]))
        if chosen < 0:
            note(notes, "no letter probe: a logit is NaN")
            return None
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


def _shares(row: dict[str, Any], figures: Sequence[str]) -> dict[str, Any]:
    """The row with each figure's share of the teacher's and its error, paired over the documents."""
    for figure in figures:
        name, hits = ("share", "hits") if figure == "accuracy" else (f"{figure}_share", f"{figure}_hits")
        sides = (row["student"][hits], row["teacher"][hits]) if row["teacher"] else ((), ())
        row[name], row[f"{name}_stderr"] = share_and_error(*sides)
    return row


def _agreement(student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    if not (student and teacher):
        return None
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
    error, share = ("exact_stderr", "exact_share") if key == "exact" else ("stderr", "share")
    sides = (row["teacher"] or {}, row["student"])
    cells = (f"{row['length']:,}", str(row["student"]["documents"]))
    figures = (with_error(side.get(key), side.get(error)) for side in sides)
    return (name, *cells, *figures, with_error(row[share], row[f"{share}_stderr"]))
