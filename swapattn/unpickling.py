"""A model folder of pickled weights, written anew as safetensors; only when it was asked for.

torch.load with `weights_only=True` builds tensors and plain containers only, so that no code of the file runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from .environment import say
from .errors import SourceError
from .sources import SOURCE_FILE
from .wheels import cache_dir, new_folder

_INDEX = "pytorch_model.bin.index.json"


def as_safetensors(model: str) -> str:
    """The folder to convert: the given one, or a copy of it in the cache if it holds pickled weights only.

    Args:
        model: a model argument; anything but a folder with pytorch_model*.bin and no safetensors is given back.

    Raises:
        SourceError: a file is damaged, or holds more than tensors.
    """
    folder = Path(model).expanduser()
    files = sorted(folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if not files or any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return model
    if (folder / _INDEX).is_file() and not (folder / "pytorch_model.bin").is_file():  # which transformers prefers
        wanted = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(wanted - {file.name for file in files}):
            raise SourceError(f"{model} lacks {len(missing)} of its {len(wanted)} weight files: {missing[0]}")
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for file in (folder / "config.json", *sorted(folder.glob("*.py")), *files):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    target = cache_dir() / "teachers" / f"pickle-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        say(f"reading {len(files)} pickled files without running their code, once, into {target}")
        with new_folder(target) as unfinished:
            _write(folder, files, unfinished)
    return str(target)


def _write(folder: Path, files: list[Path], target: Path) -> None:
    from .shards import INDEX, copy_companions

    for file in files:
        _rewrite(file, target / _renamed(file.name))
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {key: _renamed(name) for key, name in index["weight_map"].items()}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in (folder / "config.json", *folder.glob("*.py")):  # whether the code may run is asked elsewhere
        shutil.copyfile(path, target / path.name)
    copy_companions(folder, target)
    origin = {"name": folder.resolve().name.lower(), "note": "unpickled", "from": str(folder.resolve())}
    (target / SOURCE_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _rewrite(file: Path, target: Path) -> None:
    import torch

    from .shards import write_shard

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise SourceError(f"{file} cannot be read as plain tensors: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise SourceError(f"{file} holds more than tensors by name")
    # cloned, because tied tensors share memory, which safetensors does not write
    write_shard({name: value.clone().contiguous() for name, value in tensors.items()}, target)
