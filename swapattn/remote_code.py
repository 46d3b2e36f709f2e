"""Python code that comes with a model: imported only after somebody allowed it, known by its content.

Allowing it once (`--trust-remote-code`) leaves its digest in the user's cache folder, so that later commands on the
same files, and on checkpoints that carry them along, need not be told again; a changed file asks anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .environment import say
from .errors import UnsupportedModelError
from .modeling import register_base
from .wheels import cache_dir

_IMPORTED: dict[str, str] = {}  # model type -> digest of the code that defines it in this process


@dataclass(frozen=True)
class OwnCode:
    """The files of a model folder that define its type.

    Attributes:
        model_type: the type, of a converted checkpoint that of its base.
        model: the causal LM, as "file.Class"; its `config_class` is the config.
        files: all that are needed, with what they import from each other.
    """

    folder: Path
    model_type: str
    model: str
    files: tuple[Path, ...]

    def digest(self) -> str:
        """sha256 over the names and contents of the files."""
        found = hashlib.sha256()
        for path in self.files:
            found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
        return found.hexdigest()


def own_code(folder: Path) -> OwnCode | None:
    """The code that a model or a converted checkpoint needs beside transformers and swapattn, or None.

    A type that transformers knows itself needs none, whatever the folder brings along.

    Raises:
        UnsupportedModelError: it lacks a causal LM or a file, or lies in another repository.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = config.get("swapattn")
    model_type = str(block["base_model_type"] if block else config.get("model_type"))
    classes = {"AutoModelForCausalLM": block.get("code")} if block else config.get("auto_map", {})
    if not any(classes.values()) or (model_type in CONFIG_MAPPING and model_type not in _IMPORTED):
        return None
    model = classes.get("AutoModelForCausalLM")
    if model is None:
        raise _unusable(folder, model_type, "defines no causal LM (no AutoModelForCausalLM in its auto_map)")
    if not isinstance(model, str) or "." not in model:
        raise _unusable(folder, model_type, f"is not named as file.Class in its auto_map, but {model!r}")
    if "--" in model:
        raise _unusable(folder, model_type, "lies in another repository; download it into the model's folder")
    entry = folder / f"{model.rpartition('.')[0]}.py"
    try:
        files = {entry, *map(Path, get_relative_import_files(entry))}
    except FileNotFoundError as error:
        raise _unusable(folder, model_type, f"is not all there: {Path(error.filename).name} is missing") from error
    return OwnCode(folder, model_type, model, tuple(sorted(files)))


def use_own_code(folder: Path, *, trust: bool = False) -> None:
    """Import the code that a folder brings along and make its model type known to transformers; where there is any.

    Args:
        folder: a model or a converted checkpoint, with a config.json.
        trust: allow it from now on.

    Raises:
        UnsupportedModelError: nobody allowed it, it is no causal LM, or does not import.
    """
    code = own_code(folder)
    if code is None:
        return
    digest = code.digest()
    if _IMPORTED.get(code.model_type) == digest:
        return
    if code.model_type in _IMPORTED:
        raise _unusable(folder, code.model_type, "differs from that of a model of the same type in this process")
    mark = cache_dir() / "trusted-code" / digest
    names = ", ".join(path.name for path in code.files)
    if not trust and not mark.is_file():
        raise UnsupportedModelError(
            f"{folder}: model type {code.model_type!r} comes with code of its own ({names}), which is not run unasked: "
            "read it, and repeat the command with --trust-remote-code (convert, inspect, verify); once is enough"
        )
    try:
        register_base(code.model_type, get_class_from_dynamic_module(code.model, str(folder), local_files_only=True))
    except Exception as error:  # whatever a stranger's file raises, or transformers of classes that do not fit
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise _unusable(folder, code.model_type, f"cannot be used ({reason})") from error
    _IMPORTED[code.model_type] = digest
    if not mark.is_file():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{folder.resolve()}\n{names}\n", encoding="utf-8")
        say(f"from now on this code may run: {names} of {folder}")


def _unusable(folder: Path, model_type: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{folder}: the code of model type {model_type!r} {why}")
