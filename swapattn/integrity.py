"""Whether a model folder is whole, without reading its weights: every damaged file named, in one line.

What the format of safetensors says about itself is checked (header, sizes, offsets); a flipped bit of a weight is
found by comparing with the teacher, and one of the teacher by the sha256 that the hub's cache names its files by; both
in `verify`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .modeling import write_runtime
from .wheels import sha256_of

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "F8_E8M0": 1}
LONGEST_HEADER = 100_000_000  # bytes, as the format says
SAMPLE_BYTES = 4096  # of a tensor
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_shards(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Check every file of an index.

    Raises:
        CheckpointError: names each that is missing, cut short, damaged in its header, or lacks a tensor of the index.
    """
    found = damaged_shards(folder, weight_map)
    if found:
        raise CheckpointError(f"{folder}: " + "; ".join(found))


def damaged_shards(folder: Path, weight_map: Mapping[str, str]) -> list[str]:
    """What is wrong with each shard, one short clause a file; empty if all are whole."""
    wanted: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        wanted.setdefault(name, set()).add(tensor)
    problems = []
    for name in sorted(wanted):
        inside = Path(name).name == name  # never read, and never write over, what lies elsewhere
        problem = _damage(folder / name, wanted[name]) if inside else "lies outside the folder"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def _damage(path: Path, tensors: Iterable[str]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LONGEST_HEADER:
            return "is damaged: its first 8 bytes are no header length"
        text = file.read(length)
    if len(text) < length:
        return f"is cut short: {size} bytes, less than its header of {length}"
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted(_span(name, entry) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged: its header is no valid one ({' '.join(str(error).split())[:80]})"
    end = 0
    for start, stop in spans:
        if start != end:
            return f"is damaged: its header leaves a gap or overlap at byte {end}"
        end = stop
    if size < 8 + length + end:
        return f"is cut short: {size} of {8 + length + end} bytes"
    if size > 8 + length + end:
        return f"is damaged: {size - 8 - length - end} bytes more than its header says"
    missing = sorted(set(tensors) - set(header))
    return f"lacks {len(missing)} tensors of the index, first {missing[0]}" if missing else None


def altered_files(folder: Path) -> list[str]:
    """Weight files whose content is not what they are named by, a clause each; the hub's cache names by sha256."""
    problems = []
    for path in sorted(folder.glob("*.safetensors")):
        name = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", name) and sha256_of(path) != name:
            problems.append(f"{path.name} of the teacher is altered: its sha256 is not that of the hub's file")
    return problems


def samples(folder: Path, but: str) -> dict[str, str]:
    """A digest of each weight file of a folder `but` one: of its header and of the first bytes of every tensor.

    Milliseconds for any model, and enough to tell a file that was written over. Shards of a checkpoint are hard links
    to the teacher's: who writes over those changes the checkpoint.
    """
    return {path.name: _sample(path) for path in sorted(folder.glob("*.safetensors")) if path.name != but}


def rewritten(folder: Path, known: Mapping[str, str]) -> list[str]:
    """The files of a folder that are not those that `samples` gave as `known`."""
    return [name for name, digest in known.items() if (folder / name).is_file() and _sample(folder / name) != digest]


def _sample(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"{path.name} has no header")
        text = file.read(length)
        found = hashlib.sha256(text)
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                file.seek(8 + length + start)
                found.update(file.read(min(stop - start, SAMPLE_BYTES)))
    return found.hexdigest()


def _span(name: str, entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    if stop - start != math.prod(entry["shape"]) * _BYTES[entry["dtype"]]:
        raise ValueError(f"the size of {name}")
    return int(start), int(stop)


def pickled_files(folder: Path) -> list[str]:
    """Names of files that hold pickled objects."""
    return sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))


def foreign_code(folder: Path, base_model_type: str) -> list[str]:
    """Python files of a checkpoint that differ from those that this swapattn writes, or that it would not write.

    With them its config.json, where that names other classes than those of our files: a path or a repository.
    """
    with tempfile.TemporaryDirectory(prefix="swapattn-") as name:
        own = Path(name)
        auto_map = write_runtime(own, base_model_type)
        ours = {path.relative_to(own): path.read_bytes() for path in own.rglob("*.py")}
    theirs = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}
    different = [path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)]
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    return [*(["config.json"] if named != auto_map else []), *sorted(map(str, different))]
