"""What a section is made of: figures, tables and paragraphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from markupsafe import Markup

from anchorctx.records.results import Result
from anchorctx.report.collect import Material
from anchorctx.report.figures.chart import Chart


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with what one sees in it."""

    title: str
    chart: Chart
    caption: str
    kind: str = "figure"


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell: what is shown, and what it sorts by."""

    text: str
    sort: float | str | None = None
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table that a click on a heading sorts."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = "table"

    def numeric(self, column: int) -> bool:
        """Is a column of numbers, so set to the right?"""
        return any(isinstance(row[column].sort, int | float) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph that stands out."""

    text: str | Markup
    kind: str = "note"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page."""

    id: str
    title: str
    lead: str
    """What the section says, in a sentence or two."""
    blocks: Sequence[Figure | Table | Note] = field(default_factory=list)


class Build(Protocol):
    """How a section module makes its section."""

    def __call__(self, material: Material) -> Section | None:
        """The section, or None when the material has nothing for it."""
        ...


def measured(result: Result, percent: bool = False) -> Cell:
    """A value with its interval, sorted by the value."""
    value = _digits(result.value, percent)
    if result.low is None or result.high is None:
        return Cell(value, result.value)
    ends = f"{_digits(result.low, percent)} to {_digits(result.high, percent)}"
    return Cell(f"{value} ({ends})", result.value)


def _digits(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.3f}" if abs(value) <= 1 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
