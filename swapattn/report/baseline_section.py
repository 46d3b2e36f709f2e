"""The section on what each part of a student carries: branches switched off, the window-only teacher, other models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..baselines import title
from .document import (
    NONE,
    Block,
    Cell,
    Node,
    Part,
    Section,
    Table,
    number,
    percent_with_error,
    probability,
    text,
    with_error,
)

Show = Callable[[Node], Cell]


def baselines(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    """A table for each run, with a column for each model that was set beside it, the run itself among them."""
    blocks: list[Block] = []
    for run, label in zip(runs, labels, strict=True):
        found = run.at("eval", "baselines")
        models = [found.at(role) for role in found.names()]
        if not models:
            continue
        rows = [(name, [show(model) for model in models]) for name, show in _rows(models[0])]
        shown = tuple((text(name), *cells) for name, cells in rows if any(cell != text(NONE) for cell in cells))
        caption = f"{label}: ± is one standard error; ratios and p are paired over windows and documents"
        blocks.append(Table(caption, ("", *map(title, found.names())), shown))
    return Section("baselines", "Branches and baselines", blocks)


def _rows(first: Node) -> list[tuple[str, Show]]:
    """The names and cells of all rows; models of one run were measured alike, so that the first tells what there is."""
    rows: list[tuple[str, Show]] = [
        ("kept share, mean", lambda model: percent_with_error(model.at("kept"), model.at("kept_stderr")))
    ]
    for index, task in enumerate(first.at("tasks").items()):
        rows.append((f"{task.at('task').value} {task.at('metric').value}", _figure("value", "stderr", "tasks", index)))
        rows.append(("… student minus this", _ahead(index)))
    for key, words in (("text_perplexity", "perplexity, given text"), ("perplexity", "perplexity, embedded text")):
        for prefix, where in (("", ""), ("far_", ", from position 256 on")):
            rows.append((words + where, _perplexity(key, f"{prefix}perplexity")))
            rows.append(("… times the student's", _figure(f"{prefix}ratio", f"{prefix}ratio_stderr", key)))
    for key, words, value, error in (
        ("recall", "recall, exact", "exact", "exact_stderr"),
        ("passkey", "passkey", "accuracy", "stderr"),
    ):
        for index, row in enumerate(first.at(key).items()):
            rows.append((f"{words}, at {row.at('length').value:,} tokens", _figure(value, error, key, index)))
    return rows


def _figure(value: str, error: str, *path: str | int) -> Show:
    return lambda model: with_error(model.at(*path, value), model.at(*path, error))


def _perplexity(key: str, name: str) -> Show:
    return lambda model: number(model.at(key, name), ".2f")


def _ahead(index: int) -> Show:
    def show(model: Node) -> Cell:
        task = model.at("tasks", index)
        shown, p_value = number(task.at("ahead"), "+.3f"), task.at("significance", "p_value")
        return (*shown, Part(", p "), *probability(p_value)) if p_value else shown

    return show
