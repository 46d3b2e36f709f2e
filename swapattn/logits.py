"""A teacher's most probable tokens, written once: `swapattn logits` writes them, stages read them in its place.

A folder holds `manifest.json`, which says what the logits are of, and Arrow files `part-*.arrow` that `datasets` maps
into memory: one row a window of text, in the order in which the stage sees them. Columns: `input_ids` int32 `[T]`, with
a document mask also `position_ids`; `top_ids` int32 and `top_log_probs` fp16 `[T · k]`; `top_rest` fp32 `[T]`, ln of
the probability of all other tokens.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from .checkpoint import Checkpoint, check_target, write_json
from .data import PackedTokens, sizes
from .environment import check_device, say, versions
from .errors import CheckpointError, SwapattnError, UsageError
from .exclusive import LOCK, empty, hold
from .loading import load_teacher
from .losses import TopK, chunk_tokens
from .objectives import apart, check_document_mask, check_head, hidden_states, output_embedding
from .positions import check_length
from .recipe import Recipe
from .score_store import fingerprint as fingerprint_of
from .stages import DistillStage, stage_keys, stage_title
from .text import Text
from .vocabulary import check_same_vocabulary, fingerprint, logit_count, tokenizer_of

MANIFEST = "manifest.json"
VERSION = 1
_TOKENS = ("input_ids", "position_ids")
PART_TOKENS = 1 << 17  # of a file: at k = 128 some 100 MB, what an interruption costs at most
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_KNOWN_BY = ("tokenizer", "vocabulary", "text", "seed", "length", "document_mask")  # what must fit the stage that reads


@dataclass(frozen=True)
class Wanted:
    """The logits that one stage of a recipe learns from."""

    key: str  # of the stage in `--set distill.stages.KEY`
    title: str
    folder: Path
    text: Text
    seed: int
    length: int
    windows: int
    document_mask: bool

    def known_by(self, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
        """The part of a manifest that decides whether it fits."""
        return {
            "tokenizer": fingerprint(tokenizer),
            "vocabulary": vocabulary,
            "text": self.text.model_dump(mode="json"),
            "seed": self.seed,
            "length": self.length,
            "document_mask": self.document_mask,
        }


def wanted_logits(recipe: Recipe) -> list[Wanted]:
    """What the stages of a recipe want to read, in their order."""
    stages = recipe.distill.stages
    return [
        Wanted(
            key,
            stage_title(stage.stage, key),
            Path(stage.teacher.logits),
            stage.text or recipe.distill.text,
            recipe.distill.seed + index,
            stage.length,
            stage.steps * stage.batch,
            stage.document_mask,
        )
        for index, (stage, key) in enumerate(zip(stages, stage_keys(stages), strict=True))
        if isinstance(stage, DistillStage) and stage.teacher is not None
    ]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole folder.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: it is damaged or of another version.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"no logits in {folder}: write them first, with `swapattn logits` and the same recipe")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder} has version {manifest.get('version')} of the format, not {VERSION}")
    return manifest


def check_logits(wanted: Wanted, tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """The manifest of the logits that a stage reads, once it is known to fit.

    Raises:
        UsageError, CheckpointError: there are none, they are of other windows or another vocabulary, or damaged.
    """
    manifest = read_manifest(wanted.folder)
    mine = wanted.known_by(tokenizer, vocabulary)
    for key in _KNOWN_BY:
        if manifest[key] != mine[key]:
            values = "" if key in ("tokenizer", "text") else f" ({manifest[key]} there, {mine[key]} here)"
            raise UsageError(
                f"{wanted.title}: the logits in {wanted.folder} were written for another {key}{values}: write them "
                "anew with `swapattn logits --overwrite` and this recipe"
            )
    if manifest["windows"] < wanted.windows:
        raise UsageError(
            f"{wanted.title}: {wanted.folder} holds {manifest['windows']:,} windows, the stage takes "
            f"{wanted.windows:,}: write them anew with `swapattn logits --overwrite`, or lower its tokens"
        )
    _parts(wanted.folder, manifest)
    return manifest


def _parts(folder: Path, manifest: dict[str, Any]) -> list[Any]:
    """The datasets that a folder consists of, mapped into memory."""
    from datasets import Dataset

    parts = []
    for file in sorted(folder.glob("part-*.arrow")):
        try:
            parts.append(Dataset.from_file(str(file)))
        except (OSError, ValueError) as error:  # pyarrow's are one or the other
            why = " ".join(str(error).split())
            raise CheckpointError(
                f"{file} is damaged ({why}): write it anew with `swapattn logits --overwrite`"
            ) from error
    windows = sum(len(part) for part in parts)
    if windows != manifest["windows"]:
        raise CheckpointError(f"{folder} holds {windows:,} windows, its manifest says {manifest['windows']:,}")
    return parts


def check_wanted_logits(recipe: Recipe, checkpoint: Path) -> None:
    """`check_logits` for all stages of a recipe that distills a checkpoint."""
    everything = wanted_logits(recipe)
    if everything:
        tokenizer = tokenizer_of(checkpoint)
        for wanted in everything:
            check_logits(wanted, tokenizer, logit_count(checkpoint))


class LogitWindows(IterableDataset[dict[str, torch.Tensor]]):
    """The windows of a folder with what is known of the teacher, in their order, again and again.

    Every element is {"input_ids": int64 `[T]`, "top_ids": int32 `[T, k]`, "top_log_probs": fp16 `[T, k]`, "top_rest":
    fp32 `[T]`}, with a document mask also "position_ids". Workers and processes share them as in `data.PackedTokens`.
    """

    def __init__(self, folder: Path) -> None:
        from datasets import concatenate_datasets

        manifest = read_manifest(folder)
        self.shape = (manifest["length"], manifest["top"])
        self.rows = concatenate_datasets(_parts(folder, manifest)).with_format("arrow")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        index = first
        while True:
            yield self._row(index % len(self.rows))
            index += step

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        table = self.rows[index]

        def column(name: str) -> torch.Tensor:
            values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return torch.from_numpy(values.copy())  # what is mapped is read-only

        return {
            **{name: column(name).long() for name in _TOKENS if name in self.rows.column_names},
            "top_ids": column("top_ids").view(self.shape),
            "top_log_probs": column("top_log_probs").view(self.shape),
            "top_rest": column("top_rest"),
        }


def write_logits(
    start: Checkpoint,
    recipe: Recipe,
    *,
    top: int = 128,
    teacher: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Write the logits that the stages of a recipe want, for exactly the windows that they will see.

    What an interrupted call has written stays beside the folder and is gone on with; a folder that fits is left alone.

    Args:
        start: the checkpoint that will be distilled; its tokenizer cuts the text.
        recipe: its stages with `teacher: {logits: FOLDER}` name the folders.
        top: k, the most probable tokens that are kept of each position.
        teacher: folder of another teacher than the recorded one.
        device: "cpu", "cuda" or "cuda:1".
        overwrite: replace folders, and drop unfinished ones, that hold logits of something else.
        dry_run: only say what would be written.

    Returns:
        For each folder: folder, stage, windows, tokens, top, bytes (of all parts; estimated where nothing is written).

    Raises:
        UsageError: no stage wants any, a folder holds something else or cannot be written, there is no such device,
            or the teacher has another vocabulary.
        RecipeError: the windows of a stage are longer than the teacher has positions.
        CheckpointError: there is no teacher, or a folder is damaged.
    """
    everything = wanted_logits(recipe)
    if not everything:
        raise UsageError(
            f"no stage of recipe {recipe.name} learns from written logits: name a folder with "
            "--set distill.stages.distill.teacher.logits=FOLDER"
        )
    path = teacher or start.teacher_path
    if not (path / "config.json").is_file():
        if teacher:
            raise UsageError(f"--teacher {teacher}: no such model folder")
        raise CheckpointError(f"no teacher at {path}: it was moved or never there; name it with --teacher")
    check_device(device)
    check_same_vocabulary(path, start.path)
    for wanted in everything:
        check_target(wanted.folder, overwrite=True, marks=(MANIFEST,))
        if (wanted.folder / MANIFEST).is_file():
            read_manifest(wanted.folder)  # nothing else than logits is ever replaced
    model, tokenizer = (None, None) if dry_run else _loaded(path, device)
    for wanted in () if dry_run else everything:
        check_length(model, wanted.length, wanted.key, path)
    found = []
    for wanted in everything:
        if not dry_run:
            _Writer(wanted, model, tokenizer, path, top, device).write(overwrite)
        found.append(_figures(wanted, min(top, logit_count(path))))
    return found


def _figures(wanted: Wanted, top: int) -> dict[str, Any]:
    tokens = wanted.windows * wanted.length
    size = sum(file.stat().st_size for file in wanted.folder.glob("part-*.arrow")) or tokens * (6 * top + 8)
    return {
        "folder": str(wanted.folder),
        "stage": wanted.title,
        "windows": wanted.windows,
        "tokens": tokens,
        "top": top,
        "bytes": size,
    }


def _loaded(path: Path, device: str) -> tuple[Any, Any]:
    model, tokenizer = load_teacher(path, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer")
    check_head(model)
    return model, tokenizer


class _Writer:
    """One folder on its way."""

    def __init__(self, wanted: Wanted, model: Any, tokenizer: Any, path: Path, top: int, device: str) -> None:
        self.wanted, self.model, self.tokenizer, self.device = wanted, model, tokenizer, device
        vocabulary = model.config.get_text_config().vocab_size
        self.top = min(top, vocabulary)
        self.scratch = wanted.folder.parent / f".{wanted.folder.name}.writing"
        self.manifest = {
            "version": VERSION,
            "teacher": str(path.resolve()),
            "weights": fingerprint_of(path),
            "sizes": [sizes(spec) for spec, _ in wanted.text.parts],
            **wanted.known_by(tokenizer, vocabulary),
            "top": self.top,
            "windows": wanted.windows,
            "tokens": wanted.windows * wanted.length,
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    def write(self, overwrite: bool) -> None:
        folder = self.wanted.folder
        if (folder / MANIFEST).is_file() and not overwrite:
            manifest = read_manifest(folder)
            if any(manifest.get(key, value) != value for key, value in self.manifest.items()):
                raise UsageError(f"{folder} holds other logits: use --overwrite, or name another folder")
            say(f"{folder} is there already")
            return
        with hold(self.scratch):
            try:
                self._parts(self._open(overwrite))
                write_json(self.scratch / MANIFEST, {**self.manifest, "versions": versions()})
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SwapattnError(
                    f"{self.wanted.title}: the disk of {self.scratch} is full: free some space and repeat the command, "
                    "which keeps the parts that are whole, or name another folder as the stage's teacher.logits"
                ) from error
            if folder.exists():
                shutil.rmtree(folder)
            (self.scratch / LOCK).unlink()
            self.scratch.rename(folder)

    def _open(self, overwrite: bool) -> int:
        """How many parts an interrupted call has left behind."""
        if (self.scratch / MANIFEST).is_file():
            before = json.loads((self.scratch / MANIFEST).read_text(encoding="utf-8"))
            before.pop("versions", None)
            if before == self.manifest:
                done = len(list(self.scratch.glob("part-*.arrow")))
                say(f"resuming {self.scratch}: {done} parts done")
                return done
            if not overwrite:
                raise UsageError(f"unfinished logits of something else lie in {self.scratch}: use --overwrite")
        empty(self.scratch)
        write_json(self.scratch / MANIFEST, self.manifest)
        return 0

    def _parts(self, done: int) -> None:
        wanted = self.wanted
        size = max(1, PART_TOKENS // wanted.length)
        batch = max(1, BATCH_TOKENS["cpu" if self.device == "cpu" else "cuda"] // wanted.length)
        masked = wanted.document_mask
        if masked:
            check_document_mask(self.model)
        windows = iter(
            PackedTokens(
                wanted.text,
                self.tokenizer,
                wanted.length,
                seed=wanted.seed,
                skip=done * size,
                document_mask=masked,
            )
        )
        bar = tqdm(total=wanted.windows, initial=done * size, desc="logits", unit="window", file=sys.stderr)
        with bar:
            for part in range(done, -(-wanted.windows // size)):
                count = min(size, wanted.windows - part * size)
                file = self.scratch / f"part-{part:05d}.arrow"
                scratch = file.with_name(f".{file.name}")
                with _Part(scratch, wanted.length, self.top, masked) as rows:
                    for start in range(0, count, batch):
                        found = list(islice(windows, min(batch, count - start)))
                        tokens = {name: torch.stack([row[name] for row in found]) for name in found[0]}
                        rows.add(tokens, self._top_of(**tokens))
                        bar.update(len(found))
                os.replace(scratch, file)

    @torch.no_grad()
    def _top_of(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> TopK:
        given = apart(position_ids.to(self.device)) if position_ids is not None else {}
        hidden = hidden_states(self.model, input_ids.to(self.device), **given).flatten(0, 1)
        head = output_embedding(self.model)
        size = chunk_tokens(head.weight.shape[0], torch.float32, hidden.device)
        parts = [TopK.of(head(part), self.top) for part in torch.split(hidden, size)]
        return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "rest")))


class _Part:
    """One Arrow file that is written batch by batch."""

    def __init__(self, path: Path, length: int, top: int, document_mask: bool) -> None:
        import pyarrow

        tokens = _TOKENS if document_mask else _TOKENS[:1]
        self.sizes = dict.fromkeys(tokens, length)
        self.sizes |= {"top_ids": length * top, "top_log_probs": length * top, "top_rest": length}
        kinds = [pyarrow.int32()] * (len(tokens) + 1) + [pyarrow.float16(), pyarrow.float32()]
        pairs = zip(self.sizes.items(), kinds, strict=True)
        self.schema = pyarrow.schema([(name, pyarrow.list_(kind, size)) for (name, size), kind in pairs])
        self.writer = pyarrow.ipc.new_stream(str(path), self.schema)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def add(self, tokens: dict[str, torch.Tensor], top: TopK) -> None:
        """Append windows: ids and positions `[B, T]`, and what is known of each token."""
        import pyarrow

        tensors = (*(tensor.int() for tensor in tokens.values()), top.ids.int(), top.log_probs.half(), top.rest.float())
        columns = [
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tensor.cpu().numpy().reshape(-1)), size)
            for tensor, size in zip(tensors, self.sizes.values(), strict=True)
        ]
        self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))


def to_table(rows: list[dict[str, Any]], *, dry_run: bool) -> str:
    """What `write_logits` found, a line a folder."""
    verb = "would write" if dry_run else "holds"
    return "\n".join(
        f"{row['folder']} {verb} the top {row['top']} of {row['tokens']:,} tokens, {row['bytes'] / 2**20:,.1f} MiB "
        f"({row['windows']:,} windows for stage {row['stage']})"
        for row in rows
    )
