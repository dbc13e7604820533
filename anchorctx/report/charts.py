"""Line charts, heat maps and stacked bars as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from anchorctx.report.svg import COLORS, HEIGHT, WIDTH, Axis, Scale, number, path, picture, scale, text, tooltip

LEFT, RIGHT, TOP, BOTTOM = 68, 22, 30, 42
"""Margins of a chart, in its own units."""
CHARACTER = 8.0
"""Width of a character where the page sets text largest, on a phone."""
MANY_POINTS = 48
"""Lines with more points are drawn without a mark on each."""
HEAT_STEPS, HEAT_TURN = 10, 0.65
"""Colours of a heat map, and the part from which its text has the other colour: no step is of middling lightness, on
which neither black nor white is legible."""
MOST_POINTS = 400
"""Points of a line that are drawn; more would not be seen."""


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
    """Behind a smoothed line."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart with its legend."""

    svg: Markup
    legend: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, colour and look (line, dashed or fill) of each series."""


def line_chart(
    lines: Sequence[Line], x: Axis, y: Axis, description: str, mark: tuple[float, str] | None = None
) -> Chart:
    """Lines with 95 % bands; `mark` is a vertical line at an x, with its name."""
    lines = [line for line in lines if len(line.x)]
    across = scale(x, [v for line in lines for v in line.x] + ([mark[0]] if mark else []), LEFT, WIDTH - RIGHT)
    ends = [v for line in lines for part in (line.y, line.low, line.high) for v in part if v is not None]
    up = scale(y, ends, HEIGHT - BOTTOM, TOP)
    body = [*_frame(across, up)]
    if mark is not None:
        body += _mark(across, mark)
    for line in lines:
        body += _line(line, across, up)
    legend = [(line.name, line.color % COLORS, "dashed" if line.dashed else "line") for line in lines if not line.faint]
    return Chart(picture(body, description), legend)


def _frame(across: Scale, up: Scale) -> list[Markup]:
    """Grid, ticks and labels."""
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, WIDTH - RIGHT, f"{y:.1f}", f"{y:.1f}"
            )
        )
        parts.append(text(LEFT - 8, y + 4, number(value, up.axis.percent), "tick", "end"))
    for value in across.ticks():
        words = number(value, across.axis.percent)
        over = across(value) + CHARACTER * len(words) / 2 > WIDTH
        x, anchor = (WIDTH - 1, "end") if over else (across(value), "middle")
        parts.append(text(x, HEIGHT - BOTTOM + 18, words, "tick", anchor))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, across.axis.label, "label"))
    parts.append(text(2, 14, up.axis.label, "label", "start"))
    return parts


def _mark(across: Scale, mark: tuple[float, str]) -> list[Markup]:
    at, name = across(mark[0]), mark[1]
    right = at > (LEFT + WIDTH) / 2
    return [
        Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(f"{at:.1f}", TOP, HEIGHT - BOTTOM),
        text(at - 5 if right else at + 5, HEIGHT - BOTTOM - 8, name, "tick", "end" if right else "start"),
    ]


def _line(line: Line, across: Scale, up: Scale) -> list[Markup]:
    color, points = line.color % COLORS, _thinned(line)
    placed = [(across(x), up(y)) for x, y in points]
    parts: list[Markup] = []
    band = [(across(x), up(a), up(b)) for x, a, b in zip(line.x, line.low, line.high) if None not in (a, b)]  # type: ignore[arg-type]  # noqa: B905
    if len(band) > 1:
        outline = path([(x, low) for x, low, _ in band] + [(x, high) for x, _, high in band[::-1]]) + "Z"
        parts.append(Markup('<path class="band" style="--c:var(--s{})" d="{}"/>').format(color, outline))
    css = "line" + (" dashed" if line.dashed else "") + (" faint" if line.faint else "")
    parts.append(Markup('<path class="{}" style="--c:var(--s{})" d="{}"/>').format(css, color, path(placed)))
    if len(points) <= MANY_POINTS:
        for (x, y), at in zip(points, placed, strict=True):
            parts.append(_dot(line, x, y, at))
    return parts


def _dot(line: Line, x: float, y: float, at: tuple[float, float]) -> Markup:
    words = f"{line.name}: {number(y)} at {number(x)}"
    index = list(line.x).index(x)
    if len(line.low) > index and line.low[index] is not None and line.high[index] is not None:
        words += f" (95 %: {number(line.low[index] or 0.0)} to {number(line.high[index] or 0.0)})"
    return Markup('<circle class="dot" style="--c:var(--s{})" cx="{}" cy="{}" r="3.5">{}</circle>').format(
        line.color % COLORS, f"{at[0]:.1f}", f"{at[1]:.1f}", tooltip(words)
    )


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
    left = 14 + CHARACTER * max(map(len, rows))
    width, height = (WIDTH - left - 6) / len(columns), 32
    top = TOP if row_label else 4
    body = []
    for i, row in enumerate(rows):
        body.append(text(left - 8, top + i * height + height / 2 + 4, row, "tick", "end"))
        for j, column in enumerate(columns):
            if (value := cells.get((row, column))) is not None:
                body.append(_cell(left + j * width, top + i * height, width, height, value, low, high, row, column))
    bottom = top + len(rows) * height
    body += [text(left + (j + 0.5) * width, bottom + 18, column, "tick") for j, column in enumerate(columns)]
    body.append(text(left + (WIDTH - left) / 2, bottom + 38, column_label, "label"))
    body.append(text(2, 14, row_label, "label", "start"))
    return Chart(picture(body, description, bottom + 46))


def _cell(
    x: float, y: float, width: float, height: float, value: float, low: float, high: float, row: str, column: str
) -> Markup:
    part = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
    part = round(part * HEAT_STEPS) / HEAT_STEPS
    words = f"{value:.2f}" if 0 <= abs(value) <= 1 else number(value)
    return Markup('<g class="cell" style="--p:{}%"><rect x="{}" y="{}" width="{}" height="{}" rx="3"/>{}{}</g>').format(
        f"{100 * part:.0f}",
        f"{x + 1:.1f}",
        f"{y + 1:.1f}",
        f"{width - 2:.1f}",
        f"{height - 2:.1f}",
        text(x + width / 2, y + height / 2 + 4, words, "in-high" if part > HEAT_TURN else "in-low"),
        tooltip(f"{row}, {column}: {words}"),
    )


def histogram(bins: Sequence[tuple[str, float]], description: str, x_label: str, y_label: str) -> Chart:
    """Bars side by side, one a bin: (name, count)."""
    up = scale(Axis(y_label, low=0.0), [count for _, count in bins], HEIGHT - BOTTOM, TOP)
    across = Scale(Axis(x_label, ticks=()), 0.0, float(len(bins)), LEFT, WIDTH - RIGHT)
    body = [*_frame(across, up)]
    every = math.ceil(len(bins) / 8)
    for i, (name, count) in enumerate(bins):
        left, right, y = across(i + 0.08), across(i + 0.92), up(count)
        body.append(
            Markup('<rect class="part only" x="{}" y="{}" width="{}" height="{}" rx="2">{}</rect>').format(
                f"{left:.1f}", f"{y:.1f}", f"{right - left:.1f}", f"{up(0.0) - y:.1f}",
                tooltip(f"{name}: {count:,.0f}"),
            )
        )  # fmt: skip
        if i % every == 0:
            body.append(text((left + right) / 2, HEIGHT - BOTTOM + 18, name, "tick"))
    return Chart(picture(body, description))


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], names: Sequence[str], description: str
) -> Chart:
    """Horizontal bars of 100 %, a row each: (name, [(part, share 0..1)]); `names` orders the parts' colours."""
    height, body = 52, []
    for i, (name, parts) in enumerate(bars):
        y, x = i * height, 6.0
        body.append(text(6, y + 14, name, "tick", "start"))
        for part, share in parts:
            width = share * (WIDTH - 12)
            body.append(
                Markup('<rect class="part" style="--c:var(--s{})" x="{}" y="{}" width="{}" height="20">{}</rect>')
                .format(
                    (names.index(part) + 1) % COLORS, f"{x:.1f}", y + 21, f"{max(width, 0):.1f}",
                    tooltip(f"{name}, {part}: {100 * share:.2f} %"),
                )
            )  # fmt: skip
            if width > 46:
                body.append(text(x + width / 2, y + 35, f"{100 * share:.1f} %", "on-part"))
            x += width
    return Chart(
        picture(body, description, len(bars) * height),
        [(name, (i + 1) % COLORS, "fill") for i, name in enumerate(names)],
    )
