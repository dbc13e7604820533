"""A chart that has yet to be drawn, and its axes: into the page as SVG, or several beside each other into a PNG file.

All sizes are in points, 1/72 inch; one is one unit of the page's SVG.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anchorctx.report.figures.inline import inline_svg
from anchorctx.report.figures.style import INK, MUTED, SERIES, blank_figure, load_matplotlib, save, styled
from anchorctx.report.numbers import number

WIDTH, HEIGHT = 420, 280
"""Size of a chart; the page scales it to its column."""
LEFT, RIGHT, TOP, BOTTOM = 68, 30, 30, 42
"""Space around the axes, for text as large as the page sets it on a phone."""
TITLE, LINE = 24, 18
"""Height of a chart's title in a PNG file, and of a line of the legend."""
MOST_TICKS = 6
Entry = tuple[str, int, str]
"""An entry of a legend: its name, the number of its colour, and its look (line, dashed or fill)."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart: its label, scale, ends and ticks."""

    label: str
    log: int | None = None
    """Base of a logarithmic scale; None is linear."""
    low: float | None = None
    """Where it begins; None follows the data."""
    high: float | None = None
    percent: bool = False
    """Numbers are shares, shown as per cent."""
    ticks: Sequence[float] | None = None
    """Where marks are; None chooses round values."""

    def apply(self, axes: Any, name: str, values: Sequence[float]) -> None:
        """Set scale, ends and ticks of matplotlib's `axes` in direction `name`, x or y, to show `values`."""
        low, high = self.ends(values)
        axes.set(**{f"{name}scale": "log" if self.log else "linear", f"{name}lim": (low, high)})
        axis, ticks = getattr(axes, f"{name}axis"), self._ticks(low, high)
        axis.set_ticks(ticks, [number(tick, self.percent) for tick in ticks])
        # Logarithmic scales would bring their own marks between ours.
        axis.set_minor_locator(load_matplotlib().ticker.NullLocator())

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """First and last value shown: a little beyond the data unless the axis says where it ends."""
        values = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)] or [1.0]
        low, high = min(values), max(values)
        if self.log:
            # Given ticks lie on the data, so the axis may end on them; one value alone still needs some width.
            grow = 1.25 if self.ticks is None else self.log if low == high else 1.0
            low, high = low / grow, high * grow
        else:
            air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            low, high = low - air, high + air
        return low if self.low is None else self.low, high if self.high is None else self.high

    def _ticks(self, low: float, high: float) -> list[float]:
        if self.ticks is not None:
            return _thinned([tick for tick in self.ticks if low <= tick <= high])
        if self.log:
            first, last = (math.log(end, self.log) for end in (low, high))
            # The tolerance keeps a power that is itself an end: log10(1000) is 2.9999999999999996.
            powers = [float(self.log) ** i for i in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
            if len(powers) > 1:
                return _thinned(powers)
        locator = load_matplotlib().ticker.MaxNLocator(MOST_TICKS - 1, steps=[1, 2, 2.5, 5, 10])
        return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _thinned(ticks: list[float]) -> list[float]:
    # Counted from the end: the longest context or the last layer is the one that a reader looks for.
    every = max(math.ceil(len(ticks) / MOST_TICKS), 1)
    return ticks[::-1][::every][::-1]


def label(axes: Any, x: str, y: str, left: float) -> None:
    """Name the directions: x below the middle, y above the left end of a chart whose axes begin `left` points in."""
    # In points from a corner of the axes, not as shares of them: charts have different heights.
    place = {"textcoords": "offset points", "xycoords": "axes fraction", "color": INK}
    axes.annotate(x, (0.5, 0), (0, -36), ha="center", **place)
    axes.annotate(y, (0, 1), (2 - left, 14), ha="left", **place)


@dataclass(frozen=True)
class Chart:  # without slots, which would leave `cached_property` no place for the SVG
    """How to draw a chart on matplotlib's axes, and its legend."""

    description: str
    """For readers who cannot see it."""
    draw: Callable[[Any], None]
    legend: list[Entry] = field(default_factory=list)
    height: float = HEIGHT
    margins: tuple[float, float, float, float] = (LEFT, RIGHT, TOP, BOTTOM)
    """Left, right, top and bottom."""

    # Drawn once: tests and the template ask several times. Names are data, where $ begins no formula.
    @functools.cached_property
    @functools.partial(styled, math=False)
    def svg(self) -> Markup:
        """As an SVG element."""
        figure = blank_figure(WIDTH / 72, self.height / 72)
        self.place(figure, 0, 0)
        return inline_svg(figure, self.description)

    def place(self, figure: Any, x: float, y: float) -> None:
        """Draw with the upper left corner at (x, y), in points from the figure's."""
        left, right, top, bottom = self.margins
        width, height = (72 * size for size in figure.get_size_inches())
        tall = self.height - top - bottom
        # matplotlib wants shares of the figure, from its lower left corner.
        box = (x + left) / width, 1 - (y + top + tall) / height, (WIDTH - left - right) / width, tall / height
        axes = figure.add_axes(box, frameon=False)
        axes.tick_params(length=0, pad=8, labelcolor=MUTED)
        axes.tick_params(axis="x", pad=10)
        axes.grid(False)
        self.draw(axes)


@functools.partial(styled, math=False)
def save_charts(charts: Sequence[tuple[str, Chart]], path: Path, heading: str = "", columns: int | None = None) -> Path:
    """Write charts with their titles into a PNG file, legends below each row and a heading above all; returns `path`.

    There are at most `columns` charts beside each other; None puts all into one row.
    """
    columns = min(columns or len(charts), len(charts))
    rows = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    bands = [_band([chart for _, chart in row]) for row in rows]
    width, height = WIDTH * columns, sum(tall for tall, _ in bands)
    figure = blank_figure(width / 72, height / 72)
    top = 0.0
    for row, (tall, legends) in zip(rows, bands, strict=True):
        for place, (title, chart) in enumerate(row):
            chart.place(figure, place * WIDTH, top + TITLE)
            figure.text((place * WIDTH + 2) / width, 1 - (top + 18) / height, title, color=INK, weight="bold", size=12)
        below = top + TITLE + max(chart.height for _, chart in row)
        for entries, ncols, middle in legends:
            where = {"loc": "upper center", "bbox_to_anchor": (middle / width, 1 - below / height), "ncols": ncols}
            figure.legend(handles=[_handle(*entry) for entry in entries], **where)
        top += tall
    # Above the figure's upper edge: `save` cuts the picture to what is drawn, so that this makes it grow.
    if heading:
        figure.text(2 / width, 1, heading, color=MUTED)
    return save(figure, path)


Legend = tuple[list[Entry], int, float]
"""Entries, how many stand beside each other, and the middle's distance from the left, in points."""


def _band(charts: Sequence[Chart]) -> tuple[float, list[Legend]]:
    """Height of a row of charts with titles and legends, and the legends: one for all charts, or one each."""
    entries = list(dict.fromkeys(entry for chart in charts for entry in chart.legend))
    # One legend serves all where each chart has some of its entries and no look has two names.
    if all(chart.legend for chart in charts) and len({entry[1:] for entry in entries}) == len(entries):
        found = [(entries, 2 * len(charts), WIDTH * len(charts) / 2)]
    else:
        found = [(chart.legend, 2, WIDTH * (i + 0.5)) for i, chart in enumerate(charts)]
    legends = [(names, min(ncols, len(names)), middle) for names, ncols, middle in found if names]
    lines = max((math.ceil(len(names) / ncols) for names, ncols, _ in legends), default=0)
    return TITLE + max(chart.height for chart in charts) + LINE * (1 + lines), legends


def _handle(name: str, color: int, look: str) -> Any:
    mpl = load_matplotlib()
    if look == "fill":
        return mpl.patches.Patch(color=SERIES[color], label=name)
    dashes = (0, (2.3, 1.8)) if look == "dashed" else "-"
    return mpl.lines.Line2D([], [], color=SERIES[color], linewidth=2.2, linestyle=dashes, label=name)
