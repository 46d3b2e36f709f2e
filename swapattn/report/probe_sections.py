"""The sections on what log-likelihood hides: probes by length, and the cost of generating."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .document import (
    NONE,
    SPACE,
    Block,
    Cell,
    Node,
    Note,
    Part,
    Section,
    Table,
    agreed,
    at_length,
    count,
    facts,
    number,
    percent,
    percent_with_error,
    perplexity,
    plain,
    shared_notes,
    size,
    text,
    with_error,
)

Show = Callable[[Node], Cell]


def probes(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    """Perplexity, recall, passkey, agreement, repetition and letters, with the teacher beside each run."""
    found = [run.at("eval", "probes") for run in runs]
    blocks: list[Block] = []
    blocks += _perplexity("Held-out perplexity", [node.at("perplexity") for node in found], labels)
    blocks += _perplexity("Perplexity of the given text", [run.at("eval", "text_perplexity") for run in runs], labels)
    blocks += _embedded([run.at("eval", "perplexity") for run in runs], runs, labels)
    accuracy: Show = lambda row: with_error(row.at("accuracy"), row.at("stderr"))  # noqa: E731
    exact: Show = lambda row: with_error(row.at("exact"), row.at("exact_stderr"))  # noqa: E731
    recall = [node.at("recall") for node in found]
    blocks += by_length(
        "Associative recall: the right value among the document's", recall, labels, accuracy, chance=True
    )
    blocks += by_length("Associative recall: the right value in the whole vocabulary", recall, labels, exact)
    blocks += by_length("Passkey found", [node.at("passkey") for node in found], labels, accuracy)
    blocks += _generation(found, labels)
    blocks += shared_notes(runs, "eval", "probes", "notes")
    return Section("probes", "Probes", blocks)


def by_length(
    caption: str, found: Sequence[Node], labels: Sequence[str], show: Show, *, chance: bool = False
) -> list[Block]:
    """One row per length with the teacher once and each run's own figure; nothing if no run has any."""
    lengths = sorted({row.at("length").value for node in found for row in node.items() if row.at("length")})
    lines = []
    for length in lengths:
        rows = [at_length(node, length) for node in found]
        line = [agreed([count(row.at("length")) for row in rows])]
        if chance:
            line.append(agreed([number(row.at("student", "chance"), ".2f") for row in rows]))
        line.append(agreed([show(row.at("teacher")) for row in rows]))
        lines.append((*line, *(show(row.at("student")) for row in rows)))
    heads = ("tokens", *(("chance",) if chance else ()), "teacher", *labels)
    return [Table(caption, heads, tuple(lines))] if lines else []


def _perplexity(title: str, found: Sequence[Node], labels: Sequence[str]) -> list[Block]:
    if not any(found):
        return []
    rows: list[tuple[str, Show]] = [
        ("text", lambda node: plain(node.at("text"))),
        ("tokens", lambda node: count(node.at("student", "tokens"))),
        ("teacher", lambda node: perplexity(node.at("teacher", "perplexity"))),
        ("student", lambda node: perplexity(node.at("student", "perplexity"))),
        ("times the teacher's", lambda node: with_error(node.at("ratio"), node.at("ratio_stderr"))),
        ("the same from position 256 on", lambda node: with_error(node.at("far_ratio"), node.at("far_ratio_stderr"))),
    ]
    blocks: list[Block] = [facts(title, labels, [(name, [show(node) for node in found]) for name, show in rows])]
    spans = sorted({(row.at("start").value, row.at("end").value) for node in found for row in node.at("bins").items()})
    lines = []
    for span in spans:
        rows_here = [_at_span(node.at("bins"), span) for node in found]
        first = next(row for row in rows_here if row)
        # without the word joiner a line may end behind the dash
        where = (*count(first.at("start")), Part(f"{SPACE}–\u2060{SPACE}"), *count(first.at("end")))
        line = [where, agreed([perplexity(row.at("teacher")) for row in rows_here])]
        for row in rows_here:
            line += [perplexity(row.at("student")), number(row.at("ratio"))]
        lines.append(tuple(line))
    if lines:
        groups = (("", 2), *((label, 2) for label in labels))
        heads = ("positions", "teacher", *("student", "ratio") * len(found))
        blocks.append(Table(f"{title} by position (end exclusive)", heads, tuple(lines), groups))
    return blocks


def _at_span(bins: Node, span: tuple[int, int]) -> Node:
    return next((row for row in bins.items() if (row.at("start").value, row.at("end").value) == span), Node(None))


def _embedded(found: Sequence[Node], runs: Sequence[Node], labels: Sequence[str]) -> list[Block]:
    """`eval --perplexity` without a file: one figure per model, under the run's kind."""
    if not any(found):
        return []
    own = [node.at(str(run.at("eval", "kind").value)) for node, run in zip(found, runs, strict=True)]
    rows = [
        ("tokens", [count(node.at("tokens")) for node in own]),
        ("teacher", [perplexity(node.at("teacher", "value")) for node in found]),
        ("student", [perplexity(node.at("value")) for node in own]),
    ]
    return [facts("Held-out perplexity on the embedded text", labels, rows)]


def _generation(found: Sequence[Node], labels: Sequence[str]) -> list[Block]:
    agreement = [node.at("agreement") for node in found]
    letters = [node.at("letters") for node in found]
    rows = [
        (
            "greedy text as the teacher's",
            [percent_with_error(node.at("share"), node.at("stderr")) for node in agreement],
        ),
        ("of this many tokens", [plain(node.at("tokens")) for node in agreement]),
        ("first divergence, tokens", [number(node.at("first_divergence"), ".1f") for node in agreement]),
        ("prompts without divergence", [percent(node.at("identical")) for node in agreement]),
        ("repeated 4-grams, student", [percent(node.at("repetition", "student")) for node in found]),
        ("repeated 4-grams, teacher", [percent(node.at("repetition", "teacher")) for node in found]),
    ]
    for role in ("student", "teacher"):
        rows.append((f"most frequent letter, {role}", [percent(node.at(role, "max_share")) for node in letters]))
        rows.append(
            (f"letters' entropy of 2 bits, {role}", [number(node.at(role, "entropy"), ".2f") for node in letters])
        )
        rows.append((f"letters A B C D, {role}", [_letters(node.at(role, "shares")) for node in letters]))
    table = facts("Greedy continuation, repetition and letter bias", labels, rows)
    return [table] if table.rows else []


def _letters(shares: Node) -> Cell:
    parts: list[Part] = []
    for name in shares.names():
        parts += [*([Part(" · ")] if parts else []), *percent(shares.at(name))]
    return tuple(parts) or text(NONE)


def cost(runs: Sequence[Node]) -> Section:
    """State or cache bytes and tokens per second by length, of the runs where they were measured."""
    runs = [run for run in runs if run.at("eval", "cost")]
    labels = [str(run.at("label").value) for run in runs]
    found = [run.at("eval", "cost") for run in runs]
    blocks: list[Block] = []
    shows: list[tuple[str, Show]] = [
        ("Bytes of state and cache a sequence, the whole model", lambda row: size(row.at("state_bytes"))),
        ("Decoding, tokens/s", lambda row: number(row.at("decode_tokens_per_second"), ",.1f")),
        ("Prefill, tokens/s", lambda row: number(row.at("prefill_tokens_per_second"), ",.0f")),
    ]
    for caption, show in shows:
        blocks += _measured(caption, found, labels, show)
    machine = [
        ("device", [plain(node.at("student", "device")) for node in found]),
        ("dtype", [plain(node.at("student", "dtype")) for node in found]),
        ("tokens timed", [plain(node.at("student", "new_tokens")) for node in found]),
    ]
    table = facts("How it was measured", labels, machine)
    blocks += [table] if table.rows else []
    for run, node in zip(runs, found, strict=True):
        for role in ("student", "teacher"):
            for item in node.at(role, "skipped").items():
                where = (
                    *plain(run.at("label")),
                    Part(f", {role}: "),
                    *count(item.at("length")),
                    Part(" tokens skipped: "),
                )
                blocks.append(Note((*where, *plain(item.at("reason")))))
    return Section("cost", "Speed and memory by length", blocks)


def _measured(caption: str, found: Sequence[Node], labels: Sequence[str], show: Show) -> list[Block]:
    """One row per length with the teacher once, or beside each run where it was timed anew with each."""
    sides = [node.at(role, "rows") for node in found for role in ("teacher", "student")]
    lines, alone = [], True
    for length in sorted({row.at("length").value for side in sides for row in side.items()}):
        rows = [at_length(side, length) for side in sides]
        cells = [show(row) for row in rows]
        teacher = agreed(cells[::2])
        alone = alone and (teacher == text(NONE) or teacher in cells)
        lines.append((agreed([count(row.at("length")) for row in rows]), teacher, cells))
    if not lines:
        return []
    if alone:
        shared = tuple((first, teacher, *cells[1::2]) for first, teacher, cells in lines)
        return [Table(caption, ("tokens before", "teacher", *labels), shared)]
    groups = (("", 1), *((label, 2) for label in labels))
    heads = ("tokens before", *("teacher", "student") * len(labels))
    return [Table(caption, heads, tuple((first, *cells) for first, _, cells in lines), groups)]
