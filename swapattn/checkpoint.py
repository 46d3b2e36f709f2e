"""Checkpoint folders on disk: whole or not there, found by time, with a record of where they come from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from . import exclusive
from .environment import versions
from .errors import CheckpointError, UsageError
from .recipe import Recipe, parse_recipe

RECORD = "swapattn.json"
LOG = "train.jsonl"  # of a distillation, in its checkpoint
QUICKSTART = "quickstart.json"  # of a quickstart, in its folder
REPORT = "eval.json"  # of the last evaluation, in its checkpoint
RECORD_VERSION = 1
Kind = Literal["converted", "distilled"]


@dataclass(frozen=True)
class Checkpoint:
    """A complete folder written by swapattn, with its record."""

    path: Path
    record: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """ "converted" or "distilled"."""
        return "distilled" if self.record["kind"] == "distilled" else "converted"

    @property
    def name(self) -> str:
        """Short name of the teacher, e.g. `smollm2-135m`."""
        return str(self.record["name"])

    @property
    def time(self) -> str:
        """When it was written, ISO 8601 in UTC."""
        return str(self.record["time"])

    @property
    def teacher_path(self) -> Path:
        """Folder of the original model: where it was, or else as far from this checkpoint as it was."""
        teacher = self.record["teacher"]
        path = Path(teacher["path"])
        if "relative" in teacher and not path.exists():
            moved = Path(os.path.normpath(self.path.resolve() / teacher["relative"]))
            path = moved if (moved / "config.json").is_file() else path
        return path

    def with_teacher(self, folder: Path) -> Checkpoint:
        """The same with another folder in the place of the recorded one, which may have moved."""
        taught = {key: value for key, value in self.record["teacher"].items() if key != "relative"}
        taught["path"] = str(folder.resolve())
        return replace(self, record={**self.record, "teacher": taught})

    @property
    def teacher_note(self) -> str:
        """What a reader of any result must know about the teacher, such as "4-bit GGUF, dequantised"."""
        return str(self.record["teacher"].get("note", ""))

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that it was made with."""
        return parse_recipe(self.record["recipe"], label=f"of {self.path}")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UsageError: there is no such folder, or it is no swapattn checkpoint.
        CheckpointError: its record is damaged or of a newer version.
    """
    if not path.is_dir():
        raise UsageError(f"no checkpoint folder {path}")
    if not (path / RECORD).is_file():
        if (path / "config.json").is_file() and '"swapattn"' in (path / "config.json").read_text(encoding="utf-8"):
            raise UsageError(
                f"{path} was written by a converted model's save_pretrained, without {RECORD}: transformers and "
                "swapattn.load read it, this command needs the checkpoint itself"
            )
        raise UsageError(f"{path} is no swapattn checkpoint (it has no {RECORD}); make one with `swapattn convert`")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        wrong = [key for key in ("kind", "name", "time", "teacher", "recipe", "version") if key not in record]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / RECORD} is damaged: {error}") from error
    if wrong:
        raise CheckpointError(f"{path / RECORD} is damaged: no {', '.join(wrong)}")
    if record["version"] > RECORD_VERSION:
        raise CheckpointError(f"{path / RECORD} is of version {record['version']}: update swapattn")
    return Checkpoint(path, record)


def find(directory: str | Path = ".", model: str | Path | None = None, *, kind: Kind | None = None) -> Checkpoint:
    """The checkpoint that a command means: the named folder, or the newest in a directory by its record's time.

    Args:
        directory: where to look when no model is named.
        model: a checkpoint folder.
        kind: only checkpoints of this kind, when none is named.

    Raises:
        UsageError: there is none.
    """
    if model is not None:
        return read(Path(model))
    found = []
    for record in Path(directory).glob(f"*/{RECORD}"):
        if record.parent.name.startswith("."):
            continue
        with contextlib.suppress(CheckpointError):
            found.append(read(record.parent))
    found = [checkpoint for checkpoint in found if kind in (None, checkpoint.kind)]
    if not found:
        what = f"{kind} checkpoint" if kind else "checkpoint"
        raise UsageError(f"no {what} in {Path(directory).resolve()}: make one with `swapattn convert MODEL`")
    return max(found, key=lambda checkpoint: checkpoint.time)


def check_target(target: Path, *, overwrite: bool = False, marks: Collection[str] = (RECORD, QUICKSTART)) -> None:
    """Make sure that a folder can be written or replaced, before the work on what goes into it.

    Args:
        target: the folder.
        overwrite: it may exist.
        marks: files that tell a folder of ours.

    Raises:
        UsageError: it exists and `overwrite` is not set, it is no folder of ours or the current directory, or its
            place cannot be written.
    """
    place = target.resolve()
    if place == Path.cwd():
        raise UsageError(f"{target} is the current directory, which cannot be replaced: choose another folder")
    if place.exists() and not _is_ours(place, marks):
        raise UsageError(f"{target} exists and was not written by this command: choose another folder")
    if place.exists() and not overwrite:
        raise UsageError(f"{target} exists: use --overwrite, or another folder with -o")
    check_folder(place.parent)


def check_folder(folder: Path) -> None:
    """Make sure that files can be written in a folder, which is there or will be made.

    Raises:
        UsageError: a file is in its place, or the rights are missing.
    """
    place = folder.resolve()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is no folder: choose another place to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{there} cannot be written: choose another place to write to")


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes its name only when everything was written.

    Args:
        target: the final folder.
        overwrite: replace it if it exists; the old one stays until the new one is whole.

    Raises:
        UsageError: as `check_target`, or another process is writing the folder.
    """
    given, target = target, target.resolve()  # what a link leads to is replaced, not the link
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        old.rename(target)  # a process was killed between the two renames below
    check_target(given, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.writing"
    held = exclusive.hold(scratch)
    try:
        exclusive.empty(scratch)  # of a process that was killed
        yield scratch
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        scratch.rename(target)
        (target / exclusive.LOCK).unlink()  # held until nobody takes the folder for unfinished
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        held.close()
    shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path, marks: Collection[str]) -> bool:
    """Whether a folder is empty or holds one of the files that tell ours."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in marks)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def place_of(teacher: Path, checkpoint: Path) -> dict[str, str]:
    """Where a teacher is, for the record of a checkpoint: absolute, and as seen from there if there is a way."""
    found = {"path": str(teacher.resolve())}
    with contextlib.suppress(ValueError):  # two drives of Windows
        found["relative"] = os.path.relpath(teacher.resolve(), checkpoint.resolve())
    return found


def new_record(kind: Kind, name: str, recipe: Recipe, teacher: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A record for `swapattn.json` with versions and the present time."""
    return {
        "version": RECORD_VERSION,
        "kind": kind,
        "name": name,
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "teacher": dict(teacher),
        "recipe": recipe.to_dict(),
        "versions": versions(),
        **more,
    }
