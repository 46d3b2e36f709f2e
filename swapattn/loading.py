"""Read models from disk: converted checkpoints and their teachers, with every tensor accounted for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from .attention import swaps
from .checkpoint import RECORD
from .environment import say
from .errors import CheckpointError
from .integrity import rewritten
from .modeling import swap_classes
from .remote_code import use_own_code
from .sources import check_alone

TOKENIZER = "tokenizer_config.json"
_TOKENIZERS = (TOKENIZER, "tokenizer.json")
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")  # whose class is guessed


def load(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Load a converted or distilled checkpoint.

    Args:
        path: folder written by `swapattn convert` or `swapattn distill`.
        device: where to put the model, default CPU.
        dtype: of the model, default as stored; the parameters of the swapped layers stay fp32.

    Returns:
        (model in eval mode, tokenizer or None, see `tokenizer_in`).

    Raises:
        CheckpointError: no swapattn checkpoint, or a tensor is missing, unexpected or of another shape.
        UnsupportedModelError: its base type comes with code that nobody allowed to run.
    """
    path = Path(path)
    try:
        block = json.loads((path / "config.json").read_text(encoding="utf-8")).get("swapattn")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable config.json ({error.__class__.__name__})") from error
    if block is None:
        raise CheckpointError(f"{path} is not a swapattn checkpoint: convert it first with `swapattn convert {path}`")
    for name in _rewritten(path):
        say(
            f"{path / name} is not what the checkpoint was made with: somebody wrote over it, or over the teacher's, "
            "which is the same file; convert the original again"
        )
    use_own_code(path)
    _, model_class = swap_classes(block["base_model_type"])
    model = from_folder(model_class, path, dtype)
    model = model.to(device) if device is not None else model
    return model.eval(), tokenizer_in(path)


def _rewritten(path: Path) -> list[str]:
    """Weight files that were written over; what is damaged shows as it loads."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return rewritten(path, record.get("weights", {}))
    return []


def load_teacher(
    checkpoint: Any, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Load the original model of a checkpoint: (model in eval mode, tokenizer or None).

    Args:
        checkpoint: a `swapattn.checkpoint.Checkpoint`, or the teacher's own folder.
        device: where to put the model, default CPU.
        dtype: default as stored.

    Raises:
        CheckpointError: the teacher is not where it was, or is damaged.
    """
    path = Path(getattr(checkpoint, "teacher_path", checkpoint))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no teacher at {path}: it was moved or never there; put it back")
    check_alone(str(path), path)
    use_own_code(path)
    model = from_folder(AutoModelForCausalLM, path, dtype)
    model = model.to(device) if device is not None else model
    return model.eval(), tokenizer_in(path)


def know(folder: Path) -> None:
    """Make the model type of a folder known to transformers: by its own code, and as one of ours if it is converted.

    Without that transformers asks whether to trust the code in the folder, or does not know the type.

    Raises:
        UnsupportedModelError: the type comes with code that nobody allowed to run.
    """
    use_own_code(folder)
    block = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("swapattn")
    if block is not None:
        swap_classes(block["base_model_type"])


def tokenizer_in(folder: Path) -> Any | None:
    """The tokenizer of a folder whose model type is known; None if it has none, or one that is code of its own."""
    named = any((folder / name).is_file() for name in _TOKENIZERS)
    if not named and not any((folder / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # without it transformers asks on stdin
    except Exception as error:  # the classes that transformers tries raise what they like, such as ImportError
        if "trust_remote_code" not in str(error):
            if named:
                raise
            say(f"{folder}: its tokenizer does not load: {' '.join(str(error).split())[:200]}")
            return None
    say(f"{folder}: its tokenizer is Python code of its own, which is not run: going on without a tokenizer")
    return None


def check_tensors(folder: Path) -> None:
    """The files of a model hold its tensors, no more and no fewer, each of its shape; no value is read.

    Raises:
        CheckpointError: one does not fit, or the model needs a package that is not here.
    """
    from_folder(AutoModelForCausalLM, folder, None, device_map="meta")


def from_folder(model_class: Any, path: Path, dtype: torch.dtype | None, *, device_map: str | None = None) -> Any:
    """`from_pretrained` that treats every missing, unexpected or mismatched tensor as an error."""
    disable_progress_bar()  # a bar per load, on loads of a second
    try:
        model, info = model_class.from_pretrained(
            path,
            dtype=dtype or "auto",
            device_map=device_map,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # an error below, which names the tensor
        )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises what it likes
        if "conversion of the weights" in str(error):  # transformers' message only points to a report on the terminal
            raise CheckpointError(
                f"{path}: tensors that are stacked on loading, as those of experts, do not fit together: "
                "one is missing, unexpected or of another shape"
            ) from error
        raise CheckpointError(f"{path} does not load: {' '.join(str(error).split())[:300]}") from error
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not _computed(model, key)]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            raise CheckpointError(f"{path}: {len(found)} {kind.replace('_', ' ')}, first {found[0]}")
    for swap in swaps(model).values():
        # Mapped from a file they lie at any address, where a CPU's products round otherwise.
        for parameter in swap.parameters():
            parameter.data = parameter.data.clone()
    return model


def _computed(model: Any, key: str) -> bool:
    """Whether older versions of transformers stored what later ones compute, such as the masks of gpt_neo."""
    buffers = {name for name, _ in model.named_buffers()}
    return bool(buffers & {key, f"{model.base_model_prefix}.{key}"}) or key.endswith(".masked_bias")
