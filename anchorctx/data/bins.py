"""Best-fit decreasing: put each piece, the longest first, into the fullest row that still has room for it."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

_BITS = 32
"""A row with room r and number b is kept as the integer `r << 32 | b`, so that rows sort by room."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths` (n,) int64, each 1..capacity, grouped into rows of at most `capacity` tokens.

    Deterministic; O(n log n) comparisons (a sorted list of the rows with room is searched by bisection). Johnson 1973:
    at most 11/9 of the optimal number of rows, and one.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    open_rows: list[int] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(open_rows, length << _BITS)
        if at == len(open_rows):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = divmod(open_rows.pop(at), 1 << _BITS)
        rows[row].append(index)
        if room > length:
            insort(open_rows, (room - length) << _BITS | row)
    return rows
