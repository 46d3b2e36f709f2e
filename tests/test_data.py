"""Documents from every source, packing into windows, the held-out part."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import re
import sys
import types
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import zstandard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from swapattn import data
from swapattn.data import PackedTokens, borders, boundaries, documents, heldout_windows
from swapattn.errors import SourceError, UsageError
from swapattn.text import TextMixture, TextSpec

EMBEDDED = TextSpec(embedded=True)


def spec(*patterns: object, column: str = "text") -> TextSpec:
    return TextSpec(files=tuple(str(pattern) for pattern in patterns), column=column)


def write(path: Path, content: bytes | str) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def parquet_bytes(rows: list[dict]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


ASSETS = files("swapattn") / "assets"


def embedded_bytes(part: str) -> bytes:
    packed = (ASSETS / f"{part}.txt.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


def embedded_documents(part: str) -> list[str]:
    return embedded_bytes(part).decode("utf-8").rstrip("\n").split("\n\n\n")


class TestEmbedded:
    def test_the_two_parts_are_under_3_mb_and_share_nothing(self):
        train, heldout = embedded_documents("train"), embedded_documents("heldout")
        assert len(embedded_bytes("train")) > 2_000_000
        assert 150_000 < len(embedded_bytes("heldout")) < 250_000
        assert len(embedded_bytes("train")) + len(embedded_bytes("heldout")) <= 3_000_000

        def paragraphs(docs):
            return {p for d in docs for p in d.split("\n\n") if len(p) > 80}

        assert not paragraphs(train) & paragraphs(heldout)

    def test_a_pass_gives_every_paragraph_once(self):
        given = "\n\n".join(documents(EMBEDDED))
        expected = "\n\n".join(embedded_documents("train"))
        assert sorted(given.split("\n\n")) == sorted(expected.split("\n\n"))

    def test_no_piece_runs_over_the_end_of_a_document(self):
        whole = embedded_documents("train")
        for piece in itertools.islice(documents(EMBEDDED), 20):
            assert sum(piece in document for document in whole) == 1

    @pytest.mark.parametrize("part", ["train", "heldout"])
    def test_the_readme_carries_size_and_checksum(self, part):
        content = embedded_bytes(part)
        row = f"| `{part}.txt.zst` | {len(content):,} | {len(embedded_documents(part))} | "
        assert f"{row}`{hashlib.sha256(content).hexdigest()}` |" in (ASSETS / "README.md").read_text(encoding="utf-8")


class TestOrder:
    def test_the_same_seed_gives_the_same_order_and_another_seed_another(self):
        first, again, other = (list(documents(EMBEDDED, seed=seed)) for seed in (1, 1, 2))
        assert first == again
        assert first != other
        assert sorted(first) == sorted(other)

    def test_files_mix(self, tmp_path):
        for name in "ab":
            write(tmp_path / f"{name}.jsonl", "\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(3000)))
        names = "".join(d[0] for d in documents(spec(tmp_path / "*.jsonl")))
        assert 300 < names[:1000].count("a") < 700

    def test_more_documents_than_the_buffer_holds_all_come_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "SHUFFLE_BUFFER", 10)
        monkeypatch.setattr(data, "OPEN_FILES", 2)
        for name in "abcde":
            write(tmp_path / f"{name}.jsonl", "\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(30)))
        given = list(documents(spec(tmp_path / "*.jsonl")))
        assert sorted(given) == sorted(f"{name}{i}" for name in "abcde" for i in range(30))


class TestTextFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
    def test_two_empty_lines_end_a_document(self, tmp_path, name):
        file = write(tmp_path / name, "one\n\nstill one\n\n\ntwo\nlines\n\n\n\n\nthree")
        assert sorted(documents(spec(file))) == ["one\n\nstill one", "three", "two\nlines"]

    def test_paragraphs_are_gathered_up_to_the_size_of_a_piece(self, tmp_path):
        file = write(tmp_path / "a.txt", "\n\n".join(f"{i:04d}" + "x" * 96 for i in range(50)))
        pieces = sorted(documents(spec(file), piece=500))
        assert len(pieces) == 10
        assert all(piece.count("\n\n") == 4 for piece in pieces)

    def test_a_file_without_empty_lines_is_cut_all_the_same(self, tmp_path):
        file = write(tmp_path / "a.txt", "some words\n" * 1000)
        pieces = list(documents(spec(file), piece=200))
        assert max(map(len, pieces)) < 900
        assert sum(piece.count("some words") for piece in pieces) == 1000

    def test_windows_line_ends_and_blank_lines_with_spaces(self, tmp_path):
        file = write(tmp_path / "a.txt", "one\r\n \r\n\r\ntwo\r\n")
        assert sorted(documents(spec(file))) == ["one", "two"]

    def test_text_that_is_not_utf8_names_the_file(self, tmp_path):
        file = write(tmp_path / "a.txt", b"caf\xe9 au lait")
        with pytest.raises(SourceError, match=re.escape(f"{file} is not UTF-8")):
            list(documents(spec(file)))

    def test_a_damaged_zst_names_the_file(self, tmp_path):
        file = tmp_path / "a.txt.zst"
        file.write_bytes(b"no zstd at all")
        with pytest.raises(SourceError, match=re.escape(f"{file} cannot be read")):
            list(documents(spec(file)))

    def test_a_zst_that_was_cut_is_not_taken_for_a_shorter_text(self, tmp_path):
        file = write(tmp_path / "a.txt.zst", "".join(f"line {n * n}\n\n\n" for n in range(20_000)))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(SourceError, match=re.escape(f"{file} cannot be read: Truncated")):
            list(documents(spec(file)))

    def test_frames_follow_each_other(self, tmp_path):
        file = tmp_path / "a.txt.zst"
        file.write_bytes(zstandard.compress(b"one\n\n\n") + zstandard.compress(b"two\n"))
        assert sorted(documents(spec(file))) == ["one", "two"]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path, name):
        text = "x" if name == "a.txt" else '{"text": "x"}'
        assert list(documents(spec(write(tmp_path / name, f"\ufeff{text}\n")))) == ["x"]


class TestRows:
    ROWS = [{"text": "first", "body": "1"}, {"text": "", "body": "2"}, {"text": "third", "body": "3"}]  # noqa: RUF012

    def file(self, tmp_path, name):
        lines = "\n".join(json.dumps(row) for row in self.ROWS)
        return write(tmp_path / name, parquet_bytes(self.ROWS) if ".parquet" in name else lines)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.parquet.zst"])
    def test_every_row_is_a_document_and_empty_ones_are_left_out(self, tmp_path, name):
        file = self.file(tmp_path, name)
        assert sorted(documents(spec(file))) == ["first", "third"]
        assert sorted(documents(spec(file, column="body"))) == ["1", "2", "3"]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    def test_a_missing_column_names_those_that_are_there(self, tmp_path, name):
        file = self.file(tmp_path, name)
        with pytest.raises(UsageError, match=r"no column 'content', there are: text, body") as caught:
            list(documents(spec(file, column="content")))
        assert str(file) in str(caught.value)

    def test_a_line_that_is_not_json_is_named(self, tmp_path):
        file = write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 16 + "oops\n")
        with pytest.raises(SourceError, match=re.escape(f"{file}: line 17 is not JSON")):
            list(documents(spec(file)))

    @pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "depth"])
    def test_a_line_that_python_does_not_read_is_named(self, tmp_path, value):
        file = write(tmp_path / "a.jsonl", f'{{"text": "x", "id": {value}}}\n')
        with pytest.raises(SourceError, match=re.escape(f"{file}: line 1 is not JSON: ")):
            list(documents(spec(file)))

    def test_a_line_that_is_no_object_is_named(self, tmp_path):
        file = write(tmp_path / "a.jsonl", '\n["text"]\n')
        with pytest.raises(SourceError, match="line 2 is not a JSON object"):
            list(documents(spec(file)))

    def test_a_column_that_holds_no_text_is_named(self, tmp_path):
        file = write(tmp_path / "a.jsonl", '{"text": 3}\n')
        with pytest.raises(UsageError, match="column 'text' holds int, not text"):
            list(documents(spec(file)))

    def test_half_of_a_surrogate_pair_becomes_a_question_mark(self, tmp_path):
        file = write(tmp_path / "a.jsonl", json.dumps({"text": "hello \ud83d world"}) + "\n")
        assert list(documents(spec(file))) == ["hello ? world"]

    def test_a_damaged_parquet_names_the_file(self, tmp_path):
        file = write(tmp_path / "a.parquet", "PAR1 this is not it PAR1")
        with pytest.raises(SourceError, match=re.escape(f"{file} cannot be read")):
            list(documents(spec(file)))


class TestWhatIsAskedFor:
    def test_no_file_matches(self, tmp_path):
        with pytest.raises(UsageError, match=re.escape(f"no file matches {tmp_path}/*.txt")):
            documents(spec(tmp_path / "*.txt"))

    def test_a_file_is_itself_whatever_its_name_would_match(self, tmp_path):
        (tmp_path / "part [1]").mkdir()
        file = write(tmp_path / "part [1]" / "a*.txt", "mine")
        write(tmp_path / "part [1]" / "ab.txt", "another")
        assert list(documents(spec(file))) == ["mine"]

    @pytest.mark.parametrize("name", ["a.csv", "a.zst", "a"])
    def test_an_unknown_kind_of_file(self, tmp_path, name):
        write(tmp_path / name, "x")
        with pytest.raises(UsageError, match=re.escape("there are: .txt, .jsonl, .parquet, plain or .zst")):
            documents(spec(tmp_path / name))

    def test_a_file_that_two_patterns_match_is_read_once(self, tmp_path):
        file = write(tmp_path / "a.txt", "once")
        assert list(documents(spec(file, tmp_path / "*.txt"))) == ["once"]


class FakeRows:
    """What `datasets.load_dataset(..., streaming=True)` returns, as far as it is used."""

    def __init__(self, rows):
        self.rows = rows
        self.seeds: list[int] = []

    def shuffle(self, seed, buffer_size):
        self.seeds.append(seed)
        return self

    def iter(self, batch_size):
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield {key: [value] for key, value in row.items()}


class TestHub:
    @pytest.fixture(autouse=True)
    def _reachable(self, monkeypatch):
        monkeypatch.setattr(data, "hub_reachable", lambda: True)

    def serve(self, monkeypatch, answer):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return calls

    def test_the_dataset_is_streamed_and_shuffled(self, monkeypatch):
        rows = FakeRows([{"body": "a"}, {"body": None}, {"body": "b"}])
        calls = self.serve(monkeypatch, rows)
        text = TextSpec(hub="some/set", config="small", split="validation", column="body")
        assert list(documents(text, seed=5)) == ["a", "b"]
        assert calls == [(("some/set", "small"), {"split": "validation", "streaming": True})]
        assert rows.seeds == [5]

    def test_a_missing_column(self, monkeypatch):
        self.serve(monkeypatch, FakeRows([{"body": "a"}]))
        with pytest.raises(UsageError, match="hub dataset some/set: no column 'text', there are: body"):
            list(documents(TextSpec(hub="some/set")))

    @pytest.mark.parametrize("while_reading", [False, True])
    def test_a_failure_is_one_line_with_the_ways_out(self, monkeypatch, while_reading):
        failure = ConnectionError("no\nroute")
        self.serve(monkeypatch, FakeRows([{"text": "a"}, failure]) if while_reading else failure)
        with pytest.raises(SourceError, match=r"hub dataset some/set .*ConnectionError: no route.*--set distill.text="):
            list(documents(TextSpec(hub="some/set")))

    def test_without_a_hub_it_is_not_even_tried(self, monkeypatch):
        monkeypatch.setattr(data, "hub_reachable", lambda: False)
        calls = self.serve(monkeypatch, FakeRows([]))
        with pytest.raises(SourceError, match="the hub cannot be reached"):
            documents(TextSpec(hub="some/set"))
        assert not calls

    @pytest.mark.parametrize("workers", [1, 2])
    def test_processes_that_tokenise_see_what_one_would(self, tiny_tokenizer, tmp_path, workers):
        (tmp_path / "rows").mkdir()
        write(tmp_path / "rows" / "a.jsonl", "".join(f'{{"text": "document {i}"}}\n' for i in range(50)))
        packed = PackedTokens(TextSpec(hub=str(tmp_path / "rows")), tiny_tokenizer, 16)
        loader = DataLoader(packed, batch_size=None, num_workers=workers)
        expected = [window["input_ids"] for window in itertools.islice(packed, 8)]
        given = [window["input_ids"] for window in itertools.islice(loader, 8)]
        assert torch.equal(torch.stack(given), torch.stack(expected))


class TestPacking:
    def windows(self, tokenizer, count, text=EMBEDDED, **settings):
        packed = PackedTokens(text, tokenizer, 64, **settings)
        return torch.stack([window["input_ids"] for window in itertools.islice(packed, count)])

    def test_windows_are_the_documents_one_after_the_other(self, tiny_tokenizer, tmp_path):
        file = write(tmp_path / "a.jsonl", json.dumps({"text": "Call me Ishmael. " * 40}))
        document = [*tiny_tokenizer("Call me Ishmael. " * 40)["input_ids"], tiny_tokenizer.eos_token_id]
        endless = torch.tensor(list(itertools.islice(itertools.cycle(document), 64 * 50)))
        windows = self.windows(tiny_tokenizer, 50, spec(file))
        assert windows.dtype == torch.long
        assert torch.equal(windows.flatten(), endless)

    def test_documents_and_windows_begin_as_the_tokenizer_begins_a_text(self, opening_tokenizer, tmp_path):
        """Nothing is lost or doubled, also where a text brings the token itself."""
        lengths = (150, 62, 63, 30)
        rows = [("<pad>" if size == 30 else "") + "x" * size for size in lengths]
        text = spec(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows)))
        x = opening_tokenizer("x")["input_ids"]
        assert x[0] == 1
        packed = PackedTokens(text, opening_tokenizer, 64, document_mask=True)
        whole, windows = [], list(itertools.islice(packed, 60))
        for window in windows:
            ids, positions = window["input_ids"].tolist(), window["position_ids"].tolist()
            assert ids[0] == 1
            assert len(ids) == 64
            assert all(ids[i] == 1 for i, position in enumerate(positions) if position == 0)
            fresh = not whole or whole[-1] == opening_tokenizer.eos_token_id
            whole += ids if fresh else ids[1:]
        read = opening_tokenizer.decode(whole).split("<eos>")[:-1]
        assert {len(document.removeprefix("<pad>")) for document in read} == set(lengths)
        assert all(document.count("<pad>") == 1 for document in read)
        plain = PackedTokens(text, opening_tokenizer, 64, skip=7)
        assert torch.equal(next(iter(plain))["input_ids"], windows[7]["input_ids"])

    def test_documents_begin_with_a_token_for_that_and_then_have_none_behind(self, tiny_tokenizer, tmp_path):
        """Where the tokenizer has one, but does not put it there; windows do not begin with it."""
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.bos_token = "<pad>"
        rows = ["x" * 150, "<pad>" + "x" * 70]
        text = spec(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows)))
        packed = PackedTokens(text, tokenizer, 64, document_mask=True)
        windows = list(itertools.islice(packed, 60))
        read = tokenizer.decode(torch.cat([window["input_ids"] for window in windows]))
        assert "<eos>" not in read
        assert {len(document) for document in read.split("<pad>")[1:-1]} == {150, 70}
        assert sum(int(window["input_ids"][0]) == 1 for window in windows) < 20
        for window in windows:
            begins = (window["input_ids"] == 1).nonzero().flatten().tolist()
            assert all(int(window["position_ids"][i]) == 0 for i in begins if i >= data.SHORTEST)
        tokenizer.bos_token = tokenizer.eos_token
        assert borders(tokenizer) == ([], [0])

    def test_it_is_deterministic_and_the_seed_counts(self, tiny_tokenizer):
        first = self.windows(tiny_tokenizer, 30, seed=3)
        assert torch.equal(first, self.windows(tiny_tokenizer, 30, seed=3))
        assert not torch.equal(first, self.windows(tiny_tokenizer, 30, seed=4))

    def test_skip_resumes_where_it_stopped(self, tiny_tokenizer):
        whole = self.windows(tiny_tokenizer, 40)
        assert torch.equal(self.windows(tiny_tokenizer, 15, skip=25), whole[25:])

    def test_another_epoch_has_another_order(self, tiny_tokenizer, tmp_path):
        lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
        file = write(tmp_path / "a.jsonl", "\n".join(lines))
        per_epoch = sum(len(tiny_tokenizer(json.loads(line)["text"])["input_ids"]) + 1 for line in lines)
        tokens = self.windows(tiny_tokenizer, 3 * per_epoch // 64, spec(file)).flatten()
        first, second = tokens[:per_epoch], tokens[per_epoch : 2 * per_epoch]
        assert torch.equal(first.sort().values, second.sort().values)
        assert not torch.equal(first, second)

    def test_workers_share_the_windows(self, tiny_tokenizer):
        loader = DataLoader(PackedTokens(EMBEDDED, tiny_tokenizer, 64, skip=4), batch_size=None, num_workers=2)
        given = [window["input_ids"] for window in itertools.islice(loader, 10)]
        assert torch.equal(torch.stack(given), self.windows(tiny_tokenizer, 10, skip=4))

    def test_text_without_a_word_is_an_error_not_an_endless_loop(self, tiny_tokenizer, tmp_path):
        file = write(tmp_path / "a.txt", "\n \n\n")
        with pytest.raises(SourceError, match="has no words"):
            self.windows(tiny_tokenizer, 1, spec(file))


class TestDocumentMask:
    def windows(self, tokenizer, text, count, length=64, **settings):
        packed = PackedTokens(text, tokenizer, length, document_mask=True, **settings)
        return list(itertools.islice(packed, count))

    def test_positions_begin_again_with_each_document_and_each_window(self, tiny_tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "SHORTEST", 8)
        lines = [json.dumps({"text": "x" * size}) for size in (9, 20, 100, 37)]
        text = spec(write(tmp_path / "a.jsonl", "\n".join(lines)))
        windows = self.windows(tiny_tokenizer, text, 40)
        plain = PackedTokens(text, tiny_tokenizer, 64)
        ends = 0
        for window, expected in zip(windows, plain, strict=False):
            assert torch.equal(window["input_ids"], expected["input_ids"])
            assert list(expected) == ["input_ids"]
            after_end = F.pad(window["input_ids"][:-1] == tiny_tokenizer.eos_token_id, (1, 0), value=True)
            since, wanted = 0, []
            for index, fresh in enumerate(after_end.tolist()):
                since = index if fresh and index - since >= 8 else since
                wanted.append(index - since)
            assert window["position_ids"].tolist() == wanted
            ends += wanted.count(0) - 1
        assert ends > 30

    def test_a_document_after_a_short_one_runs_on(self, tiny_tokenizer, tmp_path):
        text = spec(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "y" * 9}) for _ in range(50))))
        for window in self.windows(tiny_tokenizer, text, 5, length=256):
            starts = (window["position_ids"] == 0).nonzero().flatten()
            assert starts.numel() == 4
            assert int(starts.diff().min()) >= data.SHORTEST

    def test_boundaries_have_one_shape_whatever_the_documents(self):
        one, many = torch.arange(256), torch.arange(256) % 64
        found = [boundaries(torch.stack(rows)) for rows in ((one, one), (many, one), (many, many))]
        assert [x.tolist() for x in found] == [
            [0, 256, 512, 512, 512, 512, 512, 512, 512],
            [0, 64, 128, 192, 256, 512, 512, 512, 512],
            [0, 64, 128, 192, 256, 320, 384, 448, 512],
        ]


class TestMixtures:
    def text(self, tmp_path, **weights):
        """Sources `a`, `b`, ... of other lengths of documents; every one is short of what is asked for."""
        for index, name in enumerate(weights):
            lines = [json.dumps({"text": name * (30 + 150 * index)}) for _ in range(20)]
            write(tmp_path / f"{name}.jsonl", "\n".join(lines))
        sources = [{"files": [str(tmp_path / f"{name}.jsonl")], "weight": value} for name, value in weights.items()]
        return TextMixture.model_validate(sources)

    def test_sources_mix_by_their_tokens_and_begin_again(self, tiny_tokenizer, tmp_path):
        text = self.text(tmp_path, a=1, b=2, c=5)
        stream = PackedTokens(text, tiny_tokenizer, 64)
        tokens = torch.cat([window["input_ids"] for window in itertools.islice(stream, 400)])
        letters = tiny_tokenizer.decode(tokens).replace("<eos>", "")
        assert len(letters) > 20 * (30 + 180 + 330), "no source had to begin again"
        for part in (letters[:4000], letters):
            for name, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
                assert part.count(name) / len(part) == pytest.approx(share, abs=330 / len(part) + 0.02)

    def test_a_mixture_of_one_is_that_text(self, tiny_tokenizer):
        alone, mixed = (PackedTokens(text, tiny_tokenizer, 64) for text in (EMBEDDED, TextMixture(("embedded",))))
        for one, other in itertools.islice(zip(alone, mixed, strict=False), 20):
            assert torch.equal(one["input_ids"], other["input_ids"])

    def test_a_source_without_a_word_is_named(self, tiny_tokenizer, tmp_path):
        text = TextMixture.model_validate(["embedded", str(write(tmp_path / "empty.txt", "\n"))])
        with pytest.raises(SourceError, match=r"the text .*empty\.txt has no words"):
            list(itertools.islice(PackedTokens(text, tiny_tokenizer, 64), 50))

    def test_workers_and_skip_give_the_same_windows(self, tiny_tokenizer, tmp_path):
        settings = {"text": self.text(tmp_path, a=1, b=3), "tokenizer": tiny_tokenizer, "length": 128, "seed": 4}
        whole = list(itertools.islice(PackedTokens(**settings, document_mask=True), 30))
        packed = PackedTokens(**settings, skip=7, document_mask=True)
        given = list(itertools.islice(DataLoader(packed, batch_size=None, num_workers=2), 20))
        for window, expected in zip(given, whole[7:27], strict=True):
            assert torch.equal(window["input_ids"], expected["input_ids"])
            assert torch.equal(window["position_ids"], expected["position_ids"])
        assert any((window["position_ids"][1:] == 0).any() for window in given)

    def test_how_it_is_told(self):
        text = TextMixture.model_validate([{"hub": "some/set", "config": "small", "weight": 3}, "samples.jsonl"])
        assert text.describe() == "0.75 hub:some/set/small + 0.25 samples.jsonl"


class TestHeldout:
    def test_windows_follow_each_other_without_special_tokens(self, tiny_tokenizer):
        text = "It is a truth universally acknowledged. " * 30
        tokens = tiny_tokenizer(text)["input_ids"]
        windows = heldout_windows(tiny_tokenizer, length=32, text=text)
        assert windows.shape == (len(tokens) // 32, 32)
        assert windows.flatten().tolist() == tokens[: windows.numel()]

    def test_windows_begin_as_the_tokenizer_begins_a_text(self, opening_tokenizer):
        text = "It is a truth universally acknowledged. " * 30
        tokens = opening_tokenizer(text)["input_ids"][1:]
        windows = heldout_windows(opening_tokenizer, length=32, text=text)
        assert windows.shape == (len(tokens) // 31, 32)
        assert (windows[:, 0] == 1).all()
        assert windows[:, 1:].flatten().tolist() == tokens[: len(tokens) // 31 * 31]

    def test_a_smaller_number_is_spread_over_the_text(self, tiny_tokenizer):
        text = "".join(f"{i:05d}" for i in range(1000))
        everything = heldout_windows(tiny_tokenizer, length=32, text=text)
        some = heldout_windows(tiny_tokenizer, length=32, count=5, text=text)
        assert some.shape == (5, 32)
        assert len(everything) > 10
        assert torch.equal(some, everything[[i * len(everything) // 5 for i in range(5)]])

    def test_the_embedded_part_is_the_default(self, tiny_tokenizer):
        windows = heldout_windows(tiny_tokenizer, length=256)
        assert len(windows) > 100
        assert tiny_tokenizer.decode(windows[0])[:200] in embedded_documents("heldout")[0]

    def test_too_short_a_text(self, tiny_tokenizer):
        with pytest.raises(UsageError, match="less than one window of 512"):
            heldout_windows(tiny_tokenizer, text="short")
