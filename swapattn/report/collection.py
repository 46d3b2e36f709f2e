"""Read checkpoint folders into the one JSON document that a report shows; every part of a folder may be missing."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..checkpoint import LOG, RECORD, REPORT, read
from ..errors import CheckpointError, SwapattnError, UsageError
from ..recipe import ConvertSpec, load_recipe, recipe_names, restated
from ..scores import mean_share

KIND = "swapattn report"  # first value of every document, and what marks a file as one of ours
VERSION = 1
EVAL_SCHEMA = 1  # the newest form of an evaluation that is understood here
OTHERS = "eval-*.json"  # further evaluations of a checkpoint beside REPORT
PARTS = {  # what an evaluation may hold beside its rows, and how the report calls it
    "perplexity": "embedded text",
    "text_perplexity": "given text",
    "probes": "probes",
    "cost": "speed and memory",
}
LENGTHS = (1024, 8192, 32768)  # where the planned state is set against the KV cache


def collect(runs: Sequence[Path], command: str) -> dict[str, Any]:
    """The document: one entry in `runs` per folder, in the order given.

    Args:
        runs: checkpoint folders, or folders with some of a checkpoint's files.
        command: the line that makes this report, for the reader.

    Raises:
        UsageError: a folder does not exist or holds nothing of a checkpoint; the same folder twice.
        CheckpointError: a file is damaged; the message names it.
    """
    seen: set[Path] = set()
    for run in runs:
        if run.resolve() in seen:
            raise UsageError(f"{run} is named twice: a report compares different runs")
        seen.add(run.resolve())
    entries = [{"label": label, **_run(path)} for label, path in zip(_labels(runs), runs, strict=True)]
    return {
        "kind": KIND,
        "version": VERSION,
        "swapattn": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "runs": entries,
    }


def _labels(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(len(names) for names in parts) + 1):
        labels = ["/".join(names[-depth:]) for names in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(run) for run in runs]


def _run(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UsageError(f"no checkpoint folder {path}")
    config = _json(path / "config.json")
    block = config.get("swapattn") if config else None
    curves = _curves(path / LOG)
    evaluation = _evaluations(path)
    record = dict(read(path).record) if (path / RECORD).is_file() else None
    if record is None and block is None and not curves and evaluation is None:
        raise UsageError(
            f"{path} is not a checkpoint folder: no {RECORD}, {LOG} or {REPORT}; make one with `swapattn convert`"
        )
    plan = _plan(path, block) if block is not None else None
    entry = {
        "path": str(path),
        "kind": (record or evaluation or {}).get("kind"),
        "name": (record or {}).get("name"),
        "plan": plan,
        "training": _training(record, curves),
        "eval": evaluation,
        "provenance": _provenance(path, record, evaluation),
        "commands": _commands(path, record, evaluation),
    }
    return {**entry, "missing": _missing(path, entry, record)}


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object with its non-finite numbers as null, or None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: a JSON object is expected")
    return value


def _evaluations(folder: Path) -> dict[str, Any] | None:
    """All evaluations of a checkpoint as one: what comes first is kept, later files add what is not there yet.

    `files` says of each file what is shown from it, and how that was measured.
    """
    paths = [folder / REPORT, *sorted(folder.glob(OTHERS))]
    reports = {path: report for path in paths if (report := _evaluation(path)) is not None}
    if not reports:
        return None
    found: dict[str, Any] = {**next(iter(reports.values())), "rows": [], **dict.fromkeys(PARTS)}
    found |= {"baselines": {}, "thresholds": [], "warnings": [], "files": []}
    for path, report in reports.items():
        adds = _add(found, report)
        how = ("checkpoint", "data", "limit", "batch_size", "seed", "hardware", "versions", "seconds", "time")
        file = {"file": path.name, "adds": adds, "command": _eval_command(path, report)}
        found["files"].append(file | {key: report.get(key) for key in how})
    return found


def _add(found: dict[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Add what a further evaluation brings, and say what that is."""
    adds = ["tasks"] if _add_rows(found, "rows", report, report["rows"]) else []
    for part, words in PARTS.items():
        if report.get(part) and not found[part]:
            found[part] = report[part]
            adds.append(words)
    # a baseline's row does not say its shots, its evaluation does
    shots = {row["student"]["task"]: row["student"].get("num_fewshot") for row in report["rows"]}
    models = (report.get("baselines") or {}).items()
    if any([_add_baseline(found["baselines"].setdefault(role, {}), model, shots) for role, model in models]):
        adds.append("branches and baselines")
    found["thresholds"] += report.get("thresholds") or []
    found["warnings"] += [words for words in report.get("warnings") or [] if words not in found["warnings"]]
    return adds


def _add_baseline(found: dict[str, Any], model: Mapping[str, Any], shots: Mapping[str, int | None]) -> bool:
    """Whether there was anything new in it."""
    tasks = [{**row, "num_fewshot": shots.get(row.get("task"))} for row in model.get("tasks") or []]
    new = _add_rows(found, "tasks", model, tasks)
    for key, value in model.items():
        if key in ("tasks", "kept", "kept_stderr"):
            continue
        if isinstance(value, list):
            new = _add_rows(found, key, model, value) or new
        elif value is not None and found.get(key) is None:
            found[key], new = value, True
    return new


def _add_rows(found: dict[str, Any], key: str, source: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there were new rows; the mean share stays that of all rows."""
    old = found.get(key) or []
    known = [_identity(row) for row in old]
    found[key] = [*old, *(row for row in rows if _identity(row) not in known)]
    new = len(found[key]) > len(old)
    if key in ("rows", "tasks") and not old:
        found |= {name: source.get(name) for name in ("kept", "kept_stderr")}
    elif key in ("rows", "tasks") and new:
        shares = ((row.get("kept"), row.get("kept_stderr")) for row in found[key])
        found["kept"], found["kept_stderr"] = mean_share(shares)
    return new


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from others: task and shots, or the length."""
    return tuple(row.get("student", row).get(key) for key in ("task", "num_fewshot", "length"))


def _evaluation(path: Path) -> dict[str, Any] | None:
    report = _json(path)
    if report is None:
        return None
    schema = report.get("schema", 0)
    if not isinstance(schema, int) or schema > EVAL_SCHEMA:
        raise CheckpointError(f"{path} is of schema {schema}: update swapattn")
    rows = report.get("rows")
    anew = f"write it anew with `swapattn eval {path.parent} -o {path}`"
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise CheckpointError(f"{path} is damaged: no rows of tasks; {anew}")
    models = report.get("baselines") or {}
    if not isinstance(models, dict) or not all(_is_baseline(model) for model in models.values()):
        raise CheckpointError(f"{path} is damaged: its baselines; {anew}")
    if not all(isinstance(report.get(key) or [], list) for key in ("thresholds", "warnings")):
        raise CheckpointError(f"{path} is damaged: its thresholds or warnings; {anew}")
    return report


def _is_baseline(model: Any) -> bool:
    return isinstance(model, dict) and all(
        isinstance(row, dict) for value in model.values() if isinstance(value, list) for row in value
    )


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("student"), dict):
        return False
    sides = [row["student"], *([row["teacher"]] if row.get("teacher") else [])]
    return all(isinstance(side, dict) and isinstance(side.get("value"), int | float | None) for side in sides) and all(
        isinstance(side.get("task"), str) for side in sides
    )


def _curves(path: Path) -> list[dict[str, Any]]:
    """The log of a distillation as one curve per stage; steps that a resumed run repeated count once."""
    curves: list[dict[str, Any]] = []
    last = None
    if not path.is_file():
        return curves
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda _: None)
            stage, step, loss = str(record["stage"]), int(record["step"]), record["loss"]
            run = record.get("run")
            loss = None if loss is None else float(loss)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}, line {number} is damaged: {error}") from error
        if not curves or (curves[-1]["stage"], last) != (stage, run) or (step == 1 and curves[-1]["steps"][-1] > 1):
            curves.append({"stage": stage, "steps": [], "losses": []})
        last = run
        curve = curves[-1]
        while curve["steps"] and curve["steps"][-1] >= step:
            curve["steps"].pop()
            curve["losses"].pop()
        curve["steps"].append(step)
        curve["losses"].append(loss)
    return curves


def _training(record: Mapping[str, Any] | None, curves: list[dict[str, Any]]) -> dict[str, Any] | None:
    stages = list((record or {}).get("stages", ()))
    if not stages and not curves:
        return None
    trained = [stage for stage in stages if stage.get("steps")]
    every = [*(record or {}).get("earlier", ()), *stages]  # what a parent was trained on is in its child as well
    return {
        "stages": stages,
        "tokens": sum(stage.get("tokens") or 0 for stage in every) if stages else None,
        "seconds": round(sum(stage.get("seconds") or 0.0 for stage in every), 2) if stages else None,
        "curves": _whole(curves, trained),
    }


def _whole(curves: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the curves of runs that stopped before their stage was done and then began it again.

    A stage that starts again at step 1 looks in the log like a second stage of the same name; the record knows how
    many steps each stage has.
    """
    kept: list[dict[str, Any]] = []
    for curve in curves:
        last = len(kept) - 1
        again = last >= 0 and kept[last]["stage"] == curve["stage"] and last < len(trained)
        if again and kept[last]["steps"][-1] < trained[last]["steps"]:
            kept.pop()
        kept.append(curve)
    return kept


def _plan(path: Path, block: Any) -> dict[str, Any]:
    from ..surgery import AttentionSite, SwapPlan

    unknown: dict[str, Any] = {
        "scaling": None,
        "sliding_window": None,
        "softcap": None,
        "sinks": False,
    }  # not kept in a checkpoint
    try:
        spec = ConvertSpec.model_validate(block["spec"])
        sites = tuple(AttentionSite(path=name, **shape, **unknown) for name, shape in block["layers"].items())
        swapped = sorted(site.layer_idx for site in sites)
        assert isinstance(spec.keep_softmax, tuple)  # a plan has resolved it
        kept = _kept(len(sites), spec.keep_softmax)
        plan = SwapPlan(str(block["base_model_type"]), sites, (), spec, swapped[-1] + 1)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path / 'config.json'} is damaged: its swapattn block: {reason}") from error
    state, per_token = plan.state_bytes(), plan.kv_bytes_per_token()
    return {
        "base_model_type": plan.base_model_type,
        "attention_layers": len(sites) + len(kept),
        "swapped_layers": len(swapped),
        "swapped": swapped,
        "kept": kept,
        "heads": sorted({site.heads for site in sites}),
        "kv_heads": sorted({site.kv_heads for site in sites}),
        "head_dim": sorted({site.head_dim for site in sites}),
        "spec": spec.model_dump(mode="json"),
        **_parameters(path),
        "state_bytes": state,
        "kv_bytes_per_token": per_token,
        "lengths": [{"length": n, "state_bytes": state, "kv_bytes": n * per_token} for n in LENGTHS],
    }


def _kept(swapped: int, positions: Sequence[int]) -> list[int]:
    """The kept positions among the attention layers, of which a checkpoint records only the swapped ones."""
    for count in range(swapped, swapped + len(positions) + 1):
        kept = {index % count for index in positions}
        if len(kept) + swapped == count:
            return sorted(kept)
    raise ValueError("keep_softmax does not fit the layers")


def _parameters(path: Path) -> dict[str, int | None]:
    """Numbers in the new and in the teacher's own parameters, from the headers of the weights."""
    from ..shards import count_parameters, read_weight_map

    try:
        weight_map = read_weight_map(path)
        new = count_parameters(path, (file for name, file in weight_map.items() if ".swap." in name))
        return {"new_parameters": new, "kept_parameters": count_parameters(path, weight_map.values()) - new}
    except (SwapattnError, OSError, ValueError, KeyError):  # a folder copied without its weights is still a report
        return {"new_parameters": None, "kept_parameters": None}


def _provenance(path: Path, record: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    record, evaluation = record or {}, evaluation or {}
    recipe = record.get("recipe")
    return {
        "teacher": record.get("teacher") or ({"path": evaluation["teacher"]} if evaluation.get("teacher") else None),
        "note": (record.get("teacher") or {}).get("note") or evaluation.get("note") or "",
        "parent": record.get("parent"),
        "time": record.get("time"),
        "seed": ((recipe or {}).get("distill") or {}).get("seed"),
        "text": record.get("text"),
        "calibrated": record.get("calibrated"),
        "hardware": record.get("hardware"),
        "versions": record.get("versions"),
        "recipe_name": (recipe or {}).get("name"),
        "recipe_summary": (recipe or {}).get("summary"),
        "recipe_file": _recipe_argument(path, recipe) if recipe else None,
        "recipe_yaml": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
    }


def _commands(path: Path, record: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> list[str]:
    """What makes the folder again, from the recorded teacher on."""
    commands = _made_by(path, record) if record is not None else []
    if evaluation is not None:
        commands += [file["command"] for file in evaluation["files"]]
    return commands


def _made_by(path: Path, record: Mapping[str, Any]) -> list[str]:
    recipe = shlex.quote(_recipe_argument(path, record["recipe"]))
    distilled = record["kind"] == "distilled"
    known = record.get("parent") or {}
    parent = known.get("path")
    start = shlex.quote(Path(parent).name if distilled and parent else path.name)
    given = shlex.quote(str(record["teacher"].get("given") or record["teacher"].get("path")))
    calibrate = " --calibrate" if record.get("calibrated") else ""
    commands = [f"swapattn convert {given} --recipe {recipe}{calibrate} -o {start}"]
    if distilled and parent:
        with contextlib.suppress(SwapattnError):  # gone, or damaged
            before = read(Path(parent))
            if before.kind == "distilled" and before.time == known.get("time"):
                commands = _made_by(before.path, before.record)
    if distilled:
        teacher = (record.get("taught_by") or {}).get("path")
        other = f" --teacher {shlex.quote(teacher)}" if teacher else ""
        commands.append(f"swapattn distill {start} --recipe {recipe}{other} -o {shlex.quote(path.name)}")
    return commands


def _recipe_argument(path: Path, recipe: Mapping[str, Any]) -> str:
    """The recipe's name if a recipe of that name says the same today, else the file to save the shown YAML as."""
    name = str(recipe.get("name"))
    if name in recipe_names() and load_recipe(name).to_dict() == restated(dict(recipe)):
        return name
    return f"{path.resolve().name}.yaml"


def _eval_command(path: Path, evaluation: Mapping[str, Any]) -> str:
    """What writes the file again: the recorded line does not say where to."""
    folder = evaluation.get("checkpoint") or path.parent.name
    output = "" if path.name == REPORT else f" -o {shlex.quote(f'{folder}/{path.name}')}"
    if isinstance(evaluation.get("command"), str):
        return f"{evaluation['command']}{output}"
    students = [row["student"] for row in evaluation["rows"]]
    words = ["swapattn", "eval", path.parent.name]
    if students:
        words += ["--tasks", ",".join(student["task"] for student in students)]
        shots = students[0].get("num_fewshot")
        words += ["--num-fewshot", str(shots)] if shots else []
    if evaluation.get("limit"):
        words += ["--limit", str(evaluation["limit"])]
    if evaluation.get("perplexity"):
        words.append("--perplexity")
    return shlex.join(words) + output


def _missing(path: Path, entry: Mapping[str, Any], record: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """What the folder lacks, and the command that makes it."""
    name = start = shlex.quote(str(path))
    recipe = str(record["recipe"].get("name")) if record else "short"
    named = load_recipe(recipe).to_dict() if recipe in recipe_names() else {"distill": None}
    # What was set at the conversion stays: see `preparation`.
    if record and named["distill"] != record["recipe"]["distill"]:
        recipe = shlex.quote(_recipe_argument(path, record["recipe"]))
    if record and record["kind"] == "distilled" and record.get("parent"):
        start = shlex.quote(str(record["parent"]["path"]))
    evaluation = entry["eval"] or {}
    again = evaluation["files"][0]["command"] if evaluation else f"swapattn eval {name}"
    # What is added lies beside eval.json, which stays as it is.
    beside = {part: shlex.quote(str(path / OTHERS.replace("*", part))) for part in ("probes", "branches", "cost")}
    window = ((entry["plan"] or {}).get("spec") or {}).get("local")
    parts = [
        ("record", record is None, f"{RECORD} (provenance)", "swapattn convert MODEL"),
        ("plan", entry["plan"] is None, "conversion plan (config.json)", "swapattn convert MODEL"),
        (
            "training",
            not (entry["training"] or {}).get("curves"),
            f"loss curves ({LOG})",
            f"swapattn distill {start} --recipe {recipe}",
        ),
        ("eval", entry["eval"] is None, f"evaluation ({REPORT})", f"swapattn eval {name} --tasks hellaswag,piqa"),
        (
            "probes",
            not evaluation.get("probes"),
            "probes",
            f"swapattn eval {name} --tasks none --probes -o {beside['probes']}",
        ),
        (
            "baselines",
            window and not evaluation.get("baselines"),
            "branches and baselines",
            f"{again} --branches -o {beside['branches']}",
        ),
        (
            "cost",
            not evaluation.get("cost"),
            "measured speed and memory",
            f"swapattn eval {name} --tasks none --cost -o {beside['cost']}",
        ),
    ]
    return [{"part": part, "what": what, "command": command} for part, absent, what, command in parts if absent]
