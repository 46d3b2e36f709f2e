"""The surroundings of a result: versions and hardware for its record, and the one way to talk (stderr)."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import __version__
from .errors import UsageError


def is_first_process() -> bool:
    """Whether this is the process of a distributed run that talks; torchrun and accelerate set its rank."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line of talk on stderr, from the first process only."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    found = {"swapattn": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "lm_eval", "datasets", "accelerate", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def umask() -> int:
    """The permissions that new files of this process do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """UsageError where a GPU is asked for and there is none, or the name is none."""
    import torch

    try:
        torch.device(device)
    except RuntimeError:
        raise UsageError(f"no device {device!r}: say cpu, cuda, or cuda:1 for the second GPU") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device}: PyTorch finds no GPU here; say --device cpu")


def hardware(device: str) -> str:
    """What a figure was measured on: the GPU's name, or machine and number of CPU threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
