"""Rows of cells as a table: in Markdown, or in columns of a terminal."""

from collections.abc import Sequence
from typing import Any


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, with columns of even width: the first to the left, the others to the right; None is empty."""
    lines = [
        ["" if cell is None else str(cell).replace("|", r"\|").replace("\n", " ") for cell in row]
        for row in (headings, *rows)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, rule)
    return "\n".join(f"| {line} |" for line in _lines(lines, widths, " | "))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right."""
    return "\n".join(_lines(lines, [max(map(len, column)) for column in zip(*lines, strict=True)], "  "))


def _lines(lines, widths, between):
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        yield between.join(cells)
