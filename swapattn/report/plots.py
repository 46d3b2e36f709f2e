"""The plots of a report, drawn once each: PNG for elsewhere, SVG for the page.

In the SVG everything that is ink becomes `currentColor`, so that axes and text follow the page's light or dark scheme;
the colours of the data have a contrast of at least 3 on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .document import Node, by_task

INK = "#1b2027"  # on paper; in the page it is replaced
COLOURS = ("#3b82c4", "#cf6a17", "#2a9567", "#a06cd5", "#d1495b", "#8a7a1f")
TEACHER = "#7d838c"
SOFTWARE = "swapattn report"  # in every PNG, so that a later report knows which files are its own
_WIDTH, _HEIGHT = 4.1, 2.9  # inches; on a phone one plot fills the width with text of readable size
_SHORT_LABEL = 20  # characters; two columns of longer ones are wider than the plot
_WIDE = 4  # from this ratio of the largest to the smallest loss on, a logarithmic axis shows more
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and takes the page's font
    "text.parse_math": False,  # a dollar sign in a folder's name is a dollar sign
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **{
        key: INK
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    },
}


Point = tuple[float, float | None, float | None]  # x, y and half the length of y's interval


@dataclass(frozen=True)
class Plot:
    """A drawn plot: the section it belongs to, what it shows in words, and both files."""

    name: str
    part: str
    title: str
    alternative: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Series:
    """One line or row of points; `y` may hold None where there is no value."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    error: Sequence[float | None] = ()
    dashed: bool = False


def draw(document: Node) -> list[Plot]:
    """Every plot that the document has data for."""
    runs = list(document.at("runs").items())
    return [plot for family in (_losses, _tasks, _probes, _cost) for plot in family(runs)]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _label(run: Node) -> str:
    """The run's name; matplotlib hides what begins with an underscore from legends."""
    label = str(run.at("label").value)
    return f" {label}" if label.startswith("_") else label


def _losses(runs: Sequence[Node]) -> Iterator[Plot]:
    panels: dict[tuple[str, int], list[Series]] = {}
    for index, run in enumerate(runs):
        seen: list[str] = []
        for curve in run.at("training", "curves").items():
            stage = str(curve.at("stage").value)
            seen.append(stage)
            series = Series(_label(run), curve.at("steps").value, curve.at("losses").value, _colour(index))
            panels.setdefault((stage, seen.count(stage)), []).append(series)
    for (stage, nth), lines in panels.items():
        name = stage if nth == 1 else f"{stage} {nth}"

        def body(axes: Any, lines: Sequence[Series] = lines) -> None:
            for line in lines:
                axes.plot(line.x, _numbers(line.y), color=line.colour, alpha=0.35, linewidth=0.9)
                axes.plot(line.x, smoothed(line.y), color=line.colour, linewidth=1.8, label=line.label)
            axes.set(xlabel="step", ylabel="loss")
            if _spread(lines) > _WIDE:
                axes.set_yscale("log")
            _plain_ticks(axes.yaxis)

        words = "; ".join(f"{line.label}: {_ends(line)}" for line in lines)
        yield _plot(f"loss-{_slug(name)}", "training", f"Loss of stage {name}", words, body, legend=len(runs) > 1)


def smoothed(values: Sequence[float | None]) -> list[float]:
    """The mean over the steps around each, a twentieth of the curve; NaN where nothing is known."""
    numbers = _numbers(values)
    reach = max(1, len(numbers) // 40)
    means = []
    for index in range(len(numbers)):
        near = [n for n in numbers[max(0, index - reach) : index + reach + 1] if n == n]
        means.append(sum(near) / len(near) if near else float("nan"))
    return means


def _tasks(runs: Sequence[Node]) -> Iterator[Plot]:
    """Points with 95 % intervals, one row a task: the teacher above, each run below it."""
    found = by_task([run.at("eval", "rows") for run in runs])
    tasks = [task for task, rows in found.items() if any(_is_share(row.at("student", "value").value) for row in rows)]
    if not tasks:
        return
    indices = {run.key: index for index, run in enumerate(runs)}

    def rows(run: Node, role: str) -> list[Point]:
        sides = [(place, found[task][indices[run.key]].at(role)) for place, task in enumerate(tasks)]
        return [
            (place, side.at("value").value, 1.96 * (side.at("stderr").value or 0.0))
            for place, side in sides
            if side.at("value")
        ]

    points = _with_teachers(runs, rows)

    def body(axes: Any) -> None:
        step = 0.7 / max(1, len(points))
        for index, series in enumerate(points):
            rows = [place + step * (index - (len(points) - 1) / 2) for place in series.x]
            axes.errorbar(
                series.y,
                rows,
                xerr=series.error,
                fmt="o",
                markersize=4,
                color=series.colour,
                markerfacecolor="none" if series.dashed else series.colour,
                linewidth=1.4,
                label=series.label,
            )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -0.03), min(right, 1.03))  # the interval of a few documents goes beyond what can be
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("score, with its 95 % interval")

    words = "; ".join(
        f"{series.label}: " + ", ".join(f"{tasks[int(x)]} {y:.3f}" for x, y in zip(series.x, series.y, strict=True))
        for series in points
    )
    height = max(_HEIGHT, 1.2 + 0.16 * len(tasks) * (len(points) + 1))
    yield _plot("tasks", "eval", "Tasks: teacher and student", words, body, legend=True, height=height)


def _is_share(value: Any) -> bool:
    """Accuracies share an axis; a perplexity among them would flatten all others."""
    return isinstance(value, int | float) and 0 <= value <= 1


def _probes(runs: Sequence[Node]) -> Iterator[Plot]:
    for name, title, path in (
        ("perplexity", "Perplexity by position", ("eval", "probes", "perplexity", "bins")),
        ("text-perplexity", "Perplexity of the given text by position", ("eval", "text_perplexity", "bins")),
    ):
        series = _with_teachers(runs, _reader(path, _middle, ()))
        yield from _lines(name, "probes", title, "position", "perplexity", series, from_zero=False)
    for name, title in (("recall", "Associative recall by length"), ("passkey", "Passkey found by length")):
        series = _with_teachers(runs, _reader(("eval", "probes", name), _length, ("accuracy",)))
        yield from _lines(name, "probes", title, "tokens", "accuracy", series, unit_interval=True)


def _reader(
    path: Sequence[str], x: Callable[[Node], float], value: Sequence[str]
) -> Callable[[Node, str], list[Point]]:
    """Points of a list whose elements hold both roles."""
    return lambda run, role: [(x(row), row.at(role, *value).value, None) for row in run.at(*path).items()]


def _cost(runs: Sequence[Node]) -> Iterator[Plot]:
    for name, title, key, unit, scale in (
        ("memory", "State and cache a sequence", "state_bytes", "MiB", 2**20),
        ("decode", "Decoding speed", "decode_tokens_per_second", "tokens/s", 1),
    ):

        def rows(run: Node, role: str, key: str = key, scale: int = scale) -> list[Point]:
            found = run.at("eval", "cost", role, "rows").items()
            return [(_length(row), row.at(key).value / scale, None) for row in found if row.at(key)]

        series = _with_teachers(runs, rows)
        yield from _lines(name, "cost", title, "tokens before", unit, series, log=name == "memory")


def _with_teachers(runs: Sequence[Node], rows: Callable[[Node, str], list[Point]]) -> list[Series]:
    """The teachers, those with the same values once, then each run; whatever has no value is left out.

    Teachers that differ, such as one that was timed anew beside each run, have the colour of their run.
    """
    points = {(index, role): rows(run, role) for role in ("teacher", "student") for index, run in enumerate(runs)}
    known = {key: {point for point in found if point[1] is not None} for key, found in points.items()}
    teachers: list[int] = []
    for index in range(len(runs)):
        mine = known[index, "teacher"]
        if mine and not any(mine <= known[other, "teacher"] for other in teachers):
            teachers = [other for other in teachers if not known[other, "teacher"] <= mine] + [index]
    found: list[Series] = []
    for index, role in [*((index, "teacher") for index in teachers), *((i, "student") for i in range(len(runs)))]:
        if not known[index, role]:
            continue
        label, colour = _label(runs[index]), _colour(index)
        if role == "teacher":
            label, colour = (f"teacher of {label.strip()}", colour) if len(teachers) > 1 else ("teacher", TEACHER)
        x, y, error = zip(*points[index, role], strict=True)
        found.append(Series(label, x, y, colour, error, dashed=role == "teacher"))
    return found


def _length(row: Node) -> float:
    return float(row.at("length").value or 0)


def _middle(row: Node) -> float:
    return float((row.at("start").value or 0) + (row.at("end").value or 0)) / 2


def _lines(
    name: str,
    part: str,
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    unit_interval: bool = False,
    from_zero: bool = True,
) -> Iterator[Plot]:
    """A plot over a logarithmic axis of lengths; nothing without data."""
    if not series:
        return
    places = sorted({x for line in series for x in line.x})

    def body(axes: Any) -> None:
        for line in series:
            style = "--" if line.dashed else "-"
            axes.plot(
                line.x,
                _numbers(line.y),
                style,
                marker="o",
                markersize=3.5,
                markerfacecolor="none" if line.dashed else line.colour,
                color=line.colour,
                label=line.label,
                zorder=3,
            )
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
        axes.set_xticks(places, [_thousands(x) for x in places])
        axes.minorticks_off()
        if log and _spread(series) > 1:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        elif unit_interval:
            axes.set_ylim(-0.03, 1.03)
        elif from_zero:
            axes.set_ylim(bottom=0)

    words = "; ".join(f"{line.label}: {_ends(line)}" for line in series)
    yield _plot(name, part, title, words, body, legend=True)


def _thousands(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 and value % 512 == 0 else f"{value:g}"


def _ends(line: Series) -> str:
    known = [value for value in line.y if value is not None]
    return f"{known[0]:.4g} at the start, {known[-1]:.4g} at the end" if known else "no value"


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _spread(series: Sequence[Series]) -> float:
    """The largest value by the smallest; 0 where one is not positive."""
    values = [value for line in series for value in line.y if value is not None]
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def _plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "stage"


def _plot(
    name: str, part: str, title: str, words: str, body: Callable[[Any], None], *, legend: bool, height: float = _HEIGHT
) -> Plot:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}  # matplotlib's stubs know only literal keys
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        body(axes)
        axes.set_axisbelow(True)
        if legend:
            longest = max(len(str(text)) for text in axes.get_legend_handles_labels()[1])
            figure.legend(loc="outside lower center", ncols=2 if longest <= _SHORT_LABEL else 1)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": SOFTWARE})
        axes.set_title(title)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": SOFTWARE})
    alternative = f"{title}. {words}."
    return Plot(name, part, title, alternative, inline(svg.getvalue(), name), png.getvalue())


def inline(svg: str, name: str) -> str:
    """A standalone SVG as an element of a page: no prologue, ink that follows the page, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = body.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
