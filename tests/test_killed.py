"""`convert` killed by SIGKILL at any of its file operations, and what a second run makes of what is left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swapattn.checkpoint import read
from swapattn.conversion import convert
from swapattn.errors import SwapattnError
from swapattn.loading import load

# One process imports once and forks a child for each moment: the child kills itself just before the n-th event.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from swapattn.conversion import convert
import swapattn.modeling, swapattn.shards, swapattn.surgery

teacher, work, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "overwrite"
step = 1 if overwrite else 2  # neighbouring events are mostly two halves of one operation
EVENTS = {"os.rename", "shutil.rmtree"}  # all that touches the old checkpoint
if not overwrite:
    EVENTS |= {"os.mkdir", "os.link", "os.remove", "shutil.copyfile", "open"}

def child(folder, recipe, moment, overrides=()):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = [moment]
    def hook(event, args):
        if event not in EVENTS or not any(str(path).startswith(str(folder)) for path in args[:2]):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    code = 1
    try:
        convert(teacher, folder / "out", recipe=recipe, overrides=overrides, overwrite=overwrite)
        code = 0
    finally:
        os._exit(code)

found, moment = {}, 1 - step
while True:
    moment += step
    folder = work / str(moment)
    folder.mkdir()
    if overwrite and child(folder, "smoke", 0, ["convert.local=null"]):
        sys.exit("the first conversion failed")
    code = child(folder, "smoke", moment)
    found[moment] = code
    if code == 0:
        break
print(json.dumps(found))
"""


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def moments(teacher, work, mode, least):
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(teacher), str(work), mode], capture_output=True, text=True, check=True
    )
    codes = {int(moment): code for moment, code in json.loads(answer.stdout.splitlines()[-1]).items()}
    *killed, (_, last) = codes.items()
    assert last == 0
    assert {code for _, code in killed} == {-9}
    assert len(killed) >= least, "too few moments to say anything"
    return [work / str(moment) for moment, _ in killed]


def assert_dead_or_whole(folder, whole):
    """Nothing loads that is not a whole checkpoint under its final name, or was just about to get it."""
    if not (folder / "config.json").is_file():
        with pytest.raises(SwapattnError):
            load(folder)
        return
    assert files(folder) == whole
    load(folder)


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_run_again(tiny_teacher, tmp_path):
    whole = files(convert(tiny_teacher, tmp_path / "whole", recipe="smoke").path)
    left_over = 0
    for folder in moments(tiny_teacher, tmp_path, "new", 15):
        for path in folder.iterdir():
            assert path.name in (".out.writing", "out")
            left_over += path.name == ".out.writing"
            assert_dead_or_whole(path, whole)
        convert(tiny_teacher, folder / "out", recipe="smoke", overwrite=True)
        assert files(folder) == ["out"]
        assert files(folder / "out") == whole
    assert left_over >= 15
    load(folder / "out")


@pytest.mark.slow
def test_a_killed_overwriting_keeps_the_old_checkpoint_or_has_the_new_one(tiny_teacher, tmp_path):
    whole = files(convert(tiny_teacher, tmp_path / "whole", recipe="smoke").path)
    versions = set()
    for folder in moments(tiny_teacher, tmp_path, "overwrite", 5):
        survivor = folder / ("out" if (folder / "out").is_dir() else ".out.old")
        assert files(survivor) == whole
        versions.add((survivor.name, read(survivor).recipe.convert.local is None))
        convert(tiny_teacher, folder / "out", recipe="smoke", overwrite=True)
        assert files(folder) == ["out"]
    assert {("out", True), (".out.old", True), ("out", False)} == versions
