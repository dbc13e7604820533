"""Numbers as a reader wants them, for axes, cells and sentences."""

from __future__ import annotations

import math

from anchorctx.records.results import Result


def number(value: float, percent: bool = False, digits: int = 3) -> str:
    """Short, for axes and cells: 4,096, 0.93, 1.2e-5, 38 %; from a million on as 1.2M, 3B (billions) or 4T."""
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
        # Python writes 1.0e-05; a reader wants 1e-5.
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{digits}g}"


def percent(share: float, digits: int = 0) -> str:
    """A share (0 to 1) with a fixed number of decimals: 59 %."""
    return f"{100 * share:.{digits}f} %"


def with_interval(result: Result, as_percent: bool = False) -> str:
    """The value and, where it is known, its 95 % interval: 0.812 (0.790 to 0.833)."""
    value = _decimals(result.value, as_percent)
    if result.low is None or result.high is None:
        return value
    return f"{value} ({_decimals(result.low, as_percent)} to {_decimals(result.high, as_percent)})"


def _decimals(value: float, as_percent: bool) -> str:
    # Decimals are fixed, unlike in `number`: the rows of a column shall line up.
    if as_percent:
        return percent(value, 1)
    return f"{value:,.3f}" if abs(value) <= 1 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
