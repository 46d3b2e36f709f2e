"""What a report consists of, apart from how it is written: values with their place in the JSON, and blocks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NONE = "–"  # shown where there is no value
SPACE = "\u00a0"  # between what must stay on one line


@dataclass(frozen=True)
class Node:
    """A value of the document together with its key, such as `runs.0.eval.rows.0.student.value`.

    Going on from a value that is not there gives None at the longer key.
    """

    value: Any
    key: str = ""

    def at(self, *path: str | int) -> Node:
        """The value further down."""
        value, key = self.value, self.key
        for step in path:
            key = f"{key}.{step}" if key else str(step)
            if isinstance(step, int):
                value = value[step] if isinstance(value, list) and step < len(value) else None
            else:
                value = value.get(step) if isinstance(value, dict) else None
        return Node(value, key)

    def items(self) -> Iterator[Node]:
        """The elements of a list; none of anything else."""
        for index in range(len(self.value) if isinstance(self.value, list) else 0):
            yield self.at(index)

    def names(self) -> list[str]:
        """The names in an object."""
        return list(self.value) if isinstance(self.value, dict) else []

    def __bool__(self) -> bool:
        return self.value is not None and self.value != [] and self.value != {}


@dataclass(frozen=True)
class Part:
    """A piece of text; with a key it shows the value that the JSON has there."""

    text: str
    key: str = ""
    value: Any = None


Cell = tuple[Part, ...]


@dataclass(frozen=True)
class Table:
    """Rows under one or two lines of heads; `groups` is the upper line as (title, number of columns)."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    groups: tuple[tuple[str, int], ...] = ()
    numeric: bool = True


@dataclass(frozen=True)
class Figure:
    """One of the plots, by name, with the sentence that stands for it where it cannot be seen."""

    name: str
    caption: str
    alternative: str


@dataclass(frozen=True)
class Note:
    """A sentence; `command` is what to type about it."""

    cell: Cell
    command: Part | None = None


@dataclass(frozen=True)
class Code:
    """Lines to copy; folded away under `summary` if there is one."""

    lines: tuple[Part, ...]
    summary: str = ""
    language: str = "console"


Block = Table | Figure | Note | Code


@dataclass
class Section:
    """A part of the page with its heading."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def text(words: str) -> Cell:
    """Words of the report itself."""
    return (Part(words),)


def plain(node: Node) -> Cell:
    """A string or whole number as it is."""
    if node.value is None or node.value == "":
        return text(NONE)
    shown = "yes" if node.value is True else "no" if node.value is False else str(node.value)
    return (Part(shown, node.key, node.value),)


def joined(node: Node, separator: str = ", ") -> Cell:
    """The elements of a list, each with its own key; lists of consecutive numbers stay readable by being short."""
    parts: list[Part] = []
    for item in node.items():
        parts += [Part(separator)] if parts else []
        parts.append(Part(str(item.value), item.key, item.value))
    return tuple(parts) or text("none")


def number(node: Node, pattern: str = ".3f", scale: float = 1.0, unit: str = "") -> Cell:
    """A number in a format, multiplied by `scale` for the eye only."""
    if not isinstance(node.value, int | float):
        return text(NONE)
    # true minus signs line up with plus signs
    shown = format(node.value * scale, pattern).replace("-", "−") + unit
    return (Part(shown, node.key, node.value),)


def percent(node: Node) -> Cell:
    """A share."""
    return number(node, ".1f", 100, f"{SPACE}%")


def percent_with_error(value: Node, error: Node) -> Cell:
    """A share and its standard error."""
    shown = percent(value)
    return (*shown, Part(f"{SPACE}±"), *percent(error)) if isinstance(error.value, int | float) else shown


def count(node: Node) -> Cell:
    """A whole number with separators."""
    return number(node, ",.0f")


def size(node: Node) -> Cell:
    """Bytes in the unit that reads best."""
    if not isinstance(node.value, int | float):
        return text(NONE)
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if node.value >= scale:
            return number(node, ".2f", 1 / scale, f"{SPACE}{unit}")
    return number(node, ".0f", 1, f"{SPACE}B")


def duration(node: Node) -> Cell:
    """Seconds, or minutes and hours when there are many."""
    if not isinstance(node.value, int | float):
        return text(NONE)
    for unit, scale in (("h", 3600), ("min", 60)):
        if node.value >= 2 * scale:
            return number(node, ".1f", 1 / scale, f"{SPACE}{unit}")
    return number(node, ".1f", 1, f"{SPACE}s")


def probability(node: Node) -> Cell:
    """A p-value; very small ones only as an upper bound."""
    if isinstance(node.value, int | float) and node.value < 0.001:
        return (Part(f"<{SPACE}0.001", node.key, node.value),)
    return number(node, ".3f")


def with_error(value: Node, error: Node) -> Cell:
    """A figure and its standard error, to the decimals that the error leaves room for."""
    spread = error.value
    if not isinstance(spread, int | float):
        return number(value)
    decimals = 0 if spread >= 10 else 1 if spread >= 1 else 4 if 0 < spread < 0.0005 else 3
    return (*number(value, f",.{decimals}f"), Part(f"{SPACE}±"), *number(error, f",.{decimals}f"))


def perplexity(node: Node) -> Cell:
    """A perplexity; of a model that predicts nothing its size is enough."""
    large = isinstance(node.value, int | float) and node.value >= 1000
    return number(node, ",.0f" if large else ".2f")


def facts(caption: str, labels: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> Table:
    """A table with one column per run; rows without a value in any run are left out."""
    shown = [(name, cells) for name, cells in rows if any(cell != text(NONE) for cell in cells)]
    return Table(caption, ("", *labels), tuple((text(name), *cells) for name, cells in shown), numeric=False)


def ranges(node: Node) -> Cell:
    """Sorted whole numbers, those in a row as first–last."""
    numbers = list(node.value or [])
    if not numbers:
        return text("none")
    spans = [[numbers[0], numbers[0]]]
    for item in numbers[1:]:
        if item == spans[-1][1] + 1:
            spans[-1][1] = item
        else:
            spans.append([item, item])
    shown = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
    return (Part(shown, node.key, node.value),)


def agreed(cells: Sequence[Cell]) -> Cell:
    """One cell for what should be the same in all runs; where it is not, all values, so that the reader sees it."""
    shown: dict[str, Cell] = {}
    for cell in cells:
        shown.setdefault("".join(part.text for part in cell), cell)
    shown.pop(NONE, None)
    parts: list[Part] = []
    for cell in shown.values():
        parts += [*([Part(" / ")] if parts else []), *cell]
    return tuple(parts) or text(NONE)


def at_length(rows: Node, length: int) -> Node:
    """The row of that length; Node(None) where there is none."""
    return next((row for row in rows.items() if row.at("length").value == length), Node(None))


def by_task(groups: Sequence[Node]) -> dict[str, list[Node]]:
    """The tasks in any of these lists of rows, each with its row of every list; Node(None) where that has none.

    A task that was scored with several numbers of shots has a row for each, and says them.
    """
    found: dict[tuple[str, Any], dict[int, Node]] = {}
    for place, rows in enumerate(groups):
        for row in rows.items():
            result = row.at("student") or row
            found.setdefault((result.at("task").value, result.at("num_fewshot").value), {})[place] = row
    tasks = [task for task, _ in found]
    names = {
        (task, shots): f"{task}, {shots} shots" if tasks.count(task) > 1 and shots is not None else str(task)
        for task, shots in found
    }
    return {names[key]: [rows.get(place, Node(None)) for place in range(len(groups))] for key, rows in found.items()}


def shared_notes(runs: Sequence[Node], *path: str, kind: str = "") -> list[Note]:
    """The strings in the lists at a path, each once, with the runs that it is about where that is not every one."""
    about: dict[str, list[tuple[Node, Node]]] = {}
    for run in runs:
        for item in run.at(*path).items():
            about.setdefault(str(item.value), []).append((run, item))
    notes = []
    for found in about.values():
        names: list[Part] = []
        for run, _ in found:
            names += [*([Part(", ")] if names else []), *plain(run.at("label"))]
        names = [Part("all runs")] if len(found) == len(runs) > 1 else names
        notes.append(Note((*names, Part(f", {kind}: " if kind else ": "), *plain(found[0][1]))))
    return notes
