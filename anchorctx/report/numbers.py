"""Numbers as a reader wants them, for axes, cells and sentences."""

from __future__ import annotations

import math


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
