"""Cells of plain-text tables, and the lines that they make."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if column < left else str.rjust for column in range(len(widths))]
    lines = ([side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """ "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """The same with its sign."""
    return "-" if value is None else f"{value:+.3f}"


def with_error(value: float | None, error: float | None) -> str:
    """Value and standard error."""
    return number(value) + (f" ±{error:.3f}" if error is not None else "")


def p_value(value: float) -> str:
    """Very small ones only as an upper bound."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def share(value: float | None, error: float | None) -> str:
    """A share and its error, with a figure behind the point only where the error does not hide it."""
    if value is None:
        return "-"
    digits = 1 if error is not None and error < 0.01 else 0
    return f"{value:.{digits}%}" + (f" ±{error:.{digits}%}" if error is not None else "")
