"""The sections of a report, from its JSON document; every figure shown is a part with its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from . import plots
from .baseline_section import baselines
from .document import (
    NONE,
    SPACE,
    Block,
    Cell,
    Code,
    Figure,
    Node,
    Note,
    Part,
    Section,
    Table,
    agreed,
    by_task,
    count,
    duration,
    facts,
    joined,
    number,
    percent,
    percent_with_error,
    plain,
    probability,
    ranges,
    shared_notes,
    size,
    text,
    with_error,
)
from .probe_sections import cost, probes

Fact = tuple[str, Callable[[Node], Cell]]


def sections(document: Node, figures: Sequence[plots.Plot]) -> list[Section]:
    """Everything between title and footer, in reading order; a part that a run lacks is said with what makes it."""
    runs = list(document.at("runs").items())
    labels = [str(run.at("label").value) for run in runs]
    found = [
        _summary(runs, labels),
        _plan(runs, labels),
        _training(runs, labels),
        _evaluation(runs, labels),
        probes(runs, labels),
        baselines(runs, labels),
        cost(runs),
        _provenance(document, runs, labels),
    ]
    for section in found:
        section.blocks += [
            Figure(plot.name, plot.title, plot.alternative) for plot in figures if plot.part == section.name
        ]
        section.blocks += _absent(section.name, runs)
    return [section for section in found if section.blocks]


def _absent(part: str, runs: Sequence[Node]) -> list[Block]:
    """One note for each run that lacks this part."""
    notes: list[Block] = []
    for run in runs:
        for item in run.at("missing").items():
            if item.at("part").value == part or (part, item.at("part").value) == ("provenance", "record"):
                where = (*plain(run.at("label")), Part(": no "), *plain(item.at("what")), Part(". To make it:"))
                notes.append(Note(where, plain(item.at("command"))[0]))
    return notes


def _facts(caption: str, runs: Sequence[Node], labels: Sequence[str], rows: Sequence[Fact]) -> list[Block]:
    table = facts(caption, labels, [(name, [show(run) for run in runs]) for name, show in rows])
    return [table] if table.rows else []


def _summary(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    rows: list[Fact] = [
        ("kind", lambda run: plain(run.at("kind"))),
        ("teacher", _teacher),
        ("layers swapped", _layers),
        (
            "kept share above chance, mean over tasks",
            lambda run: percent_with_error(run.at("eval", "kept"), run.at("eval", "kept_stderr")),
        ),
        (
            "held-out perplexity, times the teacher's",
            lambda run: _ratio(run.at("eval", "probes", "perplexity"), "ratio"),
        ),
        (
            "given text's perplexity, times the teacher's",
            lambda run: _ratio(run.at("eval", "text_perplexity"), "ratio"),
        ),
        ("recall in the longest probe", _recall),
        ("greedy text as the teacher's", lambda run: percent(run.at("eval", "probes", "agreement", "share"))),
        ("memory a sequence in swapped layers", lambda run: size(run.at("plan", "state_bytes"))),
        ("KV cache of the same layers at 32K", lambda run: size(run.at("plan", "lengths", 2, "kv_bytes"))),
        ("trained on, tokens", lambda run: count(run.at("training", "tokens"))),
        ("training time", lambda run: duration(run.at("training", "seconds"))),
    ]
    return Section("summary", "At a glance", _facts("What was gained and what was lost", runs, labels, rows))


def _ratio(node: Node, name: str) -> Cell:
    return with_error(node.at(name), node.at(f"{name}_stderr"))


def _recall(run: Node) -> Cell:
    """What the tasks do not show: a value named once, at the greatest distance that was tried."""
    rows = list(run.at("eval", "probes", "recall").items())
    if not rows:
        return text(NONE)
    row = max(rows, key=lambda row: row.at("length").value or 0)
    shown = (*number(row.at("student", "accuracy")), Part(" at "), *count(row.at("length")), Part(" tokens"))
    teacher = row.at("teacher", "accuracy")
    return (*shown, Part(" (teacher "), *number(teacher), Part(")")) if teacher else shown


def _teacher(run: Node) -> Cell:
    teacher = run.at("provenance", "teacher")
    given = plain(teacher.at("given") if teacher.at("given") else teacher.at("path"))
    note = run.at("provenance", "note")
    return (*given, Part(" ("), *plain(note), Part(")")) if note.value else given


def _layers(run: Node) -> Cell:
    plan = run.at("plan")
    return (
        (*plain(plan.at("swapped_layers")), Part(" of "), *plain(plan.at("attention_layers"))) if plan else text(NONE)
    )


def _plan(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    def spec(run: Node, *path: str) -> Cell:
        return plain(run.at("plan", "spec", *path))

    def shape(run: Node) -> Cell:
        plan = run.at("plan")
        if not plan:
            return text(NONE)
        heads = (*joined(plan.at("heads")), Part(" on "), *joined(plan.at("kv_heads")), Part(" KV heads of "))
        return (*heads, *joined(plan.at("head_dim")))

    def decay(run: Node) -> Cell:
        found = run.at("plan", "spec", "decay")
        if not found:
            return text(NONE)
        learnable = Part(", learnable" if found.at("learnable").value else ", fixed")
        gated = Part(", times a gate of each token" if found.at("gate").value else "")
        return (*plain(found.at("schedule")), Part(", one per "), *plain(found.at("per")), learnable, gated)

    def local(run: Node) -> Cell:
        if not run.at("plan"):
            return text(NONE)
        found = run.at("plan", "spec", "local")
        if not found:
            return text("none")
        return (
            Part("last "),
            *plain(found.at("window")),
            Part(" and first "),
            *plain(found.at("sinks")),
            Part(" tokens"),
        )

    rows: list[Fact] = [
        ("model type", lambda run: plain(run.at("plan", "base_model_type"))),
        ("layers swapped", _layers),
        ("swapped, by index", lambda run: ranges(run.at("plan", "swapped")) if run.at("plan") else text(NONE)),
        ("kept softmax", lambda run: ranges(run.at("plan", "kept")) if run.at("plan") else text(NONE)),
        ("heads of a swapped layer", shape),
        ("q/k norm", lambda run: spec(run, "qk_norm")),
        ("feature map", lambda run: spec(run, "feature_map")),
        ("normalizer", lambda run: spec(run, "normalizer")),
        ("output gate", lambda run: spec(run, "output_gate")),
        ("RoPE on linear branches", lambda run: spec(run, "rope", "linear")),
        ("RoPE on kept layers", lambda run: spec(run, "rope", "kept")),
        ("decay", decay),
        ("softmax branch", local),
        ("new parameters", lambda run: count(run.at("plan", "new_parameters"))),
        ("parameters taken over", lambda run: count(run.at("plan", "kept_parameters"))),
        ("memory a sequence at any length", lambda run: size(run.at("plan", "state_bytes"))),
        ("KV cache per token, bf16", lambda run: size(run.at("plan", "kv_bytes_per_token"))),
    ]
    for index, name in enumerate(("1K", "8K", "32K")):
        rows.append((f"KV cache at {name}", lambda run, i=index: size(run.at("plan", "lengths", i, "kv_bytes"))))  # type: ignore[misc]
    blocks = _facts("What was swapped; memory counts the swapped layers only", runs, labels, rows)
    return Section("plan", "Conversion plan", blocks)


def _training(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    stages = [list(run.at("training", "stages").items()) for run in runs]
    names: list[tuple[str, int]] = []
    for found in stages:
        names += [name for name in _occurrences(found) if name not in names]
    heads = ("tokens", "steps", "time", "tokens/s", "loss, first → last tenth")
    rows = []
    for stage, nth in names:
        row = [text(stage if nth == 1 else f"{stage} {nth}")]
        for found in stages:
            match = [node for node, name in zip(found, _occurrences(found), strict=True) if name == (stage, nth)]
            row += _stage_cells(match[0] if match else Node(None))
        rows.append(tuple(row))
    blocks: list[Block] = []
    if rows:
        groups = (("", 1), *((label, len(heads)) for label in labels))
        blocks.append(Table("Stages of the distillation", ("stage", *heads * len(runs)), tuple(rows), groups))
    return Section("training", "Distillation", blocks)


def _occurrences(stages: Sequence[Node]) -> list[tuple[str, int]]:
    """Stage names with their number among stages of the same name."""
    names = [str(stage.at("stage").value) for stage in stages]
    return [(name, names[: index + 1].count(name)) for index, name in enumerate(names)]


def _stage_cells(stage: Node) -> list[Cell]:
    if stage.at("error_before"):
        before, after = number(stage.at("error_before")), number(stage.at("error_after"))
        loss = (Part("layer error "), *before, Part(f"{SPACE}→{SPACE}"), *after)
    else:
        loss = (*number(stage.at("first_loss"), ".4f"), Part(f"{SPACE}→{SPACE}"), *number(stage.at("last_loss"), ".4f"))
        loss = loss if stage.at("first_loss") else text(NONE)
    rate = number(stage.at("tokens_per_second"), ",.0f")
    return [count(stage.at("tokens")), count(stage.at("steps")), duration(stage.at("seconds")), rate, loss]


def _evaluation(runs: Sequence[Node], labels: Sequence[str]) -> Section:
    tasks = by_task([run.at("eval", "rows") for run in runs])
    blocks: list[Block] = []
    if tasks:
        blocks += [_scores(tasks, labels), _methods(tasks)]
    blocks += shared_notes(runs, "eval", "warnings", kind="warning")
    thresholds = [(run, item) for run in runs for item in run.at("eval", "thresholds").items()]
    if thresholds:
        shown = tuple(
            (
                plain(run.at("label")),
                plain(item.at("key")),
                number(item.at("bound")),
                number(item.at("value")),
                plain(item.at("passed")),
            )
            for run, item in thresholds
        )
        blocks.append(Table("Thresholds", ("run", "figure", "at least", "found", "passed"), shown))
    files = [list(run.at("eval", "files").items()) for run in runs]
    several = any(len(found) > 1 for found in files)
    details: list[Fact] = [
        ("shown from it", lambda file: joined(file.at("adds")) if several else text(NONE)),
        ("checkpoint", lambda file: plain(file.at("checkpoint"))),
        ("documents from", lambda file: plain(file.at("data"))),
        ("first documents only", lambda file: plain(file.at("limit"))),
        ("batch size", lambda file: plain(file.at("batch_size"))),
        ("seed", lambda file: plain(file.at("seed"))),
        ("hardware", lambda file: plain(file.at("hardware"))),
        ("time taken", lambda file: duration(file.at("seconds"))),
        ("evaluated at", lambda file: plain(file.at("time"))),
    ]
    pairs = [(label, file) for label, found in zip(labels, files, strict=True) for file in found]
    names = [str(file.at("file").value) if several else label for label, file in pairs]
    groups = (("", 1), *((label, len(found)) for label, found in zip(labels, files, strict=True) if found))
    for table in _facts("How it was evaluated", [file for _, file in pairs], names, details):
        blocks.append(replace(table, groups=groups) if several and isinstance(table, Table) else table)
    return Section("eval", "Tasks", blocks)


def _scores(tasks: Mapping[str, Sequence[Node]], labels: Sequence[str]) -> Table:
    heads = ("student", f"difference [95{SPACE}%]", "kept", "p")
    lines = []
    for task, found in tasks.items():
        line: list[Cell] = [(Part(f"{task} "), *agreed([plain(row.at("student", "metric")) for row in found]))]
        line.append(agreed([with_error(row.at("teacher", "value"), row.at("teacher", "stderr")) for row in found]))
        for row in found:
            line.append(with_error(row.at("student", "value"), row.at("student", "stderr")))
            line += [
                _difference(row),
                percent_with_error(row.at("kept"), row.at("kept_stderr")),
                probability(row.at("significance", "p_value")),
            ]
        lines.append(tuple(line))
    caption = (
        "± is one standard error; brackets hold the 95 % interval of the difference; p is of the paired test; "
        "kept is the share of the teacher's margin over chance (none where the teacher is near chance)"
    )
    groups = (("", 2), *((label, len(heads)) for label in labels))
    return Table(caption, ("task, metric", "teacher", *heads * len(labels)), tuple(lines), groups)


def _difference(row: Node) -> Cell:
    shown = number(row.at("difference"), "+.3f")
    low, high = row.at("significance", "low"), row.at("significance", "high")
    if not low or not high:
        return shown
    return (*shown, Part(" ["), *number(low, "+.3f"), Part(f",{SPACE}"), *number(high, "+.3f"), Part("]"))


def _methods(tasks: Mapping[str, Sequence[Node]]) -> Table:
    lines = []
    for task, found in tasks.items():
        line = [text(task)]
        line.append(agreed([number(row.at("student", "chance"), ".2f") for row in found]))
        for name, show in (("documents", count), ("num_fewshot", plain), ("version", plain), ("why", plain)):
            line.append(agreed([show(row.at("student", name)) for row in found]))
        line.append(agreed([plain(row.at("significance", "test")) for row in found]))
        lines.append(tuple(line))
    heads = ("task", "chance", "documents", "shots", "version", "why this metric", "paired test")
    return Table("How each task was scored", heads, tuple(lines), numeric=False)


def _of_files(run: Node, key: str, show: Callable[[Node], Cell]) -> Cell:
    """What the evaluations of a run say; where they differ, all of it."""
    return agreed([show(file.at(key)) for file in run.at("eval", "files").items()])


def _provenance(document: Node, runs: Sequence[Node], labels: Sequence[str]) -> Section:
    def versions(node: Node) -> Cell:
        parts: list[Part] = []
        for name in node.names():
            parts += [Part(f"{', ' if parts else ''}{name} "), *plain(node.at(name))]
        return tuple(parts) or text(NONE)

    names = {
        "teacher's folder": ("teacher", "path"),
        "hub id": ("teacher", "hub_id"),
        "revision": ("teacher", "revision"),
        "parent": ("parent", "path"),
        "written": ("time",),
        "recipe": ("recipe_name",),
        "summary": ("recipe_summary",),
        "seed": ("seed",),
        "training text": ("text",),
        "calibrated while converting": ("calibrated",),
        "hardware": ("hardware",),
    }
    rows: list[Fact] = [("folder", lambda run: plain(run.at("path"))), ("teacher", _teacher)]
    for name, path in names.items():
        rows.append((name, lambda run, path=path: plain(run.at("provenance", *path))))  # type: ignore[misc]
    rows.append(("versions", lambda run: versions(run.at("provenance", "versions"))))
    for name, key, show in (("hardware", "hardware", plain), ("versions", "versions", versions)):
        rows.append((f"{name} at evaluation", lambda run, key=key, show=show: _of_files(run, key, show)))  # type: ignore[misc]
    blocks = _facts("Where each run comes from", runs, labels, rows)
    for run, label in zip(runs, labels, strict=True):
        commands = tuple(plain(item)[0] for item in run.at("commands").items())
        if commands:
            blocks += [Note(text(f"To make {label} again:")), Code(commands)]
        recipe = run.at("provenance", "recipe_yaml")
        if recipe:
            title = f"Recipe of {label}, resolved"
            file = str(run.at("provenance", "recipe_file").value)
            if file.endswith(".yaml"):
                title += f"; save it as {file} for the commands above"
            blocks.append(Code((Part(str(recipe.value), recipe.key, recipe.value),), title, "yaml"))
    blocks += [Note(text("To make this report again:")), Code((plain(document.at("command"))[0],))]
    return Section("provenance", "Provenance", blocks)
