"""SIGTERM: what a scheduler or a spot machine sends before it kills. Training saves first, all else stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from .errors import TrainingError


class Stop:
    """Whether the process has been asked to end; while `deferred`, somebody looks at `asked` and ends it in order."""

    def __init__(self) -> None:
        self.asked = False
        self.deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True  # launchers send more than one: the second must not break the save
        if not self.deferred:
            raise TrainingError("stopped by SIGTERM; repeat the command to go on from the last save")


STOP = Stop()


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Listen for SIGTERM while the context is open; outside the main thread, where Python cannot, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    STOP.asked = STOP.deferred = False
    before = signal.signal(signal.SIGTERM, STOP._handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferring() -> Iterator[Stop]:
    """Within, a signal only sets `asked`."""
    STOP.deferred = True
    try:
        yield STOP
    finally:
        STOP.deferred = False
