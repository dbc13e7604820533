"""`long_documents`: what becomes of documents longer than a row. Cut, truncated or left out; the loss is counted."""

from __future__ import annotations

import numpy as np

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.config import LongDocuments
from anchorctx.data.packing.pieces import cut_pieces

TRUNCATED, TOO_LONG = "truncated", "longer than a row"
"""The reasons under which the tokens of long documents are counted."""


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
    room = capacity - (pieces["size"] - pieces["length"])
    counts = -(-pieces["length"] // room)
    owner = np.repeat(np.arange(len(pieces)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    skip = rank * room[owner]
    lengths = np.minimum(pieces["length"][owner] - skip, room[owner])
    return cut_pieces(pieces[owner], lengths, skip)
