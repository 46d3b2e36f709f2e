"""Text from a model as it is made, with what it cost: tokens per second and the bytes of its state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, TextStreamer

from .cache import CACHE
from .cost import state_bytes
from .environment import check_device, default_device, say
from .errors import UsageError

_WARM_TOKENS = 3  # the prefill's, and two by the step: one that compiles it, one that shows what may change


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
        compile_seconds: wall time spent on compiling the step before all that; 0 where it was not asked for.
    """

    prompt_tokens: int
    tokens: int
    seconds: float
    prefill_seconds: float
    tokens_per_second: float
    state_bytes: int
    compile_seconds: float = 0.0

    def to_dict(self) -> dict[str, int | float]:
        """All figures by name."""
        return dataclasses.asdict(self)

    def to_line(self) -> str:
        """One line for a terminal."""
        compiled = f", compiled in {self.compile_seconds:.1f} s before" if self.compile_seconds else ""
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s after a prefill of "
            f"{self.prompt_tokens} tokens in {self.prefill_seconds:.2f} s, state {self.state_bytes:,} bytes{compiled}"
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text that a model made, and what it cost."""

    text: str
    stats: GenerationStats


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    show: Callable[[str], Any] = lambda piece: None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    compiled: bool = False,
) -> Answer:
    """Answer `prompt` with `model.generate`.

    Args:
        model: a transformers causal LM, converted or not.
        tokenizer: its tokenizer.
        prompt: the user's message when the tokenizer has a chat template, else text to go on from.
        show: called with piece after piece of the text as it is made; what it raises ends the generation.
        max_new_tokens: when to stop at the latest.
        temperature: 0 takes the most likely token, above 0 samples.
        seed: of the sampling.
        raw: go on from the prompt as it stands although there is a chat template.
        compiled: give the cache a fixed size, so that `generate` compiles the step of one token and records it as a
            CUDA graph: a matter of half a minute or more beforehand, and many times the tokens per second.

    Raises:
        UsageError: the prompt has no tokens, a number is out of range, or the step cannot be compiled here.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError("max_new_tokens must be at least 1 and temperature at least 0")
    if compiled and not compiles(model):
        raise UsageError(
            f"the step of {type(model).__name__} on {model.device} cannot be compiled: leave out --compile"
        )
    inputs = _encode(tokenizer, prompt, raw).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty")
    settings: dict[str, Any] = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    settings |= {"use_cache": True, "num_beams": 1, "num_return_sequences": 1}  # the model's own may say otherwise
    settings["tokenizer"] = tokenizer  # by which the model's own stop strings are found
    if temperature > 0:
        settings["temperature"] = temperature
    if tokenizer.eos_token_id is not None:
        padding = tokenizer.pad_token_id
        settings["pad_token_id"] = tokenizer.eos_token_id if padding is None else padding
    compile_seconds = 0.0
    if compiled:
        settings["cache_implementation"] = "static"
        say("compiling the step")
        compile_seconds = _compile(model, settings)
    torch.manual_seed(seed)
    streamer = _Streamer(tokenizer, show)
    output = model.generate(**settings, streamer=streamer, return_dict_in_generate=True)
    start, first, *_, last = streamer.times if len(streamer.times) > 2 else (*streamer.times, streamer.times[-1])
    _, at_first, *later = streamer.counts
    stats = GenerationStats(
        prompt_tokens=inputs["input_ids"].shape[1],
        tokens=at_first + sum(later),
        seconds=last - start,
        prefill_seconds=first - start,
        tokens_per_second=sum(later) / (last - first) if last > first else 0.0,
        state_bytes=state_bytes(output[CACHE]),
        compile_seconds=compile_seconds,
    )
    return Answer("".join(streamer.pieces), stats)


def compiles(model: Any) -> bool:
    """Whether `generate` compiles the model's step when its cache has a fixed size."""
    return model.device.type == "cuda" and bool(getattr(model, "_can_compile_fullgraph", False))


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
    check_device(place)
    if teacher:
        model, tokenizer = load_teacher(found, device=place)
    else:
        model, tokenizer = load(found.path, device=place)
    if tokenizer is None:
        raise UsageError(f"{found.path} has no tokenizer, which a prompt needs")
    return model, tokenizer, f"the teacher of {found.path}" if teacher else str(found.path)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Shows the text as soon as its words are whole, and notes when tokens came.

    Attributes:
        times: when the prompt was handed over, then when new tokens came: one, or with drafts several at a time.
        counts: how many came each time; first the prompt's.
        pieces: the text so far.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []
        self.counts: list[int] = []
        self.pieces: list[str] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self.show(text)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _compile(model: Any, settings: dict[str, Any]) -> float:
    """Generate a few tokens with a cache of the size that is needed then; returns the seconds."""
    start = time.perf_counter()
    most = settings["input_ids"].shape[1] + _WARM_TOKENS

    def enough(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= most, dtype=torch.bool, device=ids.device)

    few = min(_WARM_TOKENS, settings["max_new_tokens"])  # also where the text would end at once
    model.generate(**settings, min_new_tokens=few, stopping_criteria=StoppingCriteriaList([enough]))
    return time.perf_counter() - start
