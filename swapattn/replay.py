"""A micro-batch's loss and gradients as one CUDA graph: recorded once, replayed with a single launch.

Up to some hundred million parameters the host needs longer to launch the thousands of kernels of a step than a GPU to
run them. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import masking_utils

from .environment import say

WARM_UP = 3  # calls before the recording, in which kernels are compiled and tuned
_TOLERANCE = 0.05  # relative, of a replay's loss and of each gradient's norm to those of the last of these calls

Inputs = Mapping[str, torch.Tensor]
Work = Callable[[Inputs], torch.Tensor]


class Replay:
    """Calls `work` by a recording of its kernels.

    What cannot be recorded (a host that waits for the device, shapes that depend on values) is called as it is, with
    the reason on stderr. So is what a replay does not repeat: loss and gradients are compared before anything is
    trained.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter]) -> None:
        """Prepare for micro-batches of one shape; the first one is recorded.

        Args:
            work: runs forward and backward pass on the inputs and returns the loss; adds to `.grad`. It must do the
                same at every call, whatever the values of the inputs.
            parameters: all that it may give a gradient to.

        `ready` is the time (`time.monotonic`) from which on micro-batches take what they take.
        """
        self.work, self.parameters = work, list(parameters)
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}
        self.recorded: tuple[Callable[[], object], torch.Tensor] | None = None
        self.ready: float | None = None

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """The loss. Gradients are added to `.grad`, where there is one."""
        if self.ready is None:
            self._record(inputs)
            self.ready = time.monotonic()  # the device has nothing left to do
        if self.recorded is None or any(inputs[name].shape != held.shape for name, held in self.inputs.items()):
            return self.work(inputs)
        replay, loss = self.recorded
        for name, held in self.inputs.items():
            held.copy_(inputs[name], non_blocking=True)
        self._hand_out()
        replay()
        return loss.clone()

    def release(self) -> None:
        """Give the memory of the recording back; Trainer and callbacks hold each other and so would it."""
        self.recorded, self.gradients, self.inputs = None, {}, {}

    def _hand_out(self) -> None:
        """Let `.grad` be what the recording adds to, from 0 on where there was none."""
        fresh = [gradient for parameter, gradient in self.gradients.items() if parameter.grad is not gradient]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, inputs: Inputs) -> None:
        """Warm up, record, and compare; no gradient is there before or afterwards."""
        self.inputs = {name: given.clone() for name, given in inputs.items()}
        with beside():
            for _ in range(WARM_UP):
                self._forget()
                expected = self.work(self.inputs)
            found = {p: p.grad for p in self.parameters if p.grad is not None}
            before = _figures(expected, list(found.values()))
            self.gradients = {parameter: torch.zeros_like(gradient) for parameter, gradient in found.items()}
            del found, expected
        self._hand_out()
        try:
            with _nothing_packed():
                self.recorded = record(partial(self.work, self.inputs))
            torch._foreach_zero_(list(self.gradients.values()))
            self.recorded[0]()
            after = _figures(self.recorded[1], list(self.gradients.values()))
            least = 1e-5 * float(before[1:].norm())
            wrong = ~torch.isclose(before, after, rtol=_TOLERANCE, atol=least)
            if before.isfinite().all() and wrong.any():  # what is not finite stops the stage, with a message of its own
                pairs = f"{before[wrong][0]:.4g} is {after[wrong][0]:.4g}"
                raise RuntimeError(f"loss or gradients differ when replayed: {pairs}, and {int(wrong.sum()) - 1} more")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the calls before have shown that the work itself can be done
            say(f"the step cannot be recorded as a CUDA graph ({_first(error)}): its kernels are launched one by one")
            self.recorded, self.gradients = None, {}
            clean_up()
        self._forget()


def record(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """Record the kernels of a call: what runs them again, and what the call returned, to be overwritten each time."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # "global" would not stand the thread of the data loader, which pins memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch.cuda.set_stream(current)  # torch stays on the recorded stream where the recording cannot be ended
    return graph.replay, result


def clean_up() -> None:
    """After a recording that broke off: the random numbers of the device take it for going on until one has ended."""
    torch.cuda.synchronize()
    record(lambda: torch.zeros(1, device="cuda"))


@contextmanager
def beside() -> Iterator[None]:
    """A stream beside the current one: what a recording will need is not to be bound to the stream of all else."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """Let transformers make the masks that it makes without a recording.

    It takes a stream that is recorded for tracing, where it does not look whether sequences are packed but makes every
    mask whole, at a cost quadratic in the length. Here they never are.
    """
    names = {"is_tracing": lambda *_, **__: False, "find_packed_sequence_indices": lambda *_, **__: None}
    own = {name: getattr(masking_utils, name) for name in names}
    for name, other in names.items():
        setattr(masking_utils, name, other)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(masking_utils, name, function)


def _first(error: BaseException) -> str:
    """The first line of what went wrong first: the end of a recording that broke off is an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _figures(loss: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The loss and the norm of each gradient."""
    return torch.stack([loss.float(), *(norm.float() for norm in torch._foreach_norm(gradients))])
