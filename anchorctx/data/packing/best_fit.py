"""`best_fit`: best-fit decreasing over a buffer of documents; no document that fits into a row is cut.

The longest piece first, each goes into the fullest row that still has room for it: at most 11/9 of the least possible
number of rows, and one (Johnson 1973). The buffer bounds the memory; the emptiest quarter of its rows is packed with
the next buffer.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from anchorctx.data.packing.pieces import PIECE, Rows

BUFFER_PIECES = 2**18
"""Pieces in a buffer, at most."""


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """(n,) int64: the row of each of `sizes` (n,) int64, 1..capacity; rows hold at most `capacity` tokens.

    Of rows with equal room the one that changed last is taken, so that the result is deterministic. Equal sizes are
    handled together, and the row is found by bisection in the list of different rooms: some 0.3 us a piece.
    """
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"sizes must be 1..{capacity}, got {sizes.min()}..{sizes.max()}")
    # capacity 8, sizes = [3, 5, 2, 3]: 5 opens row 0 (room 3), a 3 fills it, the other 3 opens row 1, which takes the 2
    # different = [-5, -3, -2], counts = [1, 2, 1], rows = [0, 0, 1, 1], runs = [1, 1, 1, 1], result = [0, 0, 1, 1]
    order = np.argsort(-sizes, kind="stable")
    different, counts = np.unique(-sizes, return_counts=True)
    rows: list[int] = []  # of the pieces in `order`, run-length encoded
    runs: list[int] = []
    rooms: list[int] = []  # different rooms of open rows, sorted
    stacks: dict[int, list[int]] = {}  # the open rows with each room
    opened = 0
    for size, count in zip((-different).tolist(), counts.tolist(), strict=True):
        while count:
            at = bisect_left(rooms, size)
            if at == len(rooms):  # no open row has room: open another
                room, row = capacity, opened
                opened += 1
            else:  # the fullest row that has room, `rooms[at]` being the least that is enough
                room = rooms[at]
                row = stacks[room].pop()
                if not stacks[room]:
                    del stacks[room], rooms[at]
            taken = min(count, room // size)
            rows.append(row)
            runs.append(taken)
            count -= taken
            room -= taken * size
            if room:
                if room not in stacks:
                    stacks[room] = []
                    insort(rooms, room)
                stacks[room].append(row)
    result = np.empty(len(sizes), np.int64)
    result[order] = np.repeat(np.array(rows, np.int64), np.array(runs, np.int64))
    return result


class BestFit:
    """Best-fit decreasing over a buffer. The emptiest quarter of its rows, at least one, is packed with the next."""

    def __init__(self, capacity: int, buffer_tokens: int) -> None:
        self._capacity, self._limit = capacity, max(buffer_tokens, 4 * capacity)
        self._waiting: list[np.ndarray] = []
        self._tokens, self._added = 0, 0

    def add(self, pieces: np.ndarray) -> Iterator[Rows]:
        """Keep the pieces; pack whenever the buffer is full. How calls divide the pieces changes nothing."""
        while len(pieces):
            # 60 tokens waiting, a limit of 100, sizes 30, 20, 10: totals = [90, 110, 120], so 2 pieces fill the buffer
            totals = self._tokens + np.cumsum(pieces["size"])
            full = int(np.searchsorted(totals, self._limit)) + 1  # pieces that fill the buffer
            taken = min(full, len(pieces), BUFFER_PIECES - self._added)
            self._waiting.append(pieces[:taken])
            self._tokens, self._added = int(totals[taken - 1]), self._added + taken
            pieces = pieces[taken:]
            if self._tokens >= self._limit or self._added >= BUFFER_PIECES:
                yield from self._pack(is_last=False)

    def finish(self) -> Iterator[Rows]:
        """Pack what is left."""
        yield from self._pack(is_last=True)

    def _pack(self, is_last: bool) -> Iterator[Rows]:
        buffer = np.concatenate([np.empty(0, PIECE), *self._waiting])
        row = best_fit_decreasing(buffer["size"], self._capacity)
        filled = np.bincount(row, buffer["size"]).astype(np.int64)
        kept = np.zeros(len(filled), bool) if is_last else self._emptiest(filled)
        stays = kept[row] if len(row) else np.empty(0, bool)
        self._waiting = [buffer[stays]]
        self._tokens, self._added = int(buffer["size"][stays].sum()), 0
        if not stays.all():
            yield in_order(buffer[~stays], row[~stays])

    def _emptiest(self, filled: np.ndarray) -> np.ndarray:
        """(R,) bool: the rows to pack again."""
        count = max(len(filled) // 4, 1)
        # of 8 rows the 2 emptiest, unless they are full: repacking a full row could not improve it
        emptiest = np.argsort(filled, kind="stable")[:count]
        kept = np.zeros(len(filled), bool)
        kept[emptiest] = filled[emptiest] < self._capacity
        return kept


def in_order(pieces: np.ndarray, row: np.ndarray) -> Rows:
    """Rows in the order of their earliest documents, so that the first are not all of long ones; pieces in order too.

    `row` (P,) numbers the row of each of `pieces` (P,).
    """
    # documents 2, 0, 1 in row = [0, 1, 0]: sorted by row they are [1, 2, 0], counts = [2, 1], starts = [0, 2]; the row
    # of document 0 comes first, so by_first = [1, 0], ends = [1, 3] and the documents are [0, 1, 2]
    order = np.lexsort((pieces["start"], pieces["document"], row))
    pieces, row = pieces[order], row[order]
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    counts = np.diff(starts, append=len(row))
    by_first = np.argsort(pieces["document"][starts], kind="stable")
    counts, starts = counts[by_first], starts[by_first]
    ends = np.cumsum(counts)
    return Rows(pieces[np.arange(len(row)) + np.repeat(starts - (ends - counts), counts)], ends)
