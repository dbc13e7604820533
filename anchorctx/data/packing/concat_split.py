"""`concat_split`: documents end to end; what reaches over the row's end continues in the next row.

The continuation is a new document for the attention. Only the last row is padded, except where the room left in a row
is too little for a piece of `min_length`: then that room is padded too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anchorctx.data.packing.accounting import SHORT, Accounting
from anchorctx.data.packing.pieces import PIECE, Rows, cut_pieces


class ConcatSplit:
    """Pieces end to end, cut at the row's end."""

    def __init__(self, capacity: int, min_length: int, accounting: Accounting) -> None:
        self._capacity, self._min_length, self._accounting = capacity, min_length, accounting
        self._open = np.empty(0, PIECE)  # of the last row, which is not full

    def add(self, pieces: np.ndarray) -> Iterator[Rows]:
        """Fill rows with the pieces until they are used up; the last row stays open."""
        if not len(pieces):
            return
        is_plain = self._min_length == 1 and bool((pieces["size"] == pieces["length"]).all())
        # ends = [3, 5]: the first full row ends after the open pieces and cut[:3], the next after cut[3:5]
        cut, ends = (self._cut_plain if is_plain else self._cut_one_by_one)(pieces)
        if len(ends):
            yield Rows(np.concatenate([self._open, cut[: ends[-1]]]), ends + len(self._open))
            self._open, cut = np.empty(0, PIECE), cut[ends[-1] :]
        self._open = np.concatenate([self._open, cut])

    def finish(self) -> Iterator[Rows]:
        """Close the row."""
        if len(self._open):
            yield Rows(self._open, np.array([len(self._open)]))
        self._open = np.empty(0, PIECE)

    def _cut_plain(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces cut at rows' ends, and where in them full rows end: no tags, nothing dropped."""
        # rows of 8 tokens, none open, documents of 20 and 5:
        # ends = [20, 25], row_ends = [8, 16, 24], cuts = [8, 16, 20, 24, 25], owner = [0, 0, 0, 1, 1],
        # starts = [0, 8, 16, 20, 24], skip = [0, 8, 16, 0, 4]; rows end after pieces [1, 2, 4], the fifth stays open
        used = int(self._open["size"].sum())
        ends = used + np.cumsum(pieces["length"])
        row_ends = np.arange(self._capacity, int(ends[-1]) + 1, self._capacity)
        cuts = np.union1d(row_ends, ends)  # the end of each new piece, in tokens since the open row began
        owner = np.searchsorted(ends, cuts)
        starts = np.concatenate([[used], cuts[:-1]])
        skip = starts - (ends - pieces["length"])[owner]
        return cut_pieces(pieces[owner], cuts - starts, skip), np.searchsorted(cuts, row_ends) + 1

    def _cut_one_by_one(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same with tags, which each new piece repeats, and with a least length of pieces."""
        # rows of 8, tags of 1, min_length 3, a document of 9: a piece of 7 (with its tag 8) fills a row, the other 2
        # tokens are dropped; were the document of 10, they would be 3, a piece of the next row
        owner, skips, lengths, ends = [], [], [], []
        room = self._capacity - int(self._open["size"].sum())
        has_open = bool(len(self._open))
        tags = (pieces["size"] - pieces["length"]).tolist()
        for index, (left, tag) in enumerate(zip(pieces["length"].tolist(), tags, strict=True)):
            skip = 0
            while left:
                if room - tag < min(self._min_length, left):
                    # too little room for a piece of min_length: pad the row and try again in the next
                    assert has_open, "a piece of min_length and its tag must fit into a row"
                    ends.append(len(owner))
                    room, has_open = self._capacity, False
                    continue
                taken = min(left, room - tag)
                owner.append(index)
                skips.append(skip)
                lengths.append(taken)
                skip, left, room, has_open = skip + taken, left - taken, room - tag - taken, True
                if left < self._min_length:  # too short to be a piece in the next row
                    self._accounting.drop(SHORT, pieces["source"][index : index + 1], np.array([left]))
                    left = 0
                if not room:
                    ends.append(len(owner))
                    room, has_open = self._capacity, False
        where = np.array(owner, np.int64)
        return cut_pieces(pieces[where], np.array(lengths, np.int64), np.array(skips, np.int64)), np.array(
            ends, np.int64
        )
