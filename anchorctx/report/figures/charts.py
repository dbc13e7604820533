"""Line charts, heat maps, histograms and bars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.report.figures.chart import LEFT, TOP, WIDTH, Axis, Chart, label
from anchorctx.report.figures.inline import tag
from anchorctx.report.figures.style import (
    BLUE,
    CARD,
    HEAT,
    HEAT_STEPS,
    IN_HIGH,
    IN_LOW,
    INK,
    MUTED,
    ON_PART,
    RULE,
    SERIES,
    load_matplotlib,
)
from anchorctx.report.numbers import number

CHARACTER = 8.5
"""Width of a character where the page sets text largest, on a phone."""
MANY_POINTS = 48
"""Lines with more points are drawn without a mark on each."""
MOST_POINTS = 400
"""Points of a line that are drawn; more could not be seen."""
HEAT_TURN = 0.65
"""From this part of a heat map's scale on, text has the other colour. No step is of middling lightness, where neither
black nor white would be legible."""
ROW, STACK = 32, 52
"""Height of a heat map's row and of a stacked bar with its name, in points."""
ARM, GAP = 26, 6
"""Height of a row of bars, however many they are, and the part of it that stays free, in points."""


# -- lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    """Lower ends of intervals, one for each point, or nothing."""
    high: Sequence[float | None] = ()
    color: int = 0
    """Number of its colour; the same model has the same colour in all charts."""
    dashed: bool = False
    faint: bool = False
    """Behind another line, thin and not in the legend."""


def line_chart(
    lines: Sequence[Line], x: Axis, y: Axis, description: str, mark: tuple[float, str] | None = None
) -> Chart:
    """Lines with 95 % bands; `mark` is a vertical line at an x, with its name."""
    lines = [line for line in lines if len(line.x)]

    def draw(axes: Any) -> None:
        x.apply(axes, "x", [v for line in lines for v in line.x] + ([mark[0]] if mark else []))
        # The axis holds the bands too.
        values = (value for line in lines for part in (line.y, line.low, line.high) for value in part)
        y.apply(axes, "y", [value for value in values if value is not None])
        axes.grid(axis="y", color=RULE, linewidth=1)
        label(axes, x.label, y.label, LEFT)
        if mark is not None:
            _mark(axes, *mark)
        for line in lines:
            _line(axes, line)

    legend = [(line.name, line.color % len(SERIES), "dashed" if line.dashed else "line")
              for line in lines if not line.faint]  # fmt: skip
    return Chart(description, draw, legend)


def _mark(axes: Any, at: float, name: str) -> None:
    axes.axvline(at, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    # The name stands on the side that has room for it.
    right = axes.transAxes.inverted().transform(axes.transData.transform((at, 1.0)))[0] > 0.5
    axes.annotate(
        name, (at, 0), (-5 if right else 5, 8), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right" if right else "left", color=MUTED,
    )  # fmt: skip


def _line(axes: Any, line: Line) -> None:
    color, points = SERIES[line.color % len(SERIES)], _thinned(line)
    # An interval is known at some points or none; `line.x` stands in where there is nothing to go through.
    ends = {x: (a, b) for x, a, b in zip(line.x, line.low or line.x, line.high or line.x, strict=True)
            if line.low and a is not None and b is not None}  # fmt: skip
    if len(ends) > 1:
        # Once around the band: along the lower ends, then back along the upper ones.
        outline = [(x, low) for x, (low, _) in ends.items()] + [(x, high) for x, (_, high) in reversed(ends.items())]
        axes.fill(*zip(*outline, strict=True), color=color, alpha=0.16, linewidth=0, clip_on=False)
    look: dict[str, Any] = {"linewidth": 1, "alpha": 0.4} if line.faint else {"linewidth": 2.2}
    titles = [line.name]  # the path's title, then one for each marker
    if len(points) <= MANY_POINTS and not line.faint:
        look |= {"marker": "o", "markersize": 7, "markerfacecolor": CARD, "markeredgewidth": 2}
        titles += [_words(line.name, x, y, ends.get(x)) for x, y in points]
    axes.plot(
        *zip(*points, strict=True), color=color, linestyle=(0, (2.3, 1.8)) if line.dashed else "-", label=line.name,
        solid_joinstyle="round", clip_on=False, gid=tag("line", *titles), **look,
    )  # fmt: skip


def _words(name: str, x: float, y: float, ends: tuple[float, float] | None) -> str:
    interval = f" (95 %: {number(ends[0])} to {number(ends[1])})" if ends else ""
    return f"{name}: {number(y)} at {number(x)}{interval}"


def _thinned(line: Line) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, evenly chosen; the last always."""
    points = list(zip(line.x, line.y, strict=True))
    # 1000 points: every third, counted from the end, 999, 996, ..., 0.
    every = max(math.ceil(len(points) / MOST_POINTS), 1)
    return points[::-every][::-1]


# -- heat maps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of a heat map."""

    cells: dict[tuple[str, str], float]
    """By names of row and column; a missing cell stays empty."""
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str
    """What the rows are; may be empty."""
    column_label: str


def heat_map(grid: Grid, description: str, low: float = 0.0, high: float = 1.0) -> Chart:
    """A grid of values, each written in its cell; colours run from `low` to `high`."""
    rows, columns = grid.rows, grid.columns
    left, top = _room_for(rows), TOP if grid.row_label else 4

    def draw(axes: Any) -> None:
        # One unit of the axes is one cell, rows from above.
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        label(axes, grid.column_label, grid.row_label, left)
        wide = (WIDTH - left - 6) / len(columns)
        for (row, column), value in grid.cells.items():
            share = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
            step = round(share * HEAT_STEPS)
            words = f"{value:.2f}" if abs(value) <= 1 else number(value)
            i, j = rows.index(row), columns.index(column)
            # Two points less on each side; the edge with its round corners adds one of them.
            box = j + 2 / wide, i + 2 / ROW, 1 - 4 / wide, 1 - 4 / ROW
            rectangle(axes, box, HEAT[step], f"{row}, {column}: {words}", "cell", linewidth=2)
            color = IN_HIGH if step / HEAT_STEPS > HEAT_TURN else IN_LOW
            axes.text(j + 0.5, i + 0.5, words, ha="center", va="center_baseline", color=color, gid=tag("in-cell"))

    return Chart(description, draw, height=top + ROW * len(rows) + 46, margins=(left, 6, top, 46))


def rectangle(
    axes: Any, box: tuple[float, float, float, float], color: str, title: str = "", css: str = "", **look: Any
) -> None:
    """A filled rectangle; `box` is x, y, width and height, `title` what the pointer shows.

    `css` is its class in the page. `look` is matplotlib's; a `linewidth` in points enlarges it and rounds its corners.
    """
    x, y, width, height = box
    look = {"facecolor": color, "edgecolor": color, "linewidth": 0, "joinstyle": "round"} | look
    axes.add_patch(load_matplotlib().patches.Rectangle((x, y), width, height, gid=tag(css, title), **look))


def _room_for(names: Sequence[str]) -> float:
    """Space to the left of the axes that the longest of the rows' names needs."""
    return 14 + CHARACTER * max(map(len, names))


# -- bars -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bars:
    """One series of a bar chart."""

    name: str
    """May be empty where it is the only one."""
    values: Sequence[float | None]
    """One for each row, None where there is none."""
    color: int
    """Number of its colour."""


def bar_chart(rows: Sequence[str], series: Sequence[Bars], x: Axis, description: str) -> Chart:
    """Horizontal bars, those of a row below each other; a single series has its values behind the bars.

    A logarithmic axis needs `low`; there, what is smaller has no bar.
    """
    several = len(series) > 1
    left, right = _room_for(rows), 20 if several else 7 * CHARACTER
    values = [value for bars in series for value in bars.values if value is not None]
    start = x.low or 0.0 if x.log else 0.0  # where every bar begins
    if not x.log and min(values, default=0.0) >= 0:
        x = dataclasses.replace(x, low=0.0)

    def draw(axes: Any) -> None:
        x.apply(axes, "x", [*values, start])
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.grid(axis="x", color=RULE, linewidth=1)
        label(axes, x.label, "", left)
        # Bars share their row, [i, i + 1], but for half the gap above and below.
        bar = (1 - GAP / ARM) / len(series)
        for i, row in enumerate(rows):
            words = []
            for place, bars in enumerate(series):
                if (value := bars.values[i]) is None:
                    continue
                end = max(value, start) if x.log else value
                rectangle(axes, (start, i + GAP / ARM / 2 + place * bar, end - start, bar), SERIES[bars.color])
                words.append(f"{bars.name} " * several + number(value, x.percent))
                if not several:
                    axes.annotate(
                        words[-1], (max(end, start), i + 0.5), (4, 0), textcoords="offset points",
                        va="center_baseline", color=INK,
                    )  # fmt: skip
            # A pointer could hardly meet a bar of 5 points, and never one of 0: the whole row has the values.
            low, high = axes.get_xlim()
            rectangle(axes, (low, i, high - low, 1), CARD, f"{row}: {', '.join(words) or '–'}", "unseen", alpha=0)

    legend = [(bars.name, bars.color, "fill") for bars in series if several]
    return Chart(description, draw, legend, 4 + ARM * len(rows) + 46, (left, right, 4, 46))


def histogram(bins: Sequence[tuple[str, float]], description: str, x_label: str, y_label: str) -> Chart:
    """Upright bars side by side, one for each bin: (name, count)."""

    def draw(axes: Any) -> None:
        Axis(y_label, low=0.0).apply(axes, "y", [count for _, count in bins])
        axes.grid(axis="y", color=RULE, linewidth=1)
        named = range(0, len(bins), max(math.ceil(len(bins) / 8), 1))  # at most eight names have room
        axes.set_xlim(0, max(len(bins), 1))
        axes.set_xticks([i + 0.5 for i in named], [bins[i][0] for i in named])
        label(axes, x_label, y_label, LEFT)
        for i, (name, count) in enumerate(bins):
            rectangle(axes, (i + 0.08, 0, 0.84, count), BLUE, f"{name}: {count:,.0f}")

    return Chart(description, draw)


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], names: Sequence[str], description: str
) -> Chart:
    """Horizontal bars of 100 %, a row each: (name, [(part, share 0..1)]); `names` orders the parts' colours."""
    colors = {name: (i + 1) % len(SERIES) for i, name in enumerate(names)}

    def draw(axes: Any) -> None:
        axes.set(xlim=(0, 1), ylim=(len(bars), 0), xticks=[], yticks=[])
        for i, (name, parts) in enumerate(bars):
            axes.text(0, i + 14 / STACK, name, color=MUTED)
            start = 0.0
            for part, share in parts:
                title = f"{name}, {part}: {100 * share:.2f} %"
                rectangle(axes, (start, i + 21 / STACK, share, 20 / STACK), SERIES[colors[part]], title, "part")
                if share > 46 / WIDTH:  # else "12.3 %" would not fit into it
                    look = {"color": ON_PART, "weight": "bold", "ha": "center"}
                    axes.text(start + share / 2, i + 35 / STACK, f"{100 * share:.1f} %", **look)
                start += share

    legend = [(name, color, "fill") for name, color in colors.items()]
    return Chart(description, draw, legend, STACK * len(bars), (6, 6, 0, 0))
