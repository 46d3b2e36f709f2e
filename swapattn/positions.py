"""Perplexity by position in the text, and what probes of a model share: chunked forward passes, errors."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .cache import CACHE
from .cells import aligned, number, with_error
from .data import beginning, heldout_tokens, open_text, windows_of
from .errors import RecipeError, SourceError, UsageError

EDGES = (0, 64, 256, 1024, 2048, 4096, 8192)  # of the position bins
LONGEST = 8192  # tokens of a window
LIMITS = ("max_position_embeddings", "max_seq_len")  # names of the most tokens in a config; the latter is mpt's
WINDOW = 1024  # of the perplexity that is compared between models
FAR = 256  # the first position that a small window of softmax cannot help with
CPU_CHUNK = 2048  # tokens whose logits exist at a time: 0.4 GB in fp32 at a vocabulary of 49152
GPU_LOGITS = 2**29  # the same on a GPU, where small passes wait for the launch of kernels: 2 GB in fp32


def perplexity_of_file(
    model: Any, tokenizer: Any, path: str | Path, *, windows: int | None = None, longest: int | None = None
) -> dict[str, Any]:
    """`perplexity_of_text` for a UTF-8 file, plain or .zst.

    Raises:
        UsageError: no such file, or less than two tokens in it.
        SourceError: a damaged file, or one that is not UTF-8.
    """
    text = read_text(Path(path))
    return {**perplexity_of_text(model, tokenizer, text, windows=windows, longest=longest), "text": str(path)}


def read_text(path: Path) -> str:
    """A UTF-8 file, plain or .zst, as it is to the last token.

    Raises:
        UsageError: no such file, nothing in it, or documents in another form.
        SourceError: a damaged file, or one that is not UTF-8.
    """
    if Path(path.name.removesuffix(".zst")).suffix in (".jsonl", ".json", ".parquet"):
        raise UsageError(f"{path}: perplexity is that of plain text, a .txt or .zst file")
    try:
        with ExitStack() as stack:
            text = open_text(path, stack, newline="").read()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {' '.join(str(error).split())}") from error
    if not text:
        raise UsageError(f"{path} is empty")
    return text


def perplexity_of_text(
    model: Any,
    tokenizer: Any,
    text: str | None = None,
    *,
    windows: int | None = None,
    longest: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a text, whole and by position; figures that are not finite are None.

    The text is one stream of tokens without special ones, cut into windows that do not overlap, each behind what the
    tokenizer puts in front of a text; every token but the first of a window is predicted from those before it in the
    window. "nats" is the mean negative log-likelihood.

    Returns:
        Over windows of 1,024 tokens: "tokens" predicted, "nats", "perplexity", the same in "far" over the positions
        from 256 on, "window_nats", "window_far_nats", the mean of each window, and "ids", a hash of all their tokens.
        Over windows of up to 8,192 tokens (as `longest`, the model's positions and the text allow, with `windows` no
        more than 1,024): "bins" by position.
    """
    tokens, opening = heldout_tokens(tokenizer, text), beginning(tokenizer)
    if tokens.numel() + len(opening) < 2:
        raise UsageError(f"the text has too few tokens ({tokens.numel()}): there is nothing to predict")
    limit = min(tokens.numel() + len(opening), positions_of(model))
    window = min(limit, WINDOW)
    long_window = (
        min(limit, max(longest or LONGEST, window)) if windows is None else window
    )  # few windows were asked for: do not read 8 times as much
    cut = windows_of(tokens, window, windows, opening)
    with measuring(model):
        short = _nats(model, cut)
        long = short if long_window == window else _nats(model, windows_of(tokens, long_window, None, opening))
    far = short[:, FAR - 1 :]
    edges = [edge for edge in EDGES if edge < long_window] + [long_window]
    return {
        "text": "embedded" if text is None else "given",
        "window": window,
        "windows": short.shape[0],
        "ids": hashlib.sha256(cut.numpy().tobytes()).hexdigest()[:16],
        **_figures(short),
        "far": {"start": FAR, "end": window, **_figures(far)} if far.numel() else None,
        "long_window": long_window,
        "long_windows": long.shape[0],
        "bins": [
            {"start": first, "end": last, **_figures(long[:, max(first - 1, 0) : last - 1])}
            for first, last in pairwise(edges)
            if last > 1
        ],
        "window_nats": [finite(x) for x in short.mean(1).tolist()],
        "window_far_nats": [finite(x) for x in far.mean(1).tolist()] if far.numel() else [],
    }


def compare_perplexity(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    """Two results of `perplexity_of_text` with ratios student / teacher and their standard errors.

    The errors are paired over the windows. Ratios are None where one side has no figure, or where text or windows
    differ (two tokenizers, two devices).
    """
    sides = (student, teacher) if teacher is not None and _same_windows(student, teacher) else None
    ratio, error = _ratio(*(side["window_nats"] for side in sides)) if sides else (None, None)
    far, far_error = _ratio(*(side["window_far_nats"] for side in sides)) if sides else (None, None)
    bins = side_by_side(student["bins"], teacher["bins"] if sides and teacher else (), ("start", "end"))
    return {
        "text": student["text"],
        "student": dict(student),
        "teacher": dict(teacher) if teacher is not None else None,
        "ratio": ratio,
        "ratio_stderr": error,
        "far_ratio": far,
        "far_ratio_stderr": far_error,
        "bins": [_bin_ratio(row) for row in bins],
    }


def perplexity_table(compared: Mapping[str, Any]) -> str:
    """The result of `compare_perplexity` as plain text."""
    student, teacher = compared["student"], compared["teacher"] or {}
    text = compared["text"] + (" text" if compared["text"] in ("embedded", "given") else "")
    rows: list[tuple[str, ...]] = [(f"perplexity, {text}", "tokens", "teacher", "student", "ratio")]
    ratio = with_error(compared["ratio"], compared["ratio_stderr"])
    rows.append((f"windows of {student['window']:,}", *_perplexity_cells(student, teacher), ratio))
    if student["far"]:
        ratio = with_error(compared["far_ratio"], compared["far_ratio_stderr"])
        far = _perplexity_cells(student["far"], teacher.get("far") or {})
        rows.append((f"  far: from {student['far']['start']} on", *far, ratio))
    for row, own in zip(compared["bins"], student["bins"], strict=True):
        cells = (f"{own['tokens']:,}", number(row["teacher"], 2), number(row["student"], 2), number(row["ratio"]))
        rows.append((f"  positions {row['start']:,}-{row['end'] - 1:,} of {student['long_window']:,}", *cells))
    return aligned(rows)


def device_of(model: Any) -> torch.device:
    """Where the model is."""
    device: torch.device = next(model.parameters()).device
    return device


def chunk_of(model: Any) -> int:
    """Tokens whose logits may exist at a time."""
    vocabulary = (
        getattr(model.config.get_text_config(), "vocab_size", None) if device_of(model).type == "cuda" else None
    )
    return CPU_CHUNK if vocabulary is None else max(CPU_CHUNK, GPU_LOGITS // vocabulary)


def positions_of(model: Any) -> int:
    """Tokens that the model was made for; no limit where its config names none."""
    return positions_in(model.config)


def positions_in(config: Any) -> int:
    """The same of its config alone."""
    text = config.get_text_config()
    return next(filter(None, (getattr(text, name, None) for name in LIMITS)), sys.maxsize)


def most_positions(model: Any) -> int:
    """Tokens that a model can run on: no limit unless it keeps something for each of its positions.

    That is an embedding, of which OPT and BART leave two rows free, or a buffer: angles (GPT-J), a mask (GPT-Neo).
    """
    known = positions_of(model)
    kept = {size for buffer in model.buffers() for size in buffer.shape}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            kept.add(module.num_embeddings)
    return known if kept & {known, known + 2} else sys.maxsize


def check_length(model: Any, length: int, key: str, folder: Path) -> None:
    """Make sure that a model runs on windows of a stage, which `--set distill.stages.KEY` names.

    Raises:
        RecipeError: they are longer than it has positions.
    """
    if length > (most := most_positions(model)):
        raise RecipeError(
            f"distill.stages.{key}.length: windows of {length} tokens are too long for the {most} positions of "
            f"{folder}: --set distill.stages.{key}.length={most}"
        )


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def logits_in_pieces(model: Any, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Start and logits `[B, t, V]` of piece after piece of ids `[B, T]`, at most `chunk_of` tokens each (or B).

    Pieces after the first go through the cache.
    """
    ids = ids.to(device_of(model))
    size = max(1, chunk_of(model) // ids.shape[0])
    whole = ids.shape[1] <= size
    cache = None
    for start in range(0, ids.shape[1], size):
        out = model(input_ids=ids[:, start : start + size], use_cache=not whole, **{CACHE: cache})
        cache = None if whole else out[CACHE]
        yield start, out.logits


def _nats(model: Any, windows: Tensor) -> Tensor:
    """fp64 `[N, L - 1]`: negative log-likelihood of the tokens at positions 1 to L - 1 of int64 windows `[N, L]`."""
    found = []
    batches = torch.split(windows, max(1, chunk_of(model) // windows.shape[1]))
    for batch in tqdm(batches, desc="perplexity by position", unit="batch", file=sys.stderr):
        pieces = []
        for start, logits in logits_in_pieces(model, batch):
            targets = batch[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
            kept = logits[:, : targets.shape[1]].float()  # the last token of a window predicts nothing
            loss = torch.nn.functional.cross_entropy(kept.flatten(0, 1), targets.flatten(), reduction="none")
            pieces.append(loss.view(targets.shape).double().cpu())
        found.append(torch.cat(pieces, 1))
    return torch.cat(found)


def finite(value: float) -> float | None:
    """The value, None where it is not finite."""
    return value if math.isfinite(value) else None


def _figures(nats: Tensor) -> dict[str, Any]:
    mean = nats.mean()
    return {"tokens": nats.numel(), "nats": finite(float(mean)), "perplexity": finite(float(mean.exp()))}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over documents; None for a single one."""
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(found.mean()), error


def share_and_error(student: Sequence[float], teacher: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of the student by mean of the teacher over the same documents, and its paired error to first order.

    None where there is no teacher, where its mean is 0, or where there are other documents.
    """
    if len(student) != len(teacher) or not any(teacher):
        return None, None
    mean = sum(teacher) / len(teacher)
    share = sum(student) / len(student) / mean
    _, error = mean_and_error([s - share * t for s, t in zip(student, teacher, strict=True)])
    return share, None if error is None else error / mean


def side_by_side(
    student: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]], keys: tuple[str, ...] = ("length",)
) -> list[dict[str, Any]]:
    """Rows of the student with the teacher's row of the same keys, or None."""
    found = {tuple(row[key] for key in keys): dict(row) for row in teacher}
    return [
        {**{key: row[key] for key in keys}, "student": dict(row), "teacher": found.get(tuple(row[key] for key in keys))}
        for row in student
    ]


def _same_windows(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    # two tokenizers may well make as many windows of a text, but then of other stretches of it
    return all(student[key] == teacher[key] for key in ("text", "window", "windows", "tokens", "ids", "long_window"))


def _ratio(student: Sequence[float | None], teacher: Sequence[float | None]) -> tuple[float | None, float | None]:
    """exp of the mean difference of the windows' nats, and its error to first order."""
    pairs = [(s, t) for s, t in zip(student, teacher, strict=True) if s is not None and t is not None]
    if not pairs or len(pairs) < len(student):
        return None, None
    mean, error = mean_and_error([s - t for s, t in pairs])
    ratio = math.exp(min(mean, 700.0))
    return ratio, None if error is None else ratio * error


def _bin_ratio(row: Mapping[str, Any]) -> dict[str, Any]:
    student, teacher = row["student"]["perplexity"], (row["teacher"] or {}).get("perplexity")
    ratio = student / teacher if student is not None and teacher else None
    return {"start": row["start"], "end": row["end"], "student": student, "teacher": teacher, "ratio": ratio}


def _perplexity_cells(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{student['tokens']:,}", number(teacher.get("perplexity"), 2), number(student["perplexity"], 2)
