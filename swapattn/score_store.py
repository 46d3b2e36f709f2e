"""What has been measured before, by a hash of everything that it depends on."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .environment import say

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BESIDE = (  # what tokenizes, the code that comes with a model, and what it must not say
    "*token*.json",
    "special_tokens_map.json",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
    "*.py",
)


class Store:
    """Records in a folder, one file each; a place that cannot be written is said once and then done without."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: made when the first record is put; None = remember nothing."""
        self.folder = folder
        self._used: set[str] = set()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key; None where there is none, or a damaged one."""
        if self.folder is None:
            return None
        try:
            with gzip.open(self._path(key), "rt", encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, EOFError, ValueError, zlib.error):
            return None
        if not isinstance(found, dict):
            return None
        self._used.add(key)
        return found

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record; a reader sees it whole or not at all."""
        if self.folder is None:
            return
        path = self._path(key)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(scratch, "wt", encoding="utf-8", compresslevel=5) as file:
                json.dump(record, file, ensure_ascii=False, default=str)
            os.replace(scratch, path)
            self._used.add(key)
        except OSError as error:
            say(f"results are not kept for a later run: {self.folder}: {error.strerror or error}")
            with contextlib.suppress(OSError):
                scratch.unlink()
            self.folder = None

    def clear(self) -> None:
        """Remove the records that were read or written here, and the folder if others have left none."""
        for key in self._used if self.folder is not None else ():
            self._path(key).unlink(missing_ok=True)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json.gz"


def key_of(parts: Mapping[str, Any]) -> str:
    """Hex digest of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one model folder from another without reading its weights.

    The configuration, tokenizer and code by content; the tensors by their headers, file sizes and times, or by the
    commit if the folder is a snapshot in the hub's cache.
    """
    found: dict[str, Any] = {"config": _digest(folder / "config.json")}
    beside = sorted({file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()})
    found["beside"] = {file.name: _digest(file) for file in beside}
    place = folder.resolve()
    if place.parent.name == "snapshots" and _COMMIT.fullmatch(place.name):
        return {**found, "commit": place.name}
    files = sorted(place.glob("*.safetensors"))
    return {**found, "tensors": {file.name: _tensor_file(file) for file in files}}


def _tensor_file(path: Path) -> list[Any]:
    with path.open("rb") as file:  # eight bytes of length, then the header (the format's own description)
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
    status = path.stat()
    return [hashlib.sha256(header).hexdigest(), status.st_size, status.st_mtime_ns]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
