"""The section on what each part of a student carries: branches switched off, the window-only teacher, other models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..baselines import title
from .document import (
    NONE,
    SPACE,
    Block,
    Cell,
    Node,
    Part,
    Section,
    Table,
    at_length,
    by_task,
    number,
    percent_with_error,
    perplexity,
    plain,
    probability,
    text,
    with_error,
)


def baselines(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    """A table for each run, with a column for each model that was set beside it, the run itself among them."""
    blocks: list[Block] = []
    for run, label in zip(runs, labels, strict=True):
        found = run.at("eval", "baselines")
        rows = list(_rows([found.at(role) for role in found.names()]))
        shown = tuple((text(name), *cells) for name, cells in rows if any(cell != text(NONE) for cell in cells))
        caption = f"{label}: ± is one standard error; ratios and p are paired over windows and documents"
        if shown:
            blocks.append(Table(caption, ("", *map(title, found.names())), shown))
    return Section("baselines", "Branches and baselines", blocks)


def _rows(models: Sequence[Node]) -> Iterator[tuple[str, list[Cell]]]:
    """Names and cells of all rows; models from different evaluations need not have the same."""
    yield "kept share, mean", [percent_with_error(model.at("kept"), model.at("kept_stderr")) for model in models]
    for name, tasks in by_task([model.at("tasks") for model in models]).items():
        metric = next(task.at("metric").value for task in tasks if task)
        yield f"{name} {metric}", [with_error(task.at("value"), task.at("stderr")) for task in tasks]
        yield "… student minus this", [_ahead(task) for task in tasks]
    for key, words in (("text_perplexity", "given text"), ("perplexity", "embedded text")):
        texts = [model.at(key) for model in models]
        if len({found.at("text").value for found in texts if found}) > 1:
            yield f"{words}, which differs", [plain(found.at("text")) for found in texts]
        for prefix, where in (("", ""), ("far_", ", from position 256 on")):
            yield f"perplexity, {words}{where}", [perplexity(found.at(f"{prefix}perplexity")) for found in texts]
            ratio = f"{prefix}ratio"
            yield "… times the student's", [with_error(found.at(ratio), found.at(f"{ratio}_stderr")) for found in texts]
    for key, words, value, error in (
        ("recall", "recall, exact", "exact", "exact_stderr"),
        ("passkey", "passkey", "accuracy", "stderr"),
    ):
        for length in sorted({row.at("length").value for model in models for row in model.at(key).items()}):
            rows = [at_length(model.at(key), length) for model in models]
            yield f"{words}, at {length:,} tokens", [with_error(row.at(value), row.at(error)) for row in rows]


def _ahead(task: Node) -> Cell:
    shown, p_value = number(task.at("ahead"), "+.3f"), task.at("significance", "p_value")
    return (*shown, Part(f", p{SPACE}"), *probability(p_value)) if p_value else shown
