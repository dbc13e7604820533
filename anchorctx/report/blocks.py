"""What a section is made of: figures, tables and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from anchorctx.records.results import Result
from anchorctx.report.collect import Material
from anchorctx.report.figures.chart import Chart
from anchorctx.report.numbers import with_interval


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with what one sees in it."""

    title: str
    chart: Chart
    caption: str
    kind: str = "figure"  # `kind` tells the page's template which block it has


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell: what is shown, and what it sorts by."""

    text: str
    sort: float | str | None = None
    """None for a missing value: it comes last, whichever way the column is sorted."""
    strong: bool = False


MISSING = Cell("–")
"""The cell of a number that was not measured."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that a click on a heading sorts."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = "table"

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers and is therefore set to the right."""
        return any(isinstance(row[column].sort, int | float) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph that stands out."""

    text: str | Markup
    kind: str = "note"


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as it was said, with who said it."""

    heading: str
    text: str
    folded: bool = False
    """Shown when it is asked for."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What agents said on one problem, folded up."""

    title: str
    """All that is seen until it is unfolded."""
    passages: Sequence[Passage]
    kind: str = "conversation"


Block = Figure | Table | Note | Conversation


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page."""

    id: str
    """Its anchor in the page, such as `#ruler`."""
    title: str
    lead: str
    """What the section says, in a sentence or two."""
    blocks: Sequence[Block] = field(default_factory=list)


Build = Callable[[Material], Section | None]
"""Makes a section, or None where the material has nothing for it."""


def text_cell(text: str) -> Cell:
    """Words, sorted as they are written."""
    return Cell(text, text)


def measured(result: Result | None, as_percent: bool = False) -> Cell:
    """A value with its interval, sorted by the value."""
    return MISSING if result is None else Cell(with_interval(result, as_percent), result.value)


def formatted(value: float | None, form: str) -> Cell:
    """A number in a format such as `{:,}`, sorted by itself."""
    return MISSING if value is None else Cell(form.format(value), value)
