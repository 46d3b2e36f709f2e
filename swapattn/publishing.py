"""Put a checkpoint on the hub. Whether that will be possible is asked before anything is converted."""

from __future__ import annotations

import re
from pathlib import Path

from . import sources
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

    Raises:
        SourceError: the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    say(f"uploading {folder} to {repository}")
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Add a model converted by swapattn",
            ignore_patterns=[".*"],
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"uploading {folder} to {repository} failed: {reason}; the folder itself is whole") from error
    return str(url)
