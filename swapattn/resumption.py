"""What is left of a distillation that did not end, and whether it may be gone on with.

Finished stages and Trainer checkpoints lie in a folder beside the target, `.NAME.run`. Of the stages only those that
are done have to be the same; how a stage is carried out may change at any time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from .checkpoint import LOG, Checkpoint, write_json
from .data import sizes
from .environment import say
from .errors import UsageError
from .exclusive import empty, hold
from .logits import read_manifest
from .progress import cut_log
from .recipe import Recipe, restated
from .stages import text_of, written_logits

STATE = "run.json"
# Of a stage: how it is carried out, which changes no result.
_EXECUTION = ("micro_batch", "chunk", "compile", "cuda_graph", "gradient_checkpointing")


def new_state(recipe: Recipe, start: Checkpoint, teacher: Path) -> dict[str, Any]:
    """The state of a run that has done nothing: what it is known by, what it will do, and the stages that are done."""
    identity = {
        "convert": recipe.convert.model_dump(mode="json"),
        "seed": recipe.distill.seed,
        "parent": str(start.path.resolve()),
        "parent_time": start.time,
        "teacher": str(teacher.resolve()),
    }
    planned = []
    for stage in recipe.distill.stages:
        values = {key: value for key, value in stage.model_dump(mode="json").items() if key not in _EXECUTION}
        written, text = written_logits(stage), text_of(stage, recipe.distill.text)
        if written is not None:
            manifest = read_manifest(Path(written.logits))
            values["logits"] = {key: value for key, value in manifest.items() if key != "versions"}
        else:
            values["text"] = [[spec.model_dump(mode="json"), share, sizes(spec)] for spec, share in text.parts]
        planned.append(values)
    state: dict[str, Any] = json.loads(json.dumps({"identity": identity, "planned": planned, "stages": []}))
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep the state of a run."""
    write_json(folder / STATE, state)


def enter(
    folder: Path, state: dict[str, Any], titles: Sequence[str], *, overwrite: bool
) -> tuple[dict[str, Any], IO[str]]:
    """Take a run's folder: go on with what lies there, or begin.

    Args:
        folder: of the unfinished run.
        state: a new one.
        titles: of the stages, for messages.
        overwrite: drop what does not fit: the whole, or the stage that has begun with other settings.

    Returns:
        The state to go on from, and a file that keeps other processes out until it is closed.

    Raises:
        UsageError: another process is at work there, or something lies there that does not fit.
    """
    held = hold(folder)
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        found["identity"] |= {
            "convert": restated({"name": "stored", "convert": found["identity"]["convert"]})["convert"]
        }
    done, planned = found.get("stages", []), found.get("planned", [])
    count = len(done)
    if found.get("identity") == state["identity"] and planned[:count] == state["planned"][:count]:
        begun = folder / f"stage-{count}"
        same = planned[count : count + 1] == state["planned"][count : count + 1]
        if not same and any(begun.glob("checkpoint-*")):
            if count == len(titles):
                say(f"what {folder} holds of a stage that had begun and is left out now is dropped")
            elif not overwrite:
                raise UsageError(
                    f"{titles[count]} has begun with other settings or another text in {folder}: repeat its command "
                    f"to go on, or use --overwrite to begin this stage anew (the {count} before it are kept)"
                )
            else:
                say(f"{titles[count]} begins anew")
            shutil.rmtree(begun)
        if not same:
            cut_log(folder / LOG, begun.name, 0)  # of steps that no stage has taken
        say(f"resuming {folder}: {count} stages done")
        state = {**state, "stages": done}
    elif not overwrite and (done or any(folder.glob("stage-*/checkpoint-*"))):
        raise UsageError(
            f"an unfinished run of another recipe, parent, teacher or text lies in {folder}: repeat its command to "
            "finish it, or use --overwrite to drop it, or another folder with -o"
        )
    else:
        empty(folder)
    write_state(folder, state)
    return state, held
