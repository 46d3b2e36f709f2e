"""SIGTERM, what a scheduler sends before it kills, and Ctrl-C: training saves first, all else stops at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from .environment import say
from .errors import TrainingError


class Stop:
    """Whether the process has been asked to end; while `deferred`, somebody looks at `asked` and ends it in order.

    `by` names who asked.
    """

    def __init__(self) -> None:
        self.asked = False
        self.deferred = False
        self.by = "SIGTERM"

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM."""
        self.asked = True  # launchers send more than one: the second must not break the save
        if not self.deferred:
            raise TrainingError("stopped by SIGTERM; repeat the command to go on from the last save")

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle Ctrl-C; the second one is for those who do not want to wait."""
        if self.asked or not self.deferred:
            raise KeyboardInterrupt
        self.asked, self.by = True, "Ctrl-C"
        if multiprocessing.parent_process() is None:  # not also from a process that reads the data
            say("\nsaving after this step; Ctrl-C again ends at once")


STOP = Stop()


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """Listen for both while the context is open; outside the main thread, where Python cannot, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    STOP.asked, STOP.deferred, STOP.by = False, False, "SIGTERM"
    handlers = {signal.SIGTERM: STOP.terminate}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell has it in the background
        handlers[signal.SIGINT] = STOP.interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferring() -> Iterator[Stop]:
    """Within, a signal only sets `asked`."""
    STOP.deferred = True
    try:
        yield STOP
    finally:
        STOP.deferred = False
