"""`swapattn report`: one page that says what was converted, how it was trained and what that kept and saved."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import check_folder, find
from ..environment import say
from ..errors import UsageError
from . import plots
from .collection import KIND, collect
from .document import Node
from .render import html_page, markdown_page
from .sections import sections

__all__ = ["ReportFiles", "build"]

DEFAULT = "report.html"


@dataclass(frozen=True)
class ReportFiles:
    """What a report was written to, or with `dry_run` would be."""

    html: Path
    markdown: Path
    json: Path
    plots: tuple[Path, ...]
    runs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "html": str(self.html),
            "markdown": str(self.markdown),
            "json": str(self.json),
            "plots": [str(path) for path in self.plots],
            "runs": list(self.runs),
            "missing": list(self.missing),
            "dry_run": self.dry_run,
        }

    def to_table(self) -> str:
        """The files as lines, and what the runs lack."""
        lines: list[tuple[str, object]] = [
            ("would write" if self.dry_run else "wrote", self.html),
            ("", self.markdown),
            ("", self.json),
        ]
        if self.plots:
            lines.append(("", f"{self.plots[0].parent}/ ({len(self.plots)} plots)"))
        return "\n".join(
            [*(f"{name:<12}{value}" for name, value in lines), *(f"missing     {m}" for m in self.missing)]
        )


def build(
    runs: Sequence[str | Path], output: str | Path | None = None, *, overwrite: bool = False, dry_run: bool = False
) -> ReportFiles:
    """Write a report on one or more runs: a page, the same as Markdown, its data as JSON, and a PNG of each plot.

    Args:
        runs: checkpoint folders, shown side by side in this order; none = the newest checkpoint here.
        output: the page, `NAME.html`; default `report.html` here. Beside it `NAME.md`, `NAME.json`, `NAME_files/`.
        overwrite: replace an earlier report; a file of another kind is never replaced.
        dry_run: check everything, write nothing.

    Raises:
        UsageError: a folder is no checkpoint, the output is in the way or is no `.html`.
        CheckpointError: a file of a run is damaged; the message names it.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        paths = [find().path]
        say(f"checkpoint: {paths[0]} (the newest here)")
    page = Path(output) if output is not None else Path(DEFAULT)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{page} is no name for a page: end it in .html")
    folder = page.with_name(f"{page.stem}_files")
    fixed = [page, page.with_suffix(".md"), page.with_suffix(".json")]
    _check_targets(fixed, folder, overwrite)

    data = collect(paths, shlex.join(["swapattn", "report", *map(str, paths), "-o", str(page)]))
    drawn = plots.draw(Node(data))
    data["plots"] = [f"{folder.name}/{plot.name}.png" for plot in drawn]
    document = Node(data)
    found = sections(document, drawn)
    pictures = {folder / f"{plot.name}.png": plot.png for plot in drawn}
    contents = {
        **pictures,
        fixed[2]: (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        fixed[1]: markdown_page(document, found, folder.name).encode(),
        page: html_page(document, found, drawn).encode(),
    }
    if not dry_run:
        _write(contents, folder)
    missing = [(run["label"], item["what"], item["command"]) for run in data["runs"] for item in run["missing"]]
    return ReportFiles(
        html=page,
        markdown=fixed[1],
        json=fixed[2],
        plots=tuple(pictures),
        runs=tuple(str(path) for path in paths),
        missing=tuple(f"{label}: {what}; {command}" for label, what, command in missing),
        dry_run=dry_run,
    )


def _check_targets(files: Sequence[Path], folder: Path, overwrite: bool) -> None:
    """Nothing is in the way but, with `overwrite`, an earlier report."""
    check_folder(folder.parent)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is in the way of the plots: choose another name with -o")
    for path in [*files, *sorted(folder.glob("*"))]:
        if not path.exists():
            continue
        if not _is_ours(path):
            raise UsageError(f"{path} exists and is no swapattn report: choose another name with -o")
        if not overwrite:
            raise UsageError(f"{path} exists: use --overwrite, or another name with -o")


def _is_ours(path: Path) -> bool:
    """Pages, JSON, Markdown and plots carry the same mark near their beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return KIND.encode() in file.read(512)


def _write(contents: Mapping[Path, bytes], folder: Path) -> None:
    """Write beside each target and rename, the page last; plots of an earlier report go."""
    for path in contents:
        path.parent.mkdir(parents=True, exist_ok=True)
    scratch = {path: path.with_name(f".{path.name}.writing") for path in contents}
    try:
        for path, content in contents.items():
            scratch[path].write_bytes(content)
        for path in folder.glob("*.png"):
            if path not in contents:
                path.unlink()
        for path, written in scratch.items():
            os.replace(written, path)
    finally:
        for written in scratch.values():
            written.unlink(missing_ok=True)
