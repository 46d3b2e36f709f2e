"""`quickstart`: convert, distill and evaluate a small real model with built-in defaults, and judge the result."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import with_error
from .checkpoint import QUICKSTART, atomic_folder, read, write_json
from .environment import default_device, hardware, say, versions
from .scores import Perplexity, TaskResult, kept_share

MODEL = "smollm2-135m"
RECIPE = "smoke"
FOLDER = "swapattn-quickstart"
TASKS = ("piqa", "arc_easy")
WINDOWS, WINDOW_LENGTH = 12, 512
MAX_PERPLEXITY_RATIO = 1.35  # of the teacher's


@dataclass(frozen=True)
class QuickstartRow:
    """One model: held-out perplexity and, but for the window-only baseline, its tasks and mean kept share."""

    name: str
    perplexity: Perplexity
    tasks: dict[str, TaskResult]
    kept: float | None
    trained_tokens: int
    seconds: float


@dataclass(frozen=True)
class QuickstartResult:
    """The table, where everything lies, and which thresholds failed."""

    rows: tuple[QuickstartRow, ...]
    folder: Path
    converted: Path
    distilled: Path
    note: str
    limit: int
    data: str
    hardware: str
    seconds: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What the distilled model should have reached and did not, each with its figures."""
        value = {row.name: row.perplexity.value for row in self.rows}
        distilled = value["distilled"]
        limits = (
            (MAX_PERPLEXITY_RATIO * value["teacher"], f"{MAX_PERPLEXITY_RATIO} x the teacher's"),
            (value["converted"], "the converted model's"),
            (value["window only"], "that of the teacher with only window and sinks"),
        )
        return tuple(
            f"held-out perplexity {distilled:.2f} is not below {what} ({bound:.2f})"
            for bound, what in limits
            if not distilled < bound
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json and quickstart.json."""
        from dataclasses import asdict

        return {**asdict(self), "failures": list(self.failures), "versions": versions()}

    def to_table(self) -> str:
        """The table, the paths and the next commands."""
        head = f"{'model':<12}{'perplexity':>12}{'vs teacher':>12}"
        head += "".join(f"{task:>17}" for task in TASKS) + f"{'kept':>8}{'tokens':>10}{'seconds':>9}"
        base = self.rows[0].perplexity.value
        lines = [head]
        for row in self.rows:
            cells = f"{row.name:<12}{row.perplexity.value:>12.2f}{row.perplexity.value / base:>11.3f}x"
            cells += "".join(f"{_task_cell(row.tasks.get(task)):>17}" for task in TASKS)
            kept = f"{row.kept:.0%}" if row.kept is not None else "-"
            lines.append(f"{cells}{kept:>8}{row.trained_tokens or '-':>10}{row.seconds:>9.0f}")
        first = self.rows[0]
        metrics = ", ".join(f"{task} {result.metric}" for task, result in first.tasks.items())
        return "\n".join(
            [
                *lines,
                "",
                f"perplexity: {first.perplexity.tokens:,} held-out tokens in windows of {WINDOW_LENGTH}, embedded text",
                f"tasks: {metrics}; the first {self.limit} documents of each, 0-shot; {self.data}",
                "kept: share of the teacher's margin over chance; tokens, seconds: trained on, spent on training",
                f"teacher: {MODEL}" + (f" ({self.note})" if self.note else ""),
                f"{self.hardware}; {self.seconds:.0f} s in all",
                "",
                f"converted   {self.converted}",
                f"distilled   {self.distilled}",
                f"figures     {self.folder / QUICKSTART}",
                "",
                "next:",
                f'  swapattn generate {self.distilled} --prompt "Why is the sky blue?"',
                f"  swapattn eval {self.distilled} --tasks hellaswag,piqa",
                f"  swapattn distill {self.converted} --recipe short    # one GPU, minutes",
            ]
        )


def _task_cell(result: TaskResult | None) -> str:
    return with_error(result.value, result.stderr) if result is not None else "-"


def quickstart(
    *, output: str | Path | None = None, overwrite: bool = False, limit: int = 50, data: str = "auto"
) -> QuickstartResult:
    """Convert, distill (recipe `smoke`) and evaluate SmolLM2-135M-Instruct; minutes on two CPU cores.

    Args:
        output: folder for everything that is written, default `swapattn-quickstart`.
        overwrite: replace it; without, an interrupted quickstart goes on and a finished one is an error.
        limit: documents per task.
        data: where the evaluation sets come from, see `tasks.task_manager`.

    Raises:
        UsageError: the folder exists.
        SourceError: model or data cannot be had.
    """
    from .conversion import convert
    from .distillation import distill
    from .tasks import task_manager

    start = time.monotonic()
    folder = Path(output) if output is not None else Path(FOLDER)
    _open(folder, overwrite)
    _, _, description = task_manager(TASKS, data)  # what cannot be had is said before anything is trained
    converted, distilled = folder / f"{MODEL}-swapattn", folder / f"{MODEL}-swapattn-{RECIPE}"
    say(f"1/3 converting {MODEL}")
    if not converted.is_dir():
        convert(MODEL, converted, recipe=RECIPE)
    say(f"2/3 distilling with recipe {RECIPE}")
    if not distilled.is_dir():
        distill(converted, recipe=RECIPE, output=distilled)
    say("3/3 evaluating teacher, converted and distilled model")
    made = read(distilled)
    result = QuickstartResult(
        rows=tuple(_evaluate(converted, distilled, limit, data, made.record["stages"])),
        folder=folder,
        converted=converted,
        distilled=distilled,
        note=made.teacher_note,
        limit=limit,
        data=description,
        hardware=hardware(default_device()),
        seconds=round(time.monotonic() - start, 1),
    )
    write_json(folder / QUICKSTART, {"finished": True, **_plain(result.to_dict())})
    return result


def _open(folder: Path, overwrite: bool) -> None:
    """Make the folder, or go on in one that an interrupted quickstart left."""
    marker = folder / QUICKSTART
    if not overwrite and marker.is_file() and not json.loads(marker.read_text(encoding="utf-8")).get("finished"):
        say(f"going on in {folder}, which an interrupted quickstart left")
        return
    with atomic_folder(folder, overwrite=overwrite) as scratch:
        write_json(scratch / QUICKSTART, {"finished": False})


def _evaluate(
    converted: Path, distilled: Path, limit: int, data: str, stages: list[dict[str, Any]]
) -> list[QuickstartRow]:
    """All rows; one model in memory at a time."""
    from .attention import only_branch
    from .loading import load, load_teacher

    device = default_device()
    spent = (sum(int(stage["tokens"]) for stage in stages), sum(float(stage["seconds"]) for stage in stages))
    teacher = _row("teacher", lambda: load_teacher(read(converted), device=device), limit, data)
    window = _row(
        "window only", lambda: load(converted, device=device), 0, data, within=lambda m: only_branch(m, "local")
    )
    before = _row("converted", lambda: load(converted, device=device), limit, data, teacher)
    after = _row("distilled", lambda: load(distilled, device=device), limit, data, teacher, trained=spent)
    return [teacher, window, before, after]


def _row(
    name: str,
    loader: Callable[[], tuple[Any, Any]],
    limit: int,
    data: str,
    teacher: QuickstartRow | None = None,
    *,
    within: Callable[[Any], AbstractContextManager[None]] = lambda _: nullcontext(),
    trained: tuple[int, float] = (0, 0.0),
) -> QuickstartRow:
    from .data import heldout_windows
    from .evaluation import score
    from .perplexity import heldout_perplexity

    say(f"scoring: {name}")
    model, tokenizer = loader()
    with within(model):
        windows = heldout_windows(tokenizer, length=WINDOW_LENGTH, count=WINDOWS)
        perplexity = heldout_perplexity(model, windows)
        tasks = score(model, tokenizer, TASKS, limit=limit, data=data) if limit else {}
    del model
    gc.collect()
    shares = [kept_share(tasks[task], teacher.tasks[task]) for task in tasks] if teacher else []
    known = [share for share in shares if share is not None]
    kept = sum(known) / len(known) if known else None
    return QuickstartRow(name, perplexity, tasks, kept, *trained)


def _plain(value: Any) -> Any:
    """Paths as strings, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
