"""A chart that has yet to be drawn: into the page as SVG, or several beside each other into a PNG file."""

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

WIDTH, HEIGHT = 420, 280
"""Size of a chart in points (1/72 inch); the page scales it to its column."""
LEFT, RIGHT, TOP, BOTTOM = 68, 30, 30, 42
"""Space around the axes, for text as large as the page sets it on a phone."""
TITLE, LINE = 24, 18
"""Height of a chart's title in a PNG file, and of a line of the legend."""


@dataclass(frozen=True)
class Chart:
    """How to draw a chart on matplotlib's axes, and its legend."""

    description: str
    """For readers who cannot see it."""
    draw: Callable[[Any], None]
    legend: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, colour and look (line, dashed or fill) of each series."""
    height: float = HEIGHT
    margins: tuple[float, float, float, float] = (LEFT, RIGHT, TOP, BOTTOM)
    """Left, right, top and bottom, in points."""

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
        box = (x + left) / width, 1 - (y + top + tall) / height, (WIDTH - left - right) / width, tall / height
        axes = figure.add_axes(box, frameon=False)
        axes.tick_params(length=0, pad=8, labelcolor=MUTED)
        axes.tick_params(axis="x", pad=10)
        axes.grid(False)
        self.draw(axes)


@functools.partial(styled, math=False)
def save_charts(charts: Sequence[tuple[str, Chart]], path: Path, heading: str = "") -> Path:
    """Write charts side by side, each with its title, legends below and a heading above; returns `path`."""
    legends = _legends([chart for _, chart in charts])
    tall = TITLE + max(chart.height for _, chart in charts)
    width = WIDTH * len(charts)
    height = tall + LINE * (1 + max((math.ceil(len(names) / columns) for names, columns, _ in legends), default=0))
    figure = blank_figure(width / 72, height / 72)
    for number, (title, chart) in enumerate(charts):
        chart.place(figure, number * WIDTH, TITLE)
        figure.text((number * WIDTH + 2) / width, 1 - 18 / height, title, color=INK, weight="bold", size=12)
    if heading:
        figure.text(2 / width, 1, heading, color=MUTED)
    for names, columns, middle in legends:
        place = {"loc": "upper center", "bbox_to_anchor": (middle, 1 - tall / height), "ncols": columns}
        figure.legend(handles=[_handle(*name) for name in names], **place)
    return save(figure, path)


def _legends(charts: Sequence[Chart]) -> list[tuple[list[tuple[str, int, str]], int, float]]:
    """Names, columns and middle (0..1 of the width): one for all charts, or each its own where a look has two names."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.legend))
    if len({name[1:] for name in names}) == len(names):
        found = [(names, 2 * len(charts), 0.5)]
    else:
        found = [(chart.legend, 2, (i + 0.5) / len(charts)) for i, chart in enumerate(charts)]
    return [(names, min(columns, len(names)), middle) for names, columns, middle in found if names]


def _handle(name: str, color: int, look: str) -> Any:
    mpl = load_matplotlib()
    if look == "fill":
        return mpl.patches.Patch(color=SERIES[color], label=name)
    dashes = (0, (2.3, 1.8)) if look == "dashed" else "-"
    return mpl.lines.Line2D([], [], color=SERIES[color], linewidth=2.2, linestyle=dashes, label=name)
