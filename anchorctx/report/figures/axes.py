"""One direction of a chart: its scale, ends, ticks and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.report.figures.style import INK, load_matplotlib
from anchorctx.report.numbers import number

MOST_TICKS = 6


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
    """Where marks are; None chooses round values."""

    def apply(self, axes: Any, name: str, values: Sequence[float]) -> None:
        """Set scale, ends and ticks of matplotlib's `axes` in direction `name`, x or y, to show `values`."""
        low, high = self.ends(values)
        axes.set(**{f"{name}scale": "log" if self.log else "linear", f"{name}lim": (low, high)})
        axis, ticks = getattr(axes, f"{name}axis"), self._ticks(low, high)
        axis.set_ticks(ticks, [number(tick, self.percent) for tick in ticks])
        axis.set_minor_locator(load_matplotlib().ticker.NullLocator())

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """First and last value shown: a little beyond the data unless the axis says where it ends."""
        values = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)] or [1.0]
        low, high = min(values), max(values)
        if self.log:
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
            powers = [float(self.log) ** i for i in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
            if len(powers) > 1:
                return _thinned(powers)
        locator = load_matplotlib().ticker.MaxNLocator(MOST_TICKS - 1, steps=[1, 2, 2.5, 5, 10])
        return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _thinned(ticks: list[float]) -> list[float]:
    every = max(math.ceil(len(ticks) / MOST_TICKS), 1)
    return ticks[::-1][::every][::-1]


def label(axes: Any, x: str, y: str, left: float) -> None:
    """Name the directions: x below the middle, y above the left end, `left` units from the axes."""
    place = {"textcoords": "offset points", "xycoords": "axes fraction", "color": INK}
    axes.annotate(x, (0.5, 0), (0, -36), ha="center", **place)
    axes.annotate(y, (0, 1), (2 - left, 14), ha="left", **place)
