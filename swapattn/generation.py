"""Text from a model as it is made, with what it cost: tokens per second and the bytes of its state."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import CACHE
from .cost import state_bytes
from .environment import default_device
from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What one answer cost.

    Attributes:
        prompt_tokens: tokens of the prompt, with the chat template.
        tokens: new tokens, with the one that ended the text.
        seconds: wall time from the start of the prefill to the last token.
        prefill_seconds: wall time to the first new token.
        tokens_per_second: new tokens after the first per second after the prefill; 0 when there was only one.
        state_bytes: bytes of all tensors in the cache at the end.
    """

    prompt_tokens: int
    tokens: int
    seconds: float
    prefill_seconds: float
    tokens_per_second: float
    state_bytes: int

    def to_dict(self) -> dict[str, int | float]:
        """All figures by name."""
        return dataclasses.asdict(self)

    def to_line(self) -> str:
        """One line for a terminal."""
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s after a prefill of "
            f"{self.prompt_tokens} tokens in {self.prefill_seconds:.2f} s, state {self.state_bytes:,} bytes"
        )


class Generation:
    """One answer: iterate over it for pieces of text; `stats` is there when the iteration has ended."""

    def __init__(self, pieces: Iterable[str], clock: _Clock) -> None:
        self._pieces = pieces
        self._clock = clock
        self._stats: GenerationStats | None = None

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces
        self._stats = self._clock.stats()

    @property
    def stats(self) -> GenerationStats:
        """What it cost.

        Raises:
            RuntimeError: the text has not been read to its end.
        """
        if self._stats is None:
            raise RuntimeError("the statistics of a generation exist when its text has been read to the end")
        return self._stats


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> Generation:
    """Answer `prompt` with `model.generate`, piece by piece.

    Args:
        model: a transformers causal LM, converted or not.
        tokenizer: its tokenizer.
        prompt: the user's message when the tokenizer has a chat template, else text to go on from.
        max_new_tokens: when to stop at the latest.
        temperature: 0 takes the most likely token, above 0 samples.
        seed: of the sampling.
        raw: go on from the prompt as it stands although there is a chat template.

    Raises:
        UsageError: the prompt has no tokens, or a number is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError("max_new_tokens must be at least 1 and temperature at least 0")
    inputs = _encode(tokenizer, prompt, raw).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        torch.manual_seed(seed)
    if tokenizer.eos_token_id is not None:
        padding = tokenizer.pad_token_id
        settings["pad_token_id"] = tokenizer.eos_token_id if padding is None else padding
    clock = _Clock(prompt_tokens=inputs["input_ids"].shape[1])
    return Generation(_run(model, tokenizer, inputs, settings, clock), clock)


def open_model(
    checkpoint: str | Path | None, *, teacher: bool = False, device: str | None = None
) -> tuple[Any, Any, str]:
    """Model, tokenizer and a name for `checkpoint` (None: the newest in the current directory) or for its teacher.

    The model is put on `device`, by default the first GPU, else the CPU.

    Raises:
        UsageError: there is no tokenizer beside the model, so that it cannot read a prompt.
        SwapattnError: no checkpoint there, a damaged one, or a teacher that cannot be had.
    """
    from .checkpoint import find
    from .loading import load, load_teacher

    found = find(Path.cwd(), None if checkpoint is None else str(checkpoint))
    place = device or default_device()
    if teacher:
        model, tokenizer = load_teacher(found, device=place)
    else:
        model, tokenizer = load(found.path, device=place)
    if tokenizer is None:
        raise UsageError(f"{found.path} has no tokenizer, which a prompt needs")
    return model, tokenizer, f"the teacher of {found.path}" if teacher else str(found.path)


class _Clock:
    """A streamer for `generate` that notes times and passes tokens on."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.times: list[float] = []  # [prompt handed over, first token, second token, ...]
        self.cache: Any = None

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def stats(self) -> GenerationStats:
        start, *tokens = self.times or [0.0]
        first, last = (tokens[0], tokens[-1]) if tokens else (start, start)
        return GenerationStats(
            prompt_tokens=self.prompt_tokens,
            tokens=len(tokens),
            seconds=last - start,
            prefill_seconds=first - start,
            tokens_per_second=(len(tokens) - 1) / (last - first) if last > first else 0.0,
            state_bytes=state_bytes(self.cache),
        )


class _TimedStreamer:
    """Hands tokens to a transformers text streamer and ticks the clock; the first call carries the prompt."""

    def __init__(self, inner: Any, clock: _Clock) -> None:
        self.inner = inner
        self.clock = clock

    def put(self, value: Tensor) -> None:
        self.clock.tick()
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()


def _encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _run(model: Any, tokenizer: Any, inputs: Any, settings: dict[str, Any], clock: _Clock) -> Iterator[str]:
    """Run `generate` in a thread and yield its text; an error in the thread is raised here."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            output = model.generate(
                **inputs,
                **settings,
                streamer=_TimedStreamer(pieces, clock),
                stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: _all(ids, stop.is_set())]),
                return_dict_in_generate=True,
            )
            clock.cache = output[CACHE]
        except BaseException as error:
            errors.append(error)
            pieces.end()  # else the reader waits forever

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for piece in pieces:
            if piece:
                yield piece
    finally:
        stop.set()  # the reader may have left early: Ctrl-C, a closed pipe
        thread.join()
    if errors:
        raise errors[0]


def _all(ids: Tensor, value: bool) -> Tensor:
    return torch.full((ids.shape[0],), value, dtype=torch.bool, device=ids.device)
