"""What a model costs by length of context: bytes of its state or KV cache, prefill and decoding speed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import CACHE
from .cells import aligned
from .environment import hardware
from .errors import UsageError
from .positions import positions_in

CPU_LENGTH = 1024  # longer contexts take minutes on a CPU
_CHUNK = 2048  # tokens a forward pass of the prefill, so that activations and logits stay bounded
_WARM_TOKENS = 3


def measure(
    model: Any,
    *,
    lengths: Sequence[int] = (1024, 8192, 32768),
    new_tokens: int = 32,
    beyond: bool = False,
    long_on_cpu: bool = False,
) -> dict[str, Any]:
    """State size and speed of one sequence at each context length, with the model's own forward pass and cache.

    A length counts all tokens: the prefill is `new_tokens` short of it and decoding reaches it, so that the cache then
    holds exactly `length` tokens. The tokens are random, since no cost depends on them.

    Args:
        model: a causal LM, converted or not; put in evaluation mode for the time.
        lengths: tokens of context; those that are skipped are named with the reason.
        new_tokens: decoded one at a time; their median time counts.
        beyond: also lengths above the model's positions, where these are rotary (its text would be nonsense there).
        long_on_cpu: also lengths above 1,024 on a CPU.

    Returns:
        {"device", "dtype", "new_tokens", "rows": [{"length", "state_bytes", "prefill_tokens_per_second",
        "decode_tokens_per_second", "decode_seconds" (median of a token)}], "skipped": [{"length", "reason"}]}.

    Raises:
        UsageError: no new tokens, or a length that leaves nothing for the prefill.
    """
    if new_tokens < 1 or any(length <= new_tokens for length in lengths):
        raise UsageError(f"cost: new tokens ({new_tokens}) must be positive and below every length")
    parameter = next(model.parameters())
    rows, skipped = [], []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for length in tqdm(lengths, desc="cost by length", unit="length", file=sys.stderr):
                reason = _reason_to_skip(model, length, beyond, long_on_cpu)
                if reason:
                    skipped.append({"length": length, "reason": reason})
                else:
                    rows.append(_row(model, length, new_tokens))
    finally:
        model.train(was_training)
    return {
        "device": hardware(str(parameter.device)),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "new_tokens": new_tokens,
        "rows": rows,
        "skipped": skipped,
    }


def to_table(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """One or two results of `measure` as plain text."""
    sides = [("teacher", teacher), ("student", student)] if teacher is not None else [("student", student)]
    found = [(name, {row["length"]: row for row in side["rows"]}) for name, side in sides if side is not None]
    lengths = sorted({length for _, rows in found for length in rows})
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("state", lambda row: _bytes(row["state_bytes"])),
        ("prefill tok/s", lambda row: f"{row['prefill_tokens_per_second']:,.0f}"),
        ("decode tok/s", lambda row: f"{row['decode_tokens_per_second']:,.1f}"),
    ]
    table = [["tokens", *(f"{label}, {name}" for label, _ in columns for name, _ in found)]]
    for length in lengths:
        cells = (text(rows[length]) if length in rows else "-" for _, text in columns for _, rows in found)
        table.append([f"{length:,}", *cells])
    reasons = [f"not measured at {x['length']:,} tokens: {x['reason']}" for _, side in sides for x in side["skipped"]]
    machines = [f"{side['device']}, {side['dtype']}, batch of 1" for _, side in sides]
    return "\n".join([aligned(table), *dict.fromkeys(reasons), *dict.fromkeys(machines)])


def _reason_to_skip(model: Any, length: int, beyond: bool, long_on_cpu: bool) -> str | None:
    config = model.config.get_text_config()
    positions = positions_in(config)
    rotary = getattr(config, "rope_parameters", None) is not None
    if length > positions and not (beyond and rotary):
        return f"the model has {positions:,} positions"
    if next(model.parameters()).device.type == "cpu" and length > CPU_LENGTH and not long_on_cpu:
        return "too slow on a CPU"
    return None


def _row(model: Any, length: int, new_tokens: int) -> dict[str, Any]:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, length), generator=generator).to(parameter.device)
    prompt = tokens[:, : length - new_tokens]
    # Kernels are compiled and memory is taken on first use: a first piece, one that continues it, single tokens.
    warm = min(prompt.shape[1], 2 * _CHUNK)
    _decode(model, _prefill(model, prompt[:, :warm]), tokens[:, : min(_WARM_TOKENS, new_tokens)])
    start = _now(parameter.device)
    cache = _prefill(model, prompt)
    prefill_seconds = _now(parameter.device) - start
    seconds = statistics.median(_decode(model, cache, tokens[:, length - new_tokens :]))
    return {
        "length": length,
        "state_bytes": state_bytes(cache),
        "prefill_tokens_per_second": prompt.shape[1] / prefill_seconds,
        "decode_tokens_per_second": 1 / seconds,
        "decode_seconds": seconds,
    }


def _prefill(model: Any, tokens: Tensor) -> Any:
    """The cache after tokens `[1, T]`, read 2,048 at a time."""
    cache = None
    for piece in torch.split(tokens, _CHUNK, dim=1):
        cache = model(input_ids=piece, use_cache=True, **{CACHE: cache})[CACHE]
    return cache


def _decode(model: Any, cache: Any, tokens: Tensor) -> list[float]:
    """Seconds of each step of a greedy decoding that is fed tokens `[1, T]`; the choice of the next one is in it."""
    times = [_now(tokens.device)]
    for token in torch.split(tokens, 1, dim=1):
        model(input_ids=token, use_cache=True, **{CACHE: cache}).logits[:, -1].argmax(-1)
        times.append(_now(tokens.device))
    return [after - before for before, after in pairwise(times)]


def _now(device: torch.device) -> float:
    """The clock once the device has done what was asked of it: a GPU works behind the caller's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(count: int) -> str:
    """Binary units: 1.5 MiB."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers `Cache` holds; memory that several tensors share counts once."""
    storages: dict[int, int] = {}
    for tensor in _tensors(list(getattr(cache, "layers", ()))):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _tensors(vars(value))
