"""Text for training and perplexity: documents from anywhere, packed into windows of tokens.

Nothing here ever comes from an evaluation set: the embedded text is speeches and novels (see `assets/README.md`),
everything else is what the recipe names.
"""

from __future__ import annotations

import glob
import io
import json
import random
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib.resources import files
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

from .errors import SourceError, SwapattnError, UsageError
from .sources import hub_reachable
from .text import Text, TextSpec

SHUFFLE_BUFFER = 2000  # documents
OPEN_FILES = 16
SHORTEST = 64  # tokens between two boundaries of documents in a window
_TOKENIZE_BATCH = 64  # documents a call: enough for the tokenizer's threads, few enough for a quick first window
_EPOCH_STRIDE = 1_000_003  # keeps the epochs of neighbouring seeds apart
_SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(text: TextSpec, *, seed: int = 0, piece: int = 8000) -> Iterator[str]:
    """One pass over the documents of `text`, in an order that depends only on `seed` and the text itself.

    The order is random within a buffer of 2,000 documents; up to 16 files are read at a time, each picked in
    proportion to its size, so that sources mix. A hub dataset is streamed with its shards in seeded order.

    A .txt file is UTF-8 in which an empty line ends a paragraph and two empty lines end a document. Paragraphs are
    gathered into pieces of at least `piece` characters (unless the document ends before), because a shuffle of
    single paragraphs would leave no context longer than one. Rows of .jsonl, .parquet and hub datasets are
    documents as they are; empty ones are left out.

    No document is from an evaluation set as long as the named files or dataset are not one.

    Raises:
        UsageError: no file matches, an unknown kind of file, a column that does not exist.
        SourceError: a line that is not JSON, a damaged file, a hub dataset out of reach. Those that show only while
            reading are raised by the iterator.
    """
    if text.hub is not None:
        return _hub_documents(text, text.hub, seed)
    paths = [_embedded("train")] if text.embedded else _expand(text.files)
    for path in paths:
        _kind(path)
    rng = random.Random(seed)
    return _shuffled(_interleaved(paths, text.column, piece, rng), rng)


class PackedTokens(IterableDataset[dict[str, Tensor]]):
    """Endless windows of tokens: documents tokenised, set apart by special tokens (`borders`), and cut.

    Every element is `{"input_ids": LongTensor[length]}`, full and without padding; documents run on from one window
    to the next. Windows, too, begin with what the tokenizer puts in front of a text, see `beginning`. The
    sequence depends only on the arguments. Of a mixture the next document always comes from the source that is furthest
    behind its share of the tokens, so that the shares hold at any time to within a document; a source that ends begins
    again, in another order.

    With `document_mask` there are also `"position_ids": LongTensor[length]`, which begin again at 0 with each
    document: its own context, also where a window cuts it in two. Two beginnings are at least `SHORTEST` tokens apart,
    so that their number is bounded: what comes earlier, such as the document after a shorter one, runs on.

    DataLoader workers share the windows in turn. Processes of a distributed run all see the same sequence:
    accelerate, which the Trainer uses, splits an iterable dataset among them itself.

    Args:
        text: where the documents come from, see `documents`.
        tokenizer: a transformers tokenizer; without such tokens documents follow each other directly.
        length: tokens a window. Text files are cut into pieces of about twice that.
        seed: of the order of the documents.
        skip: windows to leave out at the start, to resume; they are tokenised but not built.
        document_mask: give positions, too.
    """

    def __init__(
        self, text: Text, tokenizer: Any, length: int, seed: int = 0, skip: int = 0, *, document_mask: bool = False
    ) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.length = length
        self.seed = seed
        self.skip = skip
        self.document_mask = document_mask

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for window, starts in islice(self._windows(), self.skip + first, None, step):
            found = {"input_ids": torch.tensor(window, dtype=torch.long)}
            yield found | ({"position_ids": _positions(starts, self.length)} if self.document_mask else {})

    def _windows(self) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of each window, and where documents start in it."""
        opening = beginning(self.tokenizer)
        pending: list[int] = []
        starts: deque[int] = deque()
        for tokens in self.token_lists():
            starts.append(len(pending))
            pending += tokens
            begin = 0
            while True:
                head = [] if starts and starts[0] == begin else opening  # a document brings its own
                end = begin + self.length - len(head)
                if end > len(pending):
                    break
                inside = []
                while starts and starts[0] < end:
                    inside.append(starts.popleft() - begin + len(head))
                yield [*head, *pending[begin:end]], inside
                begin = end
            del pending[:begin]
            starts = deque(start - begin for start in starts)

    def token_lists(self) -> Iterator[list[int]]:
        """Token ids of document after document without end, from all sources by their shares."""
        sources = [(self._documents(spec), share) for spec, share in self.text.parts]
        given = [0] * len(sources)
        while True:
            index = min(range(len(sources)), key=lambda i: given[i] / sources[i][1])
            tokens = next(sources[index][0])
            given[index] += len(tokens)
            yield tokens

    def _documents(self, text: TextSpec) -> Iterator[list[int]]:
        """Token ids of the documents of one source, epoch after epoch."""
        opening, ending = borders(self.tokenizer)
        epoch = 0
        while True:
            stream = documents(text, seed=self.seed * _EPOCH_STRIDE + epoch, piece=8 * self.length)
            empty = True
            while batch := list(islice(stream, _TOKENIZE_BATCH)):
                for row in self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                    if row:
                        empty = False
                        yield [*([] if row[:1] == opening else opening), *row, *ending]
            if empty:
                raise no_words(text)
            epoch += 1


def beginning(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts in front of every text (that of Llama, Mistral, Gemma), else nothing.

    Models that were trained with it look there when they look at nothing else, and some (Gemma) fail without it.
    """
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def borders(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands in front of a document and behind it, where documents follow each other.

    In front `beginning`, behind the end-of-text token. A tokenizer that has a token of its own to begin a text with,
    but does not put it there by itself (SmolLM2's), has it in front and nothing behind: an instruct model's
    end-of-text token often ends a turn of a chat, not a document (what this is worth: recipes/README.md, Recall).
    """
    opening, begin, end = beginning(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    if not opening and begin is not None and begin != end:
        return [begin], []
    return opening, [] if end is None else [end]


def no_words(text: TextSpec) -> SourceError:
    """The error for a source without a document."""
    return SourceError(f"the text {text.describe()} has no words")


def _positions(starts: Sequence[int], length: int) -> Tensor:
    """Positions that begin again at each start that is far enough from the one before."""
    kept = [0]
    for start in starts:
        if start - kept[-1] >= SHORTEST:
            kept.append(start)
    return torch.cat([torch.arange(end - start) for start, end in pairwise([*kept, length])])


def boundaries(position_ids: Tensor) -> Tensor:
    """Where documents begin in windows laid end to end, and where the last one ends.

    The shape depends on that of the windows alone, and nobody has to wait for the device: ends are repeated, as empty
    documents, up to the number that `PackedTokens` may give.

    Args:
        position_ids: `[B, T]`, as from `PackedTokens`.

    Returns:
        int32 `[B * ceil(T / SHORTEST) + 1]`, from 0 to B * T, not decreasing.
    """
    rows, length = position_ids.shape
    count = rows * -(-length // SHORTEST)
    index = torch.arange(rows * length, dtype=torch.int32, device=position_ids.device)
    found = index.masked_fill(position_ids.flatten() != 0, rows * length).sort().values
    return F.pad(found[:count], (0, 1), value=rows * length)


def heldout_windows(tokenizer: Any, *, length: int = 512, count: int | None = None, text: str | None = None) -> Tensor:
    """Windows for perplexity of a text, by default the embedded held-out part: see `windows_of`.

    Raises:
        UsageError: the text is shorter than one window.
    """
    tokens, opening = heldout_tokens(tokenizer, text), beginning(tokenizer)
    if len(opening) + tokens.numel() < length:
        raise UsageError(f"the text has {tokens.numel()} tokens, less than one window of {length}")
    return windows_of(tokens, length, count, opening)


def heldout_tokens(tokenizer: Any, text: str | None = None) -> Tensor:
    """The stream of tokens `[T]` of a text, without special ones; by default of the embedded part never trained on."""
    source = _read_embedded("heldout") if text is None else text
    return torch.tensor(tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def windows_of(tokens: Tensor, length: int, count: int | None, opening: Sequence[int]) -> Tensor:
    """`[N, length]` windows of a stream of tokens `[T]` that do not overlap, each behind `opening`.

    Args:
        tokens: the stream.
        length: of a window, with `opening`.
        count: at most this many, evenly spread over the text so that each of its sources is among them; None = all.
        opening: `beginning` of the tokenizer.
    """
    room = length - len(opening)
    available = tokens.numel() // room
    windows = tokens[: available * room].view(available, room)
    windows = torch.cat((torch.tensor(opening, dtype=torch.long).expand(available, -1), windows), 1)
    return windows if count is None or count >= available else windows[torch.arange(count) * available // count]


def _embedded(part: str) -> Path:
    return Path(str(files("swapattn"))) / "assets" / f"{part}.txt.zst"


def _read_embedded(part: str) -> str:
    with ExitStack() as stack:
        return open_text(_embedded(part), stack).read()


def _expand(patterns: Sequence[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        place = Path(pattern).expanduser()
        matches = [str(place)] if place.is_file() else sorted(glob.glob(str(place), recursive=True))
        paths = [path for path in map(Path, matches) if path.is_file()]
        if not paths:
            raise UsageError(f"no file matches {pattern}")
        found.update(dict.fromkeys(paths))
    return list(found)


def sizes(text: TextSpec) -> dict[str, int]:
    """Bytes of each file of a text, which tell whether it is still the same; nothing for what is no local file."""
    return {str(path): path.stat().st_size for path in _expand(text.files)}


def _kind(path: Path) -> str:
    kind = path.with_suffix("").suffix if path.suffix == ".zst" else path.suffix
    if kind not in _SUFFIXES:
        raise UsageError(f"{path}: cannot read this kind of file; there are: {', '.join(_SUFFIXES)}, plain or .zst")
    return kind


def _shuffled(stream: Iterable[str], rng: random.Random) -> Iterator[str]:
    buffer: list[str] = []
    for document in stream:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        index = rng.randrange(SHUFFLE_BUFFER)
        yield buffer[index]
        buffer[index] = document
    rng.shuffle(buffer)
    yield from buffer


def _interleaved(paths: Sequence[Path], column: str, piece: int, rng: random.Random) -> Iterator[str]:
    waiting = list(paths)
    rng.shuffle(waiting)
    streams: list[Iterator[str]] = []
    weights: list[int] = []
    while waiting or streams:
        while waiting and len(streams) < OPEN_FILES:
            path = waiting.pop()
            streams.append(_file_documents(path, column, piece))
            weights.append(max(path.stat().st_size, 1))
        index = rng.choices(range(len(streams)), weights)[0]
        document = next(streams[index], None)
        if document is None:
            del streams[index], weights[index]
        else:
            yield document


def _file_documents(path: Path, column: str, piece: int) -> Iterator[str]:
    import pyarrow

    readers = {".txt": _text_documents, ".jsonl": _json_documents, ".parquet": _parquet_documents}
    with ExitStack() as stack:
        try:
            yield from readers[_kind(path)](path, stack, column, piece)
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8 text: {error.reason}") from error
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def open_text(path: Path, stack: ExitStack, newline: str | None = None) -> io.TextIOWrapper:
    """A UTF-8 file, plain or .zst, with or without a byte-order mark; `newline` as for `open`.

    OSError while reading one that ends too early.
    """
    return io.TextIOWrapper(_open(path, stack), encoding="utf-8-sig", newline=newline)


def _open(path: Path, stack: ExitStack) -> Any:
    plain = stack.enter_context(path.open("rb"))
    if path.suffix != ".zst":
        return plain
    import pyarrow  # whose reader, unlike that of zstandard, tells a file that was cut from one that ended

    return stack.enter_context(pyarrow.CompressedInputStream(plain, "zstd"))


def _text_documents(path: Path, stack: ExitStack, column: str, piece: int) -> Iterator[str]:
    lines: list[str] = []
    characters = blank = 0
    for raw in open_text(path, stack):
        line = raw.rstrip()
        if not line:
            blank += 1
            continue
        # A file without empty lines must not become one document: four pieces long is long enough.
        ended = blank > 1 or (blank == 1 and characters >= piece) or characters >= 4 * piece
        if lines and ended:
            yield "\n".join(lines)
            lines, characters = [], 0
        elif lines and blank:
            lines.append("")
        lines.append(line)
        characters += len(line) + 1
        blank = 0
    if lines:
        yield "\n".join(lines)


def _json_documents(path: Path, stack: ExitStack, column: str, piece: int) -> Iterator[str]:
    for number, line in enumerate(open_text(path, stack), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # Python reads no number of thousands of digits, nor such depths
            why = getattr(error, "msg", error)
            raise SourceError(f"{path}: line {number} is not JSON: {why}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}: line {number} is not a JSON object")
        yield from _cell(row, column, f"{path}: line {number}")


def _parquet_documents(path: Path, stack: ExitStack, column: str, piece: int) -> Iterator[str]:
    from pyarrow import parquet

    source: Any = _open(path, stack)
    if path.suffix == ".zst":  # Parquet is read from its end, a zstd stream only from its beginning
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the stack)
        shutil.copyfileobj(source, stack.enter_context(unpacked))
        source = unpacked
    table = parquet.ParquetFile(source)
    if column not in table.schema_arrow.names:
        raise _no_column(str(path), column, table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        for row in batch.to_pylist():
            yield from _cell(row, column, str(path))


def _hub_documents(text: TextSpec, name: str, seed: int) -> Iterator[str]:
    def unreachable(error: Exception) -> SourceError:
        return _no_dataset(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def read() -> Iterator[str]:
        try:
            # Row by row, a process of the data loader would see other rows, in an order of its own.
            for batch in rows.iter(batch_size=1):
                row = {key: values[0] for key, values in batch.items()}
                yield from _cell(row, text.column, f"hub dataset {name}")
        except SwapattnError:
            raise
        except Exception as error:
            raise unreachable(error) from error

    if not Path(name).exists() and not hub_reachable():  # without the question datasets retries for 24 s, measured
        raise _no_dataset(name, "the hub cannot be reached")
    # What datasets raises on a failing network is not one family: OSError, httpx, fsspec, aiohttp, its own.
    try:
        from datasets import load_dataset

        rows = load_dataset(name, text.config, split=text.split, streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except Exception as error:
        raise unreachable(error) from error
    return read()


def _no_dataset(name: str, why: str) -> SourceError:
    return SourceError(
        f"hub dataset {name} could not be read ({why}); use a local copy: --set distill.text=FILE, "
        "or the embedded text: --set distill.text=embedded"
    )


def _cell(row: dict[str, Any], column: str, where: str) -> Iterator[str]:
    """The document in a row, nothing when it is empty."""
    if column not in row:
        raise _no_column(where, column, list(row))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    if value and value.strip():
        yield value.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character


def _no_column(where: str, column: str, columns: Sequence[str]) -> UsageError:
    return UsageError(f"{where}: no column {column!r}, there are: {', '.join(columns)}")
