"""TensorBoard and Weights & Biases, through the Trainer's own callbacks; neither is a dependency."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .errors import UsageError

TOOLS = ("tensorboard", "wandb")
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"  # the Trainer's callback reads it


@dataclass(frozen=True)
class Reporting:
    """Where figures of the steps go besides the JSONL log.

    Attributes:
        tools: of `TOOLS`.
        folder: event files of TensorBoard, unless TENSORBOARD_LOGGING_DIR says another; one folder a stage.
    """

    tools: Sequence[str] = ()
    folder: Path = Path("runs")

    def check(self) -> None:
        """Raise UsageError for a tool that is not known or not installed."""
        for tool in self.tools:
            if tool not in TOOLS:
                raise UsageError(f"cannot report to {tool!r}; there are: {', '.join(TOOLS)}")
            if find_spec(tool) is None:
                raise UsageError(f"{tool} is not installed: pip install {tool}, or leave out --report-to {tool}")

    def name(self, run: str) -> str:
        """The name that a stage's run has in W&B."""
        return f"{self.folder.name}-{run}"

    @contextlib.contextmanager
    def open(self, run: str) -> Iterator[None]:
        """One stage as a run of its own, since its steps begin at 1."""
        before = os.environ.get(_TENSORBOARD_FOLDER)
        os.environ[_TENSORBOARD_FOLDER] = str((Path(before) if before else self.folder) / run)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_TENSORBOARD_FOLDER]
            else:
                os.environ[_TENSORBOARD_FOLDER] = before
            if "wandb" in self.tools:
                import_module("wandb").finish()
