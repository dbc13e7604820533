"""Tables as plain text, for what commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

GAP = "  "


def text_table(rows: Iterable[Sequence[object] | str], align: str = "<", *, indent: int = 0) -> list[str]:
    """One line for each row, with its cells in aligned columns.

    Args:
        rows: the cells of each row; whole numbers get thousands separators, anything else is shown as `str` shows it.
            Rows may be short. A plain string is a line of its own, such as a heading, and widens no column.
        align: `<` (left) or `>` (right) for each column; the last letter holds for all further columns.
        indent: spaces before each row; plain strings are not indented.
    """
    lines = [row if isinstance(row, str) else [_text(cell) for cell in row] for row in rows]
    cells = [row for row in lines if not isinstance(row, str)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells), default=0))]
    align = align.ljust(len(widths), align[-1])

    def line(row: list[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False))
        return " " * indent + GAP.join(padded).rstrip()

    return [row if isinstance(row, str) else line(row) for row in lines]


def _text(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, Integral) else str(cell)
