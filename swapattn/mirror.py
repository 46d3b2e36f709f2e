"""A folder of data files: what tells it from every other, and what is wrong where it could not be read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def state(folder: Path) -> str:
    """Changes with the place of a folder and with the name, size and time of every file in it."""
    found = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names):
        if path.is_file():
            found.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return found.hexdigest()[:32]


def broken_file(folder: Path) -> str | None:
    """One line on the first file under `folder` that cannot be read, with its path and line; None: all can be."""
    for path in sorted(folder.rglob("*")):
        check = next((check for ending, check in _CHECKS.items() if path.name.endswith(ending)), None)
        if check is None or not path.is_file():
            continue
        found = check(path)
        if found is not None:
            return found
    return None


def _json_lines(path: Path) -> str | None:
    number = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip() and not isinstance(json.loads(line.decode()), dict):
                return f"{path} line {number}: no JSON object"
    except UnicodeDecodeError as error:
        return f"{path} line {number}: not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        return f"{path} line {number}: {error.msg} at column {error.colno}"
    except (OSError, EOFError) as error:
        return f"{path} after line {number}: {error}"
    return f"{path} is empty" if number == 0 else None


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _json_document(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return _json_lines(path) if error.msg == "Extra data" else f"{path} line {error.lineno}: {error.msg}"
    except ValueError as error:
        return f"{path}: not UTF-8 ({error})"
    return None


def _parquet(path: Path) -> str | None:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        return f"{path}: {' '.join(str(error).split())[:200]}"
    return None


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_document,
    ".parquet": _parquet,
}
