"""The same blocks as an HTML page and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from .document import Block, Cell, Code, Figure, Node, Note, Part, Section, Table
from .plots import SOFTWARE, Plot

_PROSE = 48  # characters
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
<nav aria-label="Sections">{navigation}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def html_page(document: Node, sections: Sequence[Section], plots: Sequence[Plot]) -> str:
    """One self-contained page; everything that comes from a file is escaped."""
    drawn = {plot.name: plot for plot in plots}
    body = "\n".join(_section(section, drawn) for section in sections)
    return _PAGE.format(
        generator=SOFTWARE,
        title=escape(title(document)),
        style=(files("swapattn") / "assets" / "report.css").read_text(encoding="utf-8"),
        subtitle=_cell(_subtitle(document)),
        navigation=" ".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections),
        body=body,
    )


def markdown_page(document: Node, sections: Sequence[Section], folder: str) -> str:
    """The same as Markdown, with the plots as links into `folder`."""
    lines = [f"<!-- {SOFTWARE} -->", f"# {_md(title(document))}", "", _md_cell(_subtitle(document))]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_md_block(block, folder)]
    return "\n".join(lines) + "\n"


def title(document: Node) -> str:
    """Names of the runs, one against the other."""
    return "swapattn: " + " vs ".join(str(run.at("label").value) for run in document.at("runs").items())


def _subtitle(document: Node) -> Cell:
    when, version = document.at("time"), document.at("swapattn")
    written = (Part("Written "), Part(str(when.value), when.key, when.value))
    return (*written, Part(" by swapattn "), Part(str(version.value), version.key, version.value), Part("."))


def _section(section: Section, plots: Mapping[str, Plot]) -> str:
    figures = [block for block in section.blocks if isinstance(block, Figure)]
    blocks = [_block(block) for block in section.blocks if not isinstance(block, Figure)]
    if figures:
        drawn = "\n".join(_figure(figure, plots[figure.name]) for figure in figures)
        # behind the first table: the figures come before the fine print
        blocks.insert(1, f'<div class="plots">\n{drawn}\n</div>')
    inside = "\n".join(blocks) or "<p>Nothing recorded.</p>"
    heading = f'<h2 id="{section.name}-title">{escape(section.title)}</h2>'
    return f'<section id="{section.name}" aria-labelledby="{section.name}-title">\n{heading}\n{inside}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        lines = "\n".join(_part(part, breaks=False) for part in block.lines)
        code = f'<pre tabindex="0"><code>{lines}</code></pre>'
        return f"<details><summary>{escape(block.summary)}</summary>{code}</details>" if block.summary else code
    assert isinstance(block, Note)
    command = f" <code>{_part(block.command)}</code>" if block.command else ""
    return f'<p class="note">{_cell(block.cell)}{command}</p>'


def _figure(figure: Figure, plot: Plot) -> str:
    svg = re.sub("<svg", f'<svg role="img" aria-label="{escape(figure.alternative)}"', plot.svg, count=1)
    return f"<figure><figcaption>{escape(figure.caption)}</figcaption>{svg}</figure>"


def _table(table: Table) -> str:
    lines = []
    if any(name for name, _ in table.groups):
        cells = [_group(name, width) for name, width in table.groups]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("<tr>" + "".join(_head(name) for name in table.heads) + "</tr>")
    columns = "".join(f'<colgroup span="{width}"></colgroup>' for _, width in table.groups)
    kind = ' class="numbers"' if table.numeric else ""
    body = "\n".join(_row(row) for row in table.rows)
    # focusable, so that a keyboard can scroll what is wider than the screen
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}"><table{kind}>'
        f"<caption><span>{escape(table.caption)}</span></caption>{columns}\n<thead>{''.join(lines)}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _group(name: str, width: int) -> str:
    return f'<th scope="colgroup" colspan="{width}">{escape(name)}</th>' if name else f'<td colspan="{width}"></td>'


def _head(name: str) -> str:
    return f'<th scope="col">{escape(name)}</th>' if name else "<td></td>"


def _row(row: Sequence[Cell]) -> str:
    first, *rest = row
    return f'<tr><th scope="row">{_cell(first)}</th>' + "".join(map(_data, rest)) + "</tr>"


def _data(cell: Cell) -> str:
    """Prose gets a width that a narrow screen does not take away."""
    kind = ' class="prose"' if sum(len(part.text) for part in cell) > _PROSE else ""
    return f"<td{kind}>{_cell(cell)}</td>"


def _cell(cell: Cell) -> str:
    return "".join(_part(part) for part in cell)


def _part(part: Part, *, breaks: bool = True) -> str:
    shown = escape(part.text)
    shown = shown.replace("/", "/<wbr>") if breaks else shown  # paths may break, figures and commands may not
    if not part.key:
        return shown
    value = escape(json.dumps(part.value, ensure_ascii=False))
    return f'<span data-key="{escape(part.key)}" data-value="{value}">{shown}</span>'


def _md_block(block: Block, folder: str) -> list[str]:
    if isinstance(block, Table):
        return _md_table(block)
    if isinstance(block, Figure):
        return [f"![{_md(block.alternative)}](<{folder}/{block.name}.png>)"]
    if isinstance(block, Code):
        fence = _fence("\n".join(part.text for part in block.lines))
        lines = [f"{fence}{block.language}", *(part.text.rstrip("\n") for part in block.lines), fence]
        return [*([f"{_md(block.summary)}:", ""] if block.summary else []), *lines]
    command = f" {_code_span(block.command.text)}" if block.command else ""
    return [_md_cell(block.cell) + command]


def _md_table(table: Table) -> list[str]:
    heads = list(table.heads)
    place = 0
    for name, width in table.groups:
        if name:  # Markdown has one line of heads
            heads[place : place + width] = [f"{name}: {head}" for head in heads[place : place + width]]
        place += width
    align = ["---:" if table.numeric and index else "---" for index in range(len(heads))]
    rows = [heads_line for heads_line in ([_md(head) for head in heads], align)]
    rows += [[_md_cell(cell) for cell in row] for row in table.rows]
    return [f"{_md(table.caption)}.", "", *("| " + " | ".join(row) + " |" for row in rows)]


def _md_cell(cell: Cell) -> str:
    return _md("".join(part.text for part in cell))


def _md(words: str) -> str:
    """Text that Markdown takes as text."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(words.split()))


def _code_span(words: str) -> str:
    """Code within a line; the spaces are no part of it, and let it begin or end with a backtick."""
    ticks = _fence(words, 1)
    return f"{ticks} {words} {ticks}" if "`" in words else f"{ticks}{words}{ticks}"


def _fence(words: str, least: int = 3) -> str:
    """More backticks than stand in a row in the words."""
    return "`" * max(least, max(map(len, re.findall(r"`+", words)), default=0) + 1)
