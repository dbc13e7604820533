"""Line charts, heat maps, histograms and stacked bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.report.figures.axes import Axis, label
from anchorctx.report.figures.chart import LEFT, TOP, WIDTH, Chart
from anchorctx.report.figures.inline import tag
from anchorctx.report.figures.style import (
    BLUE,
    CARD,
    HEAT,
    HEAT_STEPS,
    IN_HIGH,
    IN_LOW,
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
ROW, BAR = 32, 52
"""Height of a heat map's row and of a stacked bar with its name, in points."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    """Lower ends of intervals, one a point, or nothing."""
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
    right = axes.transAxes.inverted().transform(axes.transData.transform((at, 1.0)))[0] > 0.5
    axes.annotate(
        name, (at, 0), (-5 if right else 5, 8), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right" if right else "left", color=MUTED,
    )  # fmt: skip


def _line(axes: Any, line: Line) -> None:
    color, points = SERIES[line.color % len(SERIES)], _thinned(line)
    ends = {x: (a, b) for x, a, b in zip(line.x, line.low or line.x, line.high or line.x, strict=True)
            if line.low and a is not None and b is not None}  # fmt: skip
    if len(ends) > 1:
        outline = [(x, low) for x, (low, _) in ends.items()] + [(x, high) for x, (_, high) in reversed(ends.items())]
        axes.fill(*zip(*outline, strict=True), color=color, alpha=0.16, linewidth=0, clip_on=False)
    look: dict[str, Any] = {"linewidth": 1, "alpha": 0.4} if line.faint else {"linewidth": 2.2}
    titles = [line.name]
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
    """Every so many points, the last always."""
    points = list(zip(line.x, line.y, strict=True))
    every = max(math.ceil(len(points) / MOST_POINTS), 1)
    return points[::-every][::-1]


def heat_map(
    cells: dict[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    description: str,
    *,
    row_label: str,
    column_label: str,
    low: float = 0.0,
    high: float = 1.0,
) -> Chart:
    """A grid of values, each written in its cell; colours run from `low` to `high`. A missing cell stays empty."""
    left, top = 14 + CHARACTER * max(map(len, rows)), TOP if row_label else 4

    def draw(axes: Any) -> None:
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        label(axes, column_label, row_label, left)
        wide = (WIDTH - left - 6) / len(columns)
        for (row, column), value in cells.items():
            part = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
            step = round(part * HEAT_STEPS)
            words = f"{value:.2f}" if abs(value) <= 1 else number(value)
            i, j = rows.index(row), columns.index(column)
            box = j + 2 / wide, i + 2 / ROW, 1 - 4 / wide, 1 - 4 / ROW
            rectangle(axes, *box, HEAT[step], f"{row}, {column}: {words}", "cell", edge=2)
            color = IN_HIGH if step / HEAT_STEPS > HEAT_TURN else IN_LOW
            axes.text(j + 0.5, i + 0.5, words, ha="center", va="center_baseline", color=color, gid=tag("in-cell"))

    return Chart(description, draw, height=top + ROW * len(rows) + 46, margins=(left, 6, top, 46))


def rectangle(
    axes: Any, x: float, y: float, width: float, height: float, color: str, title: str, css: str = "", edge: float = 0
) -> None:
    """A filled rectangle with a title; an `edge` in points makes it larger and rounds its corners."""
    patch = load_matplotlib().patches.Rectangle
    look = {"facecolor": color, "edgecolor": color, "linewidth": edge, "joinstyle": "round"}
    axes.add_patch(patch((x, y), width, height, gid=tag(css, title), **look))


def histogram(bins: Sequence[tuple[str, float]], description: str, x_label: str, y_label: str) -> Chart:
    """Bars side by side, one a bin: (name, count)."""

    def draw(axes: Any) -> None:
        Axis(y_label, low=0.0).apply(axes, "y", [count for _, count in bins])
        axes.grid(axis="y", color=RULE, linewidth=1)
        named = range(0, len(bins), max(math.ceil(len(bins) / 8), 1))
        axes.set_xlim(0, max(len(bins), 1))
        axes.set_xticks([i + 0.5 for i in named], [bins[i][0] for i in named])
        label(axes, x_label, y_label, LEFT)
        for i, (name, count) in enumerate(bins):
            rectangle(axes, i + 0.08, 0, 0.84, count, BLUE, f"{name}: {count:,.0f}")

    return Chart(description, draw)


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], names: Sequence[str], description: str
) -> Chart:
    """Horizontal bars of 100 %, a row each: (name, [(part, share 0..1)]); `names` orders the parts' colours."""
    colors = {name: (i + 1) % len(SERIES) for i, name in enumerate(names)}

    def draw(axes: Any) -> None:
        axes.set(xlim=(0, 1), ylim=(len(bars), 0), xticks=[], yticks=[])
        for i, (name, parts) in enumerate(bars):
            axes.text(0, i + 14 / BAR, name, color=MUTED)
            start = 0.0
            for part, share in parts:
                title = f"{name}, {part}: {100 * share:.2f} %"
                rectangle(axes, start, i + 21 / BAR, share, 20 / BAR, SERIES[colors[part]], title, "part")
                if share > 46 / WIDTH:
                    look = {"color": ON_PART, "weight": "bold", "ha": "center"}
                    axes.text(start + share / 2, i + 35 / BAR, f"{100 * share:.1f} %", **look)
                start += share

    legend = [(name, color, "fill") for name, color in colors.items()]
    return Chart(description, draw, legend, BAR * len(bars), (6, 6, 0, 0))


__all__ = ["Axis", "Chart", "Line", "heat_map", "histogram", "line_chart", "rectangle", "stacked_bars"]
