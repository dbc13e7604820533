"""One of three answers to a claim that was written down before its runs."""

from __future__ import annotations


def answer(mean: float, interval: tuple[float, float] | None, margin: float) -> str:
    """Whether an effect of at least `margin` in the direction claimed is there, by its 95 % interval.

    `supported`: the interval is above 0 and the mean at least `margin`. `not supported`: the interval is below
    `margin`, or below 0. `undecided`: anything else, and without an interval.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    if low > 0 and mean >= margin:
        return "supported"
    return "not supported" if high < margin or high < 0 else "undecided"
