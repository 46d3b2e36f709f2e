"""`sample`: text that the teacher writes itself, to distill on where there is no corpus or none may be used.

A model's own text serves its distillation where there is no corpus (LLM-QAT, arXiv 2305.17888). It is drawn in rows
of a fixed number of tokens: a row goes on behind an end-of-text token, so that a batch keeps its shape and nothing is
thrown away. An interrupted run goes on behind its last whole batch, and ends in the same file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from . import sources
from .checkpoint import RECORD, check_folder, find, write_json
from .data import PackedTokens, beginning, borders, documents, no_words, sizes
from .environment import check_device, default_device, hardware, say, versions
from .errors import CheckpointError, UsageError
from .exclusive import empty, hold
from .generation import compiles
from .loading import know, load_teacher, tokenizer_in
from .positions import positions_in
from .recipe import parse_text
from .shards import read_config
from .text import Text

Start = Literal["bos", "token", "chat"]
BATCH = {"cpu": 16, "cuda": 256}
_SEED_STRIDE = 1_000_003  # keeps the batches of neighbouring seeds apart
_PATIENCE = 10_000  # documents in a row that are too short for a prompt
_MARK = "\0user\0"


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What `sample` wrote, or with `dry_run` would write.

    Attributes:
        path: JSON lines `{"text": ...}`, one for each row.
        teacher: folder of the model that wrote it; `teacher_note` is what a reader must know about it.
        start: what each row starts from.
        texts, tokens: rows, and their tokens, those that they start from among them.
        seconds, tokens_per_second: of this run and the tokens that it made; 0 in a dry run.
        resumed: tokens that an interrupted run had left.
    """

    path: Path
    teacher: Path
    teacher_note: str
    start: str
    texts: int
    tokens: int
    length: int
    batch: int
    temperature: float
    top_p: float
    seed: int
    hardware: str
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    resumed: int = 0
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json and the record beside the text."""
        return {**dataclasses.asdict(self), "path": str(self.path), "teacher": str(self.teacher)}

    def to_table(self) -> str:
        """The same as text."""
        note = f" ({self.teacher_note})" if self.teacher_note else ""
        made = f"resumed at {self.resumed:,}, " if self.resumed else ""
        rows = [
            ("teacher", f"{self.teacher}{note}"),
            ("texts", f"{self.texts:,} of {self.length} tokens, {self.tokens:,} in all, batches of {self.batch}"),
            ("from", f"{self.start}, temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"),
            ("speed", f"{made}{self.tokens_per_second:,.1f} tokens/s, {self.seconds:,.1f} s, {self.hardware}"),
        ]
        lines = [f"{label:<9}{value}" for label, value in (rows[:3] if self.dry_run else rows)]
        return "\n".join([*lines, f"{'would write' if self.dry_run else 'wrote'} {self.path}"])


def sample(
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    start: Start | None = None,
    prompts: Any = None,
    prompt_tokens: int = 32,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> SampleResult:
    """Let a teacher write text, as JSON lines that `distill.text` reads.

    bf16 on a GPU, fp32 on a CPU. The same arguments on the same machine give the same file, interrupted or not.

    Args:
        model: a checkpoint, whose teacher is taken (None: the newest in the current directory), or an alias, hub id,
            folder or GGUF file.
        output: file, default `NAME-samples.jsonl`; what was done goes into the same name with .json.
        tokens: at least so many, in whole rows of `length`.
        length: tokens of a row.
        batch: rows at a time, default 16 on a CPU and 256 on a GPU.
        temperature: 1 is the teacher's own distribution.
        top_p: sample among the most likely tokens that make up this share.
        start: of every row: the token that begins a text ("bos", the default; the end-of-text token where there is
            none), a random token of the vocabulary ("token", LLM-QAT), or what the chat template puts before a user's
            words ("chat", Magpie, arXiv 2406.08464), so that an instruct model writes question and answer.
        prompts: a text, as `distill.text` takes it, whose documents' first `prompt_tokens` tokens are gone on from,
            instead.
        seed: of everything; processes with seeds of their own write different text.
        device: default the GPU if there is one.
        overwrite: replace an existing file, drop an unfinished run of other arguments.
        dry_run: check and plan; load and write nothing.

    Raises:
        UsageError, SourceError, RecipeError, CheckpointError: each says what to do.
    """
    device = device or default_device()
    batch = batch or BATCH["cpu" if device == "cpu" else "cuda"]
    if min(tokens, batch, prompt_tokens) < 1 or length < 2 or temperature <= 0 or not 0 < top_p <= 1:
        raise UsageError("tokens and batch must be positive, length above 1, temperature above 0, top-p in (0, 1]")
    begin = _beginning(start, prompts, prompt_tokens, length)
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed {seed}: choose one from 0 to {2**31 - 1}")
    check_device(device)
    name, folder, note = _teacher(model, dry_run)
    target = _target(output, name, overwrite)
    texts = -(-tokens // length)
    batch = min(batch, texts)
    plan = SampleResult(
        target, folder, note, begin.describe(), texts, texts * length, length, batch, temperature, top_p, seed,
        hardware(device),
    )  # fmt: skip
    if dry_run:
        if (folder / "config.json").is_file():  # else it lies on the hub, or in a single file
            know(folder)
            begin.rows(read_config(folder), tokenizer_in(folder), seed)
        return dataclasses.replace(plan, dry_run=True)
    writer, tokenizer = load_teacher(folder, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    rows = begin.rows(writer.config, tokenizer, seed)
    run = _Run(plan, begin, overwrite)
    try:
        hidden = int(begin.start == "bos") if begin.text is None else len(beginning(tokenizer))
        return run.go(writer, tokenizer, rows, hidden=hidden)
    finally:
        run.leave()


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """What a text of `length` tokens starts from: the first `tokens` of the documents of `text`, or else `start`."""

    start: Start
    text: Text | None
    tokens: int
    length: int

    def describe(self) -> str:
        return self.start if self.text is None else f"{self.tokens} tokens of {self.text.describe()}"

    def known_by(self) -> dict[str, Any] | None:
        """What tells a text from others: all of its settings, and the sizes of its files."""
        if self.text is None:
            return None
        return {"text": self.text.model_dump(mode="json"), "sizes": [sizes(spec) for spec, _ in self.text.parts]}

    def rows(self, config: Any, tokenizer: Any, seed: int) -> Iterator[list[int]]:
        """The tokens that each text starts from, without end; UsageError where the teacher allows none."""
        if tokenizer is None:
            raise UsageError("the teacher has no tokenizer, which text needs")
        if self.length > positions_in(config):
            most = positions_in(config)
            raise UsageError(f"the teacher was made for {most} tokens: lower --length (now {self.length})")
        if self.text is None:
            return _starts(tokenizer, self.start, seed)
        return _prompted(self.text, tokenizer, self.tokens, self.length, seed)


def _beginning(start: Start | None, prompts: Any, tokens: int, length: int) -> _Beginning:
    """Check what a text is to start from."""
    if start is not None and prompts is not None:
        raise UsageError("--start and --prompts both say what a text starts from: leave one out")
    begin = start or "bos"
    if begin not in get_args(Start):
        raise UsageError(f"no start {begin!r}, there are: {', '.join(get_args(Start))}")
    text = parse_text(prompts, "prompts") if prompts is not None else None
    for spec, _ in text.parts if text is not None else ():
        if next(iter(documents(spec)), None) is None:
            raise no_words(spec)
    if text is not None and tokens >= length:
        raise UsageError(f"a text starts from {tokens} tokens: raise --length (now {length})")
    return _Beginning(begin, text, tokens, length)


def _target(output: str | Path | None, name: str, overwrite: bool) -> Path:
    """The file to write."""
    target = Path(output) if output is not None else Path(f"{name}-samples.jsonl")
    if target.suffix != ".jsonl":
        better = Path(target.name.removesuffix(".zst")).with_suffix(".jsonl").name
        raise UsageError(f"{target}: JSON lines are read from .jsonl files, name it {better}")
    for path in (target, target.with_suffix(".json")):
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists: use --overwrite, or another file with -o")
    check_folder(target.parent)
    return target


def _teacher(model: str | Path | None, dry_run: bool) -> tuple[str, Path, str]:
    """Short name, folder, and what a reader must know."""
    if model is None or (Path(model) / RECORD).is_file():
        found = find(".", model)
        say(f"the teacher of {found.path}")
        if not (found.teacher_path / "config.json").is_file():
            raise CheckpointError(f"no teacher at {found.teacher_path}: it was moved or never there; put it back")
        return found.name, found.teacher_path, found.teacher_note
    source = sources.resolve(str(model))
    if dry_run:
        return source.name, Path(source.location), source.note
    teacher = sources.materialize(source)
    return source.name, teacher.path, teacher.note


def _starts(tokenizer: Any, start: Start, seed: int) -> Iterator[list[int]]:
    """The tokens that each row starts from, without end."""
    if start == "token":
        special = set(tokenizer.all_special_ids)
        words = [i for i in range(len(tokenizer)) if i not in special and "\ufffd" not in tokenizer.decode([i])]
        rng = random.Random(seed)
        return ([rng.choice(words)] for _ in itertools.count())
    if start == "chat":
        if not tokenizer.chat_template:
            raise UsageError("the teacher has no chat template: use --start bos")
        message = [{"role": "user", "content": _MARK}]
        before, found, _ = tokenizer.apply_chat_template(message, tokenize=False).partition(_MARK)
        ids = tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
        if not ids:
            raise UsageError("the teacher's chat template does not show the user's words: use --start bos")
        return itertools.repeat(ids)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise UsageError("the tokenizer has no token that begins a text: use --start token")
    return itertools.repeat([begin])


def _prompted(text: Text, tokenizer: Any, count: int, length: int, seed: int) -> Iterator[list[int]]:
    """The first tokens of document after document, behind what begins a text; those that are shorter left out."""
    own, (opening, ending) = len(beginning(tokenizer)), borders(tokenizer)
    count += own
    short = 0
    for document in PackedTokens(text, tokenizer, length, seed=seed).token_lists():
        tokens = document[len(opening) - own : len(document) - len(ending)]  # as the tokenizer begins a text by itself
        if len(tokens) >= count:
            short = 0
            yield tokens[:count]
        elif (short := short + 1) == _PATIENCE:
            raise UsageError(f"{text.describe()}: of {short:,} documents in a row none has more than {count} tokens")


class _Run:
    """A file that grows by whole batches, in a folder of its own until it is whole."""

    def __init__(self, plan: SampleResult, begin: _Beginning, overwrite: bool) -> None:
        """Make the folder, or cut what an interrupted run of the same request has left behind its last whole batch."""
        self.plan = plan
        self.work = plan.path.parent / f".{plan.path.name}.run"
        self.text = self.work / "text.jsonl"
        self.held = hold(self.work)
        request = {**plan.to_dict(), "teacher": str(plan.teacher.resolve()), "prompts": begin.known_by()}
        request["hardware"] = None  # may go on elsewhere
        known = self.work / "request.json"
        begun = self.text.is_file() and self.text.stat().st_size > 0
        if not (begun and known.is_file() and json.loads(known.read_text(encoding="utf-8")) == request):
            if begun and not overwrite:
                raise UsageError(
                    f"an unfinished run with other arguments lies in {self.work}: repeat its command to finish it, "
                    "or use --overwrite to drop it, or another file with -o"
                )
            empty(self.work)
            write_json(known, request)
        self.done = self._cut()

    def _cut(self) -> int:
        """Drop lines of a batch that is not whole; returns how many texts are left."""
        if not self.text.is_file():
            return 0
        with self.text.open("rb+") as file:
            ends = list(itertools.accumulate(len(line) for line in file if line.endswith(b"\n")))
            whole = len(ends) if len(ends) >= self.plan.texts else len(ends) - len(ends) % self.plan.batch
            file.truncate(ends[whole - 1] if whole else 0)
        return whole

    def leave(self) -> None:
        """Drop the folder where nothing was written: there is nothing to go on from."""
        if self.text.is_file() and not self.text.stat().st_size:
            shutil.rmtree(self.work)
        self.held.close()

    def go(self, model: Any, tokenizer: Any, starts: Iterator[list[int]], hidden: int) -> SampleResult:
        """Write what is missing; of every row the first `hidden` tokens are not text."""
        plan = self.plan
        resumed, start = self.done * plan.length, time.monotonic()
        if resumed:
            say(f"resuming {self.work}: {resumed:,} of {plan.tokens:,} tokens are there")
        starts = itertools.islice(starts, self.done, None)
        with (
            tqdm(
                desc="sample", total=plan.tokens, initial=resumed, unit="token", unit_scale=True, file=sys.stderr
            ) as bar,
            self.text.open("a", encoding="utf-8") as file,
        ):
            while self.done < plan.texts:
                ids = torch.tensor(list(itertools.islice(starts, min(plan.batch, plan.texts - self.done))))
                if ids.shape[1] >= plan.length:
                    raise UsageError(f"a text starts from {ids.shape[1]} tokens: raise --length (now {plan.length})")
                bar.update(ids.numel())
                given = len(ids)  # the last batch is filled up: another shape would be compiled anew
                ids = torch.cat((ids, ids[-1:].expand(plan.batch - given, -1)))
                torch.manual_seed(plan.seed * _SEED_STRIDE + self.done // plan.batch)
                for row in _written(model, ids, plan, partial(bar.update, given))[:given, hidden:].tolist():
                    words = tokenizer.decode(row, skip_special_tokens=False).rstrip("\ufffd")  # a character cut in two
                    file.write(json.dumps({"text": words}, ensure_ascii=False) + "\n")
                file.flush()
                self.done += given
        seconds = time.monotonic() - start
        rate = (plan.tokens - resumed) / max(seconds, 1e-9)
        found = dataclasses.replace(plan, seconds=round(seconds, 2), tokens_per_second=round(rate, 1), resumed=resumed)
        write_json(plan.path.with_suffix(".json"), {**found.to_dict(), "versions": versions()})
        os.replace(self.text, plan.path)
        shutil.rmtree(self.work)
        return found


@torch.no_grad()
def _written(model: Any, ids: torch.Tensor, plan: SampleResult, tick: Callable[[], Any]) -> torch.Tensor:
    """Rows of `plan.length` tokens that start with `ids` `[B, t]`."""
    from transformers import GenerationConfig, StoppingCriteriaList

    def count(made: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tick()
        return torch.zeros(made.shape[0], dtype=torch.bool, device=made.device)

    # In the place of the model's own, which may bring a penalty, a top-k, or tokens to stop at. Without a compiled step
    # it is the host, launching kernel after kernel, that a batch waits for.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=plan.temperature,
        top_p=plan.top_p,
        top_k=0,
        max_length=plan.length,
        pad_token_id=0,  # never needed, and asked for
        cache_implementation="static" if compiles(model) else None,
    )
    ids = ids.to(model.device)
    try:
        found: torch.Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([count])
        )
    except torch.OutOfMemoryError as error:
        raise UsageError(f"out of memory: lower --batch (now {plan.batch}) or --length (now {plan.length})") from error
    return found.cpu()
