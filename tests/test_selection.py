"""`select` ranks layers by what they cost, goes on where it stopped, and writes a recipe fragment."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from click.testing import CliRunner

from swapattn import selection
from swapattn.cli import common, main
from swapattn.conversion import convert
from swapattn.errors import UsageError
from swapattn.recall import Document
from swapattn.recipe import load_recipe
from swapattn.selection import CHART, FRAGMENT, SCORES, select

SET = ["convert.local={window: 5, sinks: 2}", "distill.stages=[{stage: calibrate, tokens: 128, length: 64}]"]
SMALL = {"tokens": 96, "length": 48, "recipe": "smoke", "overrides": SET}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A model of four layers of which only the third does anything with its attention."""
    folder = tmp_path_factory.mktemp("models") / "four"
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():
        for index in (0, 1, 3):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("restore", [False, True])
def test_the_layer_that_matters_is_first_and_the_others_cost_nothing(teacher, tmp_path, restore):
    found = select(teacher, tmp_path / "s", count=2, restore=restore, **SMALL)
    assert found.ranking[0] == 2
    assert found.costs[2] > 1e-3
    assert all(abs(found.costs[position]) < 1e-6 for position in (0, 1, 3))
    assert 2 in found.kept
    assert len(found.kept) == 2
    assert (found.all_swapped is None) != restore
    fragment = tmp_path / "s" / FRAGMENT
    assert yaml.safe_load(fragment.read_text()) == {"convert": {"keep_softmax": list(found.kept)}}
    assert load_recipe(str(fragment)).convert.keep_softmax == found.kept
    assert (tmp_path / "s" / CHART).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_where_it_stopped(teacher, tmp_path, monkeypatch):
    whole = select(teacher, tmp_path / "whole", count=1, **SMALL)
    lines = (tmp_path / "whole" / SCORES).read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / SCORES).write_text("\n".join(lines[:4]) + '\n{"window": 0, "la')
    measured = []
    monkeypatch.setattr("swapattn.selection._kl", lambda *a: measured.append(1) or 0.5)
    again = select(teacher, tmp_path / "cut", count=1, **SMALL)
    assert len(measured) == 8 - 3
    assert [json.loads(line) for line in (tmp_path / "cut" / SCORES).read_text().splitlines()[:4]] == [
        json.loads(line) for line in lines[:4]
    ]
    assert again.costs != whole.costs
    header = json.loads(lines[0])
    del header["recipe"]["convert"]["decay"]["signed"]  # as a version wrote it that did not know the key
    (tmp_path / "whole" / SCORES).write_text("\n".join([json.dumps(header), *lines[1:], ""]))
    select(teacher, tmp_path / "whole", count=1, **SMALL)
    assert len(measured) == 8 - 3
    with pytest.raises(UsageError, match="other settings"):
        select(teacher, tmp_path / "whole", count=1, **{**SMALL, "length": 32})
    select(teacher, tmp_path / "whole", count=1, overwrite=True, **{**SMALL, "length": 32})


def test_measurements_of_another_text_are_not_taken_for_those_of_this_one(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = convert(teacher, tmp_path / "c", recipe="smoke", overrides=SET).path
    small = {**SMALL, "overrides": [*SET, "distill.text=a.txt"], "count": 1}
    sentences = "Call me Ishmael.", "Some years ago,", "never mind how long precisely,", "having little money"
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"{sentence} " * 20 for sentence in sentences))
    first = select(checkpoint, tmp_path / "s", **small)
    assert select(checkpoint, tmp_path / "s", **small).costs == first.costs
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"{sentence[::-1]} " * 20 for sentence in sentences))
    capsys.readouterr()
    second = select(checkpoint, tmp_path / "s", **small)
    assert "8 on other text are dropped" in capsys.readouterr().err
    assert second.costs != first.costs
    assert second.costs == select(checkpoint, tmp_path / "fresh", **small).costs
    reseeded = select(checkpoint, tmp_path / "s", **{**small, "overrides": [*small["overrides"], "distill.seed=5"]})
    assert reseeded.costs != second.costs


def test_a_checkpoint_is_ranked_beside_what_it_keeps(teacher, tmp_path):
    convert(teacher, tmp_path / "c", recipe="smoke", overrides=[*SET, "convert.keep_softmax=[-1, 3]"])
    found = select(tmp_path / "c", tmp_path / "s", share=0.5, **SMALL)
    assert set(found.costs) == {0, 1, 2}
    assert found.kept == (2, 3)
    with pytest.raises(UsageError, match="nothing is left to rank"):
        select(tmp_path / "c", tmp_path / "t", count=1, **SMALL)
    near = {**SMALL, "overrides": ["convert.local={window: 60, sinks: 4, mix: joint}", *SET[1:]]}
    with pytest.raises(UsageError, match="windows of 48 tokens of text lie within the softmax window and sinks of 64"):
        select(teacher, tmp_path / "u", **near)
    with pytest.raises(UsageError, match=r"convert\.local\.window=7: .*c is converted already, otherwise; rank the"):
        select(tmp_path / "c", tmp_path / "t", **{**SMALL, "overrides": ["convert.local.window=7"]})


def test_of_questions_only_the_answers_count(teacher, tmp_path, monkeypatch):
    ids = torch.randint(100, (2, 60), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"recall": [Document(ids[0], [30, 59], [])], "passkey": [Document(ids[1], [59], [])]}
    for kind, documents in asked.items():
        monkeypatch.setattr(f"swapattn.selection.{kind}_documents", lambda *_, found=documents: found)
    counted = []
    measure = selection._kl
    monkeypatch.setattr("swapattn.selection._kl", lambda x, y: counted.append(len(x)) or measure(x, y))
    found = select(teacher, tmp_path / "s", count=1, on=["recall"], **SMALL)
    assert counted == [2] * 4 + [1] * 4
    assert (found.kept, found.tokens, found.on) == ((2,), 3, ("recall",))
    assert found.costs[2] > 1e-3
    counted.clear()
    both = select(teacher, tmp_path / "s", count=1, on=["recall", "text"], **SMALL)
    assert counted == [48] * 8  # the answers are known
    assert both.on == ("text", "recall")
    assert sum(both.costs.values()) == pytest.approx(1)
    assert "mean share (99 tokens of text and recall)" in both.to_table()


def test_the_command_takes_several_kinds(monkeypatch):
    asked = []
    monkeypatch.setattr(selection, "select", lambda *_, **options: asked.append(options["on"]) or 1 / 0)
    for words in ([], ["--on", "recall"], ["--on", "text", "--on", "recall"]):
        assert CliRunner().invoke(main, ["select", "x", *words]).exit_code == 1
    assert asked == [("text",), ("recall",), ("text", "recall")]


def test_shares_keep_the_order_of_costs_below_zero():
    """A layer that does harm when restored costs less than nothing."""
    harmful = {0: -0.02, 1: -0.01, 2: 0.02}
    shares = selection._mean_share([harmful, {0: 0.0, 1: 0.0, 2: 0.0}])
    assert sorted(shares, key=shares.__getitem__) == [0, 1, 2]
    assert shares[2] == pytest.approx(0.5)


@pytest.mark.parametrize("on", [(), ["recal"], "text"])
def test_an_unknown_kind_of_text_is_refused_before_a_model_is_loaded(on):
    with pytest.raises(UsageError, match="expected one or more of text, recall"):
        select("no such model", on=on)


def test_a_file_in_the_place_of_the_folder_is_named_before_a_model_is_loaded(tmp_path):
    (tmp_path / "s").write_text("mine")
    for output in (tmp_path / "s", tmp_path / "s" / "deeper"):
        with pytest.raises(UsageError, match=f"^{tmp_path / 's'} is no folder"):
            select("no such model", output)


def test_a_refused_question_drops_no_measurements(teacher, tmp_path):
    select(teacher, tmp_path / "s", count=1, **SMALL)
    before = (tmp_path / "s" / SCORES).read_text()
    with pytest.raises(UsageError, match="no recall probe"):
        select(teacher, tmp_path / "s", count=1, on=["recall"], overwrite=True, **{**SMALL, "length": 40})
    assert (tmp_path / "s" / SCORES).read_text() == before


@pytest.mark.parametrize("changed", [{"count": 4}, {"count": 9}, {"length": 32}])
def test_what_is_refused_is_refused_before_calibration(teacher, tmp_path, monkeypatch, changed):
    (tmp_path / SCORES).write_text('{"version": 3}\n')
    monkeypatch.setattr(selection, "calibrate_stage", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(UsageError, match=r"cannot be chosen|are to be kept|other settings"):
        select(teacher, tmp_path, **{**SMALL, **changed})


def test_a_tokenizer_without_words_is_asked_nothing(teacher, tmp_path):
    with pytest.raises(UsageError, match="--on recall: no recall probe: the tokenizer has too few words"):
        select(teacher, tmp_path / "s", count=1, on=["recall"], **SMALL)


def test_the_command_compares_ways_to_choose(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_quiet_libraries", lambda: None)
    monkeypatch.setattr("swapattn.selection.HELDOUT", (2, 64))
    words = ["select", str(teacher), "-o", str(tmp_path / "s"), "--count", "2", "--tokens", "48", "--length", "48"]
    words += [word for setting in SET for word in ("--set", setting)]
    result = CliRunner().invoke(main, [*words, "--compare", "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    rows = {row["name"]: row for row in data["compared"]}
    assert list(rows) == ["none", "uniform", "first and last, uniform", "ranked", "teacher"]
    assert rows["uniform"]["kept"] == [1, 3]
    assert rows["first and last, uniform"]["kept"] == [0, 3]
    assert rows["ranked"]["kept"] == data["kept"]
    assert rows["ranked"]["kl"] < rows["none"]["kl"]
    assert rows["teacher"]["kl"] == 0
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert CliRunner().invoke(main, [*words, "--share", "0.5"]).exit_code == 2
