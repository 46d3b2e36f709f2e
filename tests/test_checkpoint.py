"""Folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swapattn.checkpoint import RECORD, RECORD_VERSION, atomic_folder, check_target, find, new_record, read, write_json
from swapattn.errors import CheckpointError, UsageError
from swapattn.recipe import load_recipe


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_checkpoint(folder, *, kind="converted", **changes):
    folder.mkdir(parents=True)
    record = new_record(kind, "tiny", load_recipe("smoke"), {"path": "/somewhere", "note": "4-bit GGUF"})
    write_json(folder / RECORD, record | changes)
    return folder


def test_a_folder_takes_its_name_when_everything_is_written(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (target / "a").read_text() == "1"


def earlier(target):
    """A checkpoint folder that an earlier command wrote."""
    target.mkdir()
    (target / RECORD).write_text("{}")
    (target / "a").write_text("old")


def test_an_existing_folder_is_an_error_without_overwrite(tmp_path):
    earlier(tmp_path / "out")
    with pytest.raises(UsageError, match="exists: use --overwrite"), atomic_folder(tmp_path / "out"):
        pass
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "b").write_text("new")
        assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["b"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_writer_leaves_nothing_and_keeps_the_old_folder(tmp_path, error, existing):
    target = tmp_path / "out"
    if existing:
        earlier(target)

    def write():
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "b").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or (target / "a").read_text() == "old"


def test_an_interrupt_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    earlier(target)
    rename = Path.rename

    def interrupted(self, other):
        if self.name == ".out.writing":
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert (target / "a").read_text() == "old"


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    earlier(tmp_path / "photos" / "a-swapattn")
    with (
        pytest.raises(UsageError, match="not written by this command"),
        atomic_folder(tmp_path / "photos", overwrite=True),
    ):
        pass
    assert names(tmp_path / "photos") == ["a-swapattn", "a.jpg"]


def test_the_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for text in ("1", "2"):
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / RECORD).write_text("{}")
            (folder / "a").write_text(text)
    assert names(tmp_path) == ["disk", "out"]
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "2"


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="current directory"), atomic_folder(Path(), overwrite=True):
        pass


def test_a_place_without_the_rights_to_write_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"^{tmp_path} cannot be written: choose another place"):
        check_target(tmp_path / "deep" / "out")
    assert names(tmp_path) == []


def test_what_killed_processes_left_is_cleaned(tmp_path):
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "stale").write_text("x")
    with atomic_folder(tmp_path / "out") as folder:
        assert names(folder) == ["lock"]
    assert names(tmp_path) == ["out"]


def test_a_second_process_leaves_the_first_ones_work_alone(tmp_path):
    program = (
        "from swapattn.checkpoint import atomic_folder, Path\nimport sys\nwith atomic_folder(Path(sys.argv[1])): pass"
    )
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        command = [sys.executable, "-c", program, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "UsageError: another process is at work in" in done.stderr
    assert names(tmp_path / "out") == ["mine"]


def test_a_folder_that_a_killed_process_had_moved_away_is_not_lost(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    with pytest.raises(UsageError, match="exists"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_json_is_whole_or_as_before(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_record_says_what_it_was_made_with(tmp_path):
    found = read(write_checkpoint(tmp_path / "c"))
    assert (found.kind, found.name, found.teacher_note) == ("converted", "tiny", "4-bit GGUF")
    assert found.teacher_path == Path("/somewhere")
    assert found.recipe == load_recipe("smoke")
    assert {"swapattn", "torch", "transformers", "python"} <= set(found.record["versions"])


def test_the_newest_is_by_the_records_time_not_the_files(tmp_path):
    write_checkpoint(tmp_path / "b")
    time.sleep(0.001)
    newest = write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "old", time="2020-01-01T00:00:00+00:00")
    write_checkpoint(tmp_path / ".hidden.writing", time="2999-01-01T00:00:00+00:00")
    assert find(tmp_path).path == newest
    time.sleep(0.001)
    distilled = write_checkpoint(tmp_path / "d", kind="distilled")
    assert find(tmp_path).path == distilled
    assert find(tmp_path, kind="converted").path == newest
    assert find(tmp_path, distilled, kind="converted").path == distilled


def test_a_damaged_record_is_passed_over_unless_it_is_named(tmp_path):
    good = write_checkpoint(tmp_path / "good")
    bad = write_checkpoint(tmp_path / "bad")
    (bad / RECORD).write_text('{"kind": "conv')
    assert find(tmp_path).path == good
    with pytest.raises(CheckpointError, match="damaged"):
        find(tmp_path, bad)


def test_records_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no swapattn checkpoint.*swapattn convert"):
        read(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="update swapattn"):
        read(write_checkpoint(tmp_path / "newer", version=RECORD_VERSION + 1))
    incomplete = write_checkpoint(tmp_path / "incomplete")
    (incomplete / RECORD).write_text('{"version": 1, "kind": "converted"}')
    with pytest.raises(CheckpointError, match="no name, time, teacher, recipe"):
        read(incomplete)
    (incomplete / RECORD).write_text("3")
    with pytest.raises(CheckpointError, match="damaged"):
        read(incomplete)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint in"):
        find(tmp_path)
    write_checkpoint(tmp_path / "d", kind="distilled")
    with pytest.raises(UsageError, match="no converted checkpoint in"):
        find(tmp_path, kind="converted")
