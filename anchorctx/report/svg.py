"""Scales, ticks and number formats: what charts share. Colours are CSS variables, so that a chart follows the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 280
"""Size of a chart in its own units; the page scales it to its column."""
COLORS = 6
"""Series colours in the style sheet: --s0 to --s5."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart."""

    label: str
    log: int | None = None
    """Base of a logarithmic scale; None is linear."""
    low: float | None = None
    """Where it begins; None follows the data."""
    high: float | None = None
    percent: bool = False
    """Numbers are shares, shown as per cent."""
    ticks: Sequence[float] | None = None
    """Where marks are; None chooses."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From a value to a coordinate."""

    axis: Axis
    low: float
    high: float
    start: float
    """Coordinate of `low`."""
    stop: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = self._level(self.low), self._level(self.high)
        part = (self._level(value) - low) / ((high - low) or 1.0)
        return self.start + part * (self.stop - self.start)

    def _level(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.axis.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Values to mark, round ones."""
        if self.axis.ticks is not None:
            return _thinned([t for t in self.axis.ticks if self.low <= t <= self.high], most)
        return _log_ticks(self.axis.log, self.low, self.high, most) if self.axis.log else _linear(self, most)


def scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> Scale:
    """A scale over `values`, with a little air unless the axis says where it ends."""
    values = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.log:
        grow = 1.0 if axis.ticks is not None else 1.25
        low = low / grow if axis.low is None else low
        high = high * grow if axis.high is None else high
        if low == high:
            low, high = low / axis.log, high * axis.log
    else:
        air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low = low - air if axis.low is None else low
        high = high + air if axis.high is None else high
    return Scale(axis, low, high, start, stop)


def _linear(scale: Scale, most: int) -> list[float]:
    raw = (scale.high - scale.low) / max(most - 1, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(scale.low / step - 1e-9)
    return [i * step for i in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _log_ticks(base: int, low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    ticks = [float(base) ** i for i in range(first, last + 1)]
    if len(ticks) < 2 and base == 10:
        ticks = [m * 10.0**i for i in range(first - 1, last + 1) for m in (1, 2, 5) if low <= m * 10.0**i <= high]
    return _thinned(ticks, most)


def _thinned(ticks: list[float], most: int) -> list[float]:
    every = max(math.ceil(len(ticks) / most), 1)
    return ticks[::-1][::every][::-1]


def number(value: float, percent: bool = False, digits: int = 3) -> str:
    """Short, for axes and cells: 4,096, 0.93, 1.2e-5, 38 %; large counts as 1.2M."""
    if percent:
        return f"{number(100 * value, digits=digits)} %"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        power = min(int(math.log10(size) // 3), 4)
        return f"{value / 1000**power:.3g}{' KMGT'[power].replace('G', 'B')}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{digits}g}"


def percent(share: float, digits: int = 0) -> str:
    """A share in words: 59 %."""
    return f"{100 * share:.{digits}f} %"


def text(x: float, y: float, content: str, css: str = "", anchor: str = "middle", **attributes: str) -> Markup:
    """A text element."""
    extra = Markup("").join(Markup(' {}="{}"').format(k.replace("_", "-"), v) for k, v in attributes.items())
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}"{}>{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, css, extra, content
    )


def tooltip(content: str) -> Markup:
    """What a pointer that rests on an element shows."""
    return Markup("<title>{}</title>").format(content)


def picture(body: Sequence[Markup], description: str, height: float = HEIGHT, width: float = WIDTH) -> Markup:
    """A whole SVG element; `description` is for those who do not see it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        f"{width:g}", f"{height:g}", description, Markup("").join(body)
    )


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a line through the points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


__all__ = [
    "COLORS",
    "HEIGHT",
    "WIDTH",
    "Axis",
    "Scale",
    "escape",
    "number",
    "path",
    "percent",
    "picture",
    "scale",
    "text",
    "tooltip",
]
