"""One process at a time in a folder that grows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from .errors import UsageError

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


def hold(folder: Path) -> IO[str]:
    """Make the folder; returns a file in it that keeps other processes out until it is closed.

    Raises:
        UsageError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / LOCK).open("w")
    try:
        if fcntl is not None:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise UsageError(f"another process is at work in {folder}: wait for it, or choose another with -o") from None
    except OSError:
        pass  # not every network file system has locks
    return held


def empty(folder: Path) -> None:
    """Remove everything in a folder that is held but the file that holds it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
