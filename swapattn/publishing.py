"""Put a checkpoint on the hub. Whether that will be possible is asked before anything is converted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import sources
from .checkpoint import RECORD
from .environment import say
from .errors import SourceError, UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_push(repository: str) -> None:
    """Refuse early what cannot be pushed.

    Raises:
        UsageError: no repository name.
        SourceError: the hub cannot be reached, or nobody is logged in.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push-to-hub {repository!r}: give a repository as OWNER/NAME")
    if not sources.hub_reachable():
        raise SourceError("--push-to-hub: the hub cannot be reached, so nothing was converted; leave the option out")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the client's errors change with its version
        raise SourceError("--push-to-hub: nobody is logged in to the hub; run `hf auth login`") from error


def push(folder: Path, repository: str) -> str:
    """Upload a checkpoint folder, creating the repository where needed; returns its address.

    Its record goes there without the paths of this machine.

    Raises:
        SourceError: the hub refuses; the folder stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents = {name: path for name, path in files.items() if not name.startswith(".") and name != RECORD}
    adds = [CommitOperationAdd(name, path) for name, path in contents.items()]
    adds.append(CommitOperationAdd(RECORD, json.dumps(without_paths(record), indent=2).encode()))
    say(f"uploading {folder} to {repository}")
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.create_commit(repository, adds, commit_message="Add a model converted by swapattn")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"uploading {folder} to {repository} failed: {reason}; the folder itself is whole") from error
    return str(url)


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """A conversion's record with the teacher's name on the hub, or its folder's, in the place of its path here."""
    teacher = {key: value for key, value in record["teacher"].items() if key != "relative"}  # a path as well
    public = teacher.get("hub_id") or Path(teacher["path"]).name
    return {**record, "teacher": {**teacher, "path": public, "given": public}}
