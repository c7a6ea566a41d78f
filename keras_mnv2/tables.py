"""Rows of cells as text in columns."""

from collections.abc import Collection, Sequence


def in_columns(rows: Sequence[Sequence[str]], right: Collection[int] = (), rule: bool = False) -> list[str]:
    """A line for each row, its cells two spaces apart.

    Args:
        rows: with as many cells each.
        right: numbers of the columns that are flush right.
        rule: whether a line of dashes stands below the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if rule:
        rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
