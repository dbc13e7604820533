"""Documents in, rows of pieces out, planned from lengths alone; every token that gets into no row is counted.

`min_length` drops what is too short, `long_documents` cuts, truncates or drops what is too long for a row, and a policy
(a `Placement`) decides which pieces share a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from anchorctx.data.packing.accounting import SHORT, TOO_LONG, TRUNCATED, Accounting
from anchorctx.data.packing.best_fit import BestFit
from anchorctx.data.packing.concat_split import ConcatSplit
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.pieces import Rows, cut_pieces
from anchorctx.errors import UserError


class Placement(Protocol):
    """Decides which pieces share a row."""

    def add(self, pieces: np.ndarray) -> Iterator[Rows]:
        """Take (P,) PIECE in order; yield the rows that are complete."""
        ...

    def finish(self) -> Iterator[Rows]:
        """Yield the remaining rows."""
        ...


class OnePerRow:
    """`one_per_row`: each piece in a row of its own; the rest of the row is padding."""

    def add(self, pieces: np.ndarray) -> Iterator[Rows]:
        """The pieces are the rows."""
        if len(pieces):
            yield Rows(pieces, np.arange(1, len(pieces) + 1))

    def finish(self) -> Iterator[Rows]:
        """Nothing is left."""
        return iter(())


class Packer:
    """Takes documents in order and gives rows back as they fill up; deterministic, however calls divide the corpus."""

    def __init__(self, config: PackConfig, capacity: int, longest_tag: int, accounting: Accounting) -> None:
        """`capacity` is a row's tokens without the anchor; dropped tokens are counted in `accounting`."""
        config.validate(capacity)
        if longest_tag + config.min_length > capacity:
            raise UserError(
                f"a domain tag of {longest_tag} tokens leaves no room in rows of {capacity} tokens beside the anchor: "
                "use longer rows, or pack.domain_tags=false"
            )
        self._config, self._capacity, self._accounting = config, capacity, accounting
        self._placement = _placement(config, capacity, accounting)

    def add(self, documents: np.ndarray) -> Iterator[Rows]:
        """Take (D,) PIECE, each a whole document, and yield the rows that are complete."""
        config = self._config
        # concat_split cuts at the rows' ends by itself; the other policies get no piece longer than a row. Cutting and
        # truncating leave remainders, which may be short again
        pieces = drop_short(documents, config.min_length, self._accounting)
        if config.policy is not Policy.concat_split or config.long_documents is not LongDocuments.split:
            pieces = fit_long(pieces, self._capacity, config.long_documents, self._accounting)
            pieces = drop_short(pieces, config.min_length, self._accounting)
        yield from self._placement.add(pieces)

    def finish(self) -> Iterator[Rows]:
        """Yield the remaining rows."""
        yield from self._placement.finish()


def _placement(config: PackConfig, capacity: int, accounting: Accounting) -> Placement:
    if config.policy is Policy.one_per_row:
        return OnePerRow()
    if config.policy is Policy.concat_split:
        return ConcatSplit(capacity, config.min_length, accounting)
    return BestFit(capacity, config.buffer_tokens)


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
    # capacity 8, sizes = [5, 11]: excess = [0, 3], and the second piece keeps its first tokens
    excess = np.maximum(pieces["size"] - capacity, 0)
    accounting.drop(TRUNCATED, pieces["source"], excess)
    return cut_pieces(pieces, pieces["length"] - excess)


def split(pieces: np.ndarray, capacity: int) -> np.ndarray:
    """Each piece (P,) cut into as many (Q,) as it needs: all but the last fill a row; each repeats the tag."""
    # capacity 8, a piece of 20 tokens without a tag: room = [8], counts = [3], rank = [0, 1, 2], skip = [0, 8, 16],
    # lengths = [8, 8, 4]
    room = capacity - (pieces["size"] - pieces["length"])
    counts = -(-pieces["length"] // room)
    owner = np.repeat(np.arange(len(pieces)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    skip = rank * room[owner]
    lengths = np.minimum(pieces["length"][owner] - skip, room[owner])
    return cut_pieces(pieces[owner], lengths, skip)
