"""`min_length` and `long_documents`: what is too short is dropped, what is too long is cut, truncated or dropped.

Every token that is left out is counted under its reason.
"""

from __future__ import annotations

import numpy as np

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.config import LongDocuments
from anchorctx.data.packing.pieces import cut_pieces

SHORT, TRUNCATED, TOO_LONG = "shorter than min_length", "truncated", "longer than a row"
"""The reasons."""


def drop_short(pieces: np.ndarray, min_length: int, accounting: Accounting) -> np.ndarray:
    """The pieces (P,) PIECE of at least `min_length` tokens."""
    if min_length == 1:
        return pieces
    short = pieces["length"] < min_length
    accounting.drop(SHORT, pieces["source"][short], pieces["length"][short])
    return pieces[~short]


def fit_long(pieces: np.ndarray, capacity: int, policy: LongDocuments, accounting: Accounting) -> np.ndarray:
    """Pieces (Q,) PIECE of at most `capacity` tokens, tags included, made of `pieces` (P,)."""
    long = pieces["size"] > capacity
    if not long.any():
        return pieces
    if policy is LongDocuments.split:
        return split(pieces, capacity)
    if policy is LongDocuments.drop:
        accounting.drop(TOO_LONG, pieces["source"][long], pieces["length"][long])
        return pieces[~long]
    excess = np.maximum(pieces["size"] - capacity, 0)
    accounting.drop(TRUNCATED, pieces["source"], excess)
    return cut_pieces(pieces, pieces["length"] - excess)


def split(pieces: np.ndarray, capacity: int) -> np.ndarray:
    """Each piece cut into as many as it needs: all but the last fill a row, each has the tag again."""
    # capacity 8, a piece of 20 tokens without a tag: room = [8], counts = [3], rank = [0, 1, 2], skip = [0, 8, 16],
    # lengths = [8, 8, 4]
    room = capacity - (pieces["size"] - pieces["length"])
    counts = -(-pieces["length"] // room)
    owner = np.repeat(np.arange(len(pieces)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    skip = rank * room[owner]
    lengths = np.minimum(pieces["length"][owner] - skip, room[owner])
    return cut_pieces(pieces[owner], lengths, skip)
