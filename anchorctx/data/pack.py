"""Documents to rows: which pieces share a row. Nothing of a document is lost without being counted.

Every policy works on whole pieces in numpy views; there is no loop over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from anchorctx.data.accounting import Accounting
from anchorctx.data.assemble import Piece, RowShape, assemble
from anchorctx.data.bins import best_fit_decreasing
from anchorctx.data.shards import Row
from anchorctx.errors import UserError

BUFFER_PIECES = 2**18
"""Pieces that best fit takes in before it packs, at most."""


class Policy(StrEnum):
    """Which documents share a row."""

    best_fit = "best_fit"
    """Best-fit decreasing over a buffer of documents: none that fits into a row is cut, little is padded."""
    concat_split = "concat_split"
    """In order; what reaches over the row's end continues in the next row as a document of its own. No padding."""
    one_per_row = "one_per_row"
    """Each document has a row; the rest is padding."""


class LongDocuments(StrEnum):
    """What becomes of documents longer than a row."""

    split = "split"  # type: ignore[assignment]  # hides str.split, which nobody calls on it
    """Cut into pieces that fill a row, and the remainder."""
    truncate = "truncate"
    """Only the beginning is kept."""
    drop = "drop"
    """Left out."""


@dataclass(kw_only=True, slots=True)
class PackConfig:
    """How documents become rows."""

    policy: Policy = Policy.best_fit
    """best_fit, concat_split or one_per_row."""
    long_documents: LongDocuments = LongDocuments.split
    """Documents longer than a row: split, truncate or drop. What is dropped is counted."""
    min_length: int = 1
    """Tokens; shorter documents, and shorter pieces left over by cutting, are dropped and counted. 1 keeps all."""
    domain_tags: bool = False
    """Begin each document with the name of its domain, never trained (the paper's domain tagging)."""
    interleave: int = 1
    """Chunks into which each document is cut, scattered over its row in order; 1 leaves documents whole."""
    buffer_tokens: int = 2**25
    """Tokens that best_fit looks at together, at least four rows: 4 bytes of memory each, 8 with loss weights."""

    def validate(self, capacity: int) -> None:
        """UserError for values out of range; `capacity` is a row's tokens without the anchor."""
        if not 1 <= self.min_length <= capacity:
            raise UserError(f"pack.min_length={self.min_length} must be 1 to {capacity}, what a row holds: change it")
        if self.interleave < 1:
            raise UserError(
                f"pack.interleave={self.interleave} must be at least 1: use 1 for whole documents, or 2 or 3"
            )
        if self.buffer_tokens < 1:
            raise UserError(f"pack.buffer_tokens={self.buffer_tokens} must be positive: leave it at its default")


class Packer:
    """Takes documents one after the other and gives rows back as they fill up; deterministic."""

    def __init__(self, config: PackConfig, shape: RowShape, seed: int = 0) -> None:
        config.validate(shape.capacity)
        self.accounting = Accounting()
        self._config, self._shape, self._seed = config, shape, seed
        self._documents = 0
        self._placement = _placement(config, shape.capacity, self.accounting)

    def add(self, ids: np.ndarray, weights: np.ndarray | None, tag: np.ndarray, eos_tokens: int = 0) -> Iterator[Row]:
        """Take one document and yield the rows that are complete.

        Args:
            ids: (n,) uint32, n >= 1, an appended EOS included.
            weights: (n,) float32 loss weights, or None for 1 everywhere.
            tag: (m,) uint32 tokens to put in front of it and of each of its pieces; m may be 0.
            eos_tokens: how many of `ids` are EOS tokens that were appended.
        """
        if len(tag) + self._config.min_length > self._shape.capacity:
            raise UserError(
                f"a domain tag of {len(tag)} tokens leaves no room in rows of {self._shape.row_length}: "
                "use longer rows, or pack.domain_tags=false"
            )
        self.accounting.document_tokens += len(ids) - eos_tokens
        self.accounting.eos_tokens += eos_tokens
        document = Piece(self._documents, ids, weights, tag)
        self._documents += 1
        for piece in self._cut(document):
            yield from self._rows(self._placement.add(piece))

    def finish(self) -> Iterator[Row]:
        """Yield the remaining rows; raises RuntimeError unless every token is accounted for."""
        yield from self._rows(self._placement.finish())
        self.accounting.check(self._shape.row_length)

    def _cut(self, document: Piece) -> Iterator[Piece]:
        """Apply the policies for short and long documents."""
        n, room = len(document.ids), self._shape.capacity - len(document.tag)
        dropped, long_documents = self.accounting.dropped, self._config.long_documents
        if n < self._config.min_length:
            dropped["shorter than min_length"] += n
        elif n <= room:
            yield document
        elif long_documents is LongDocuments.drop:
            dropped["longer than a row"] += n
        elif long_documents is LongDocuments.truncate:
            dropped["truncated"] += n - room
            yield document.cut(0, room)
        elif self._config.policy is Policy.concat_split:
            yield document  # it is cut where rows end
        else:
            for start in range(0, n, room):
                piece = document.cut(start, min(start + room, n))
                if len(piece.ids) < self._config.min_length:
                    dropped["shorter than min_length"] += len(piece.ids)
                else:
                    yield piece

    def _rows(self, groups: Iterable[list[Piece]]) -> Iterator[Row]:
        for group in groups:
            rng = np.random.default_rng([self._seed, self.accounting.rows])
            group.sort(key=lambda piece: piece.number)
            yield assemble(group, self._shape, self._config.interleave, rng, self.accounting)


class Placement(Protocol):
    """Decides which pieces share a row."""

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """Take a piece; yield the groups of pieces that now make a row."""
        ...

    def finish(self) -> Iterator[list[Piece]]:
        """Yield the remaining groups."""
        ...


def _placement(config: PackConfig, capacity: int, accounting: Accounting) -> Placement:
    if config.policy is Policy.one_per_row:
        return OnePerRow()
    if config.policy is Policy.concat_split:
        return ConcatSplit(capacity, config.min_length, accounting)
    return BestFit(capacity, config.buffer_tokens)


class OnePerRow:
    """Each piece in a row of its own."""

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """The piece is the row."""
        yield [piece]

    def finish(self) -> Iterator[list[Piece]]:
        """Nothing is left."""
        return iter(())


class ConcatSplit:
    """Pieces end to end, cut at the row's end.

    Room that is too small for a piece of `min_length` is padded rather than filled with a piece that would be dropped.
    """

    def __init__(self, capacity: int, min_length: int, accounting: Accounting) -> None:
        self._capacity, self._min_length, self._dropped = capacity, min_length, accounting.dropped
        self._row: list[Piece] = []
        self._room = capacity

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """Fill rows with the piece until it is used up."""
        while len(piece.ids):
            room = self._room - len(piece.tag)
            if room < min(self._min_length, len(piece.ids)):
                yield from self.finish()
                continue
            head, piece = piece.cut(0, room), piece.cut(room, len(piece.ids))
            self._row.append(head)
            self._room -= len(head)
            if 0 < len(piece.ids) < self._min_length:
                self._dropped["shorter than min_length"] += len(piece.ids)
                piece = piece.cut(0, 0)
            if not self._room:
                yield from self.finish()

    def finish(self) -> Iterator[list[Piece]]:
        """Close the row."""
        if self._row:
            yield self._row
        self._row, self._room = [], self._capacity


class BestFit:
    """Best-fit decreasing over a buffer. The emptiest quarter of its rows, at least one, is packed with the next."""

    def __init__(self, capacity: int, buffer_tokens: int) -> None:
        self._capacity, self._limit = capacity, max(buffer_tokens, 4 * capacity)
        self._buffer: list[Piece] = []
        self._tokens, self._added = 0, 0

    def add(self, piece: Piece) -> Iterator[list[Piece]]:
        """Keep the piece; pack when the buffer is full."""
        self._buffer.append(piece)
        self._tokens, self._added = self._tokens + len(piece), self._added + 1
        if self._tokens >= self._limit or self._added >= BUFFER_PIECES:
            rows = sorted(self._pack(), key=_size)
            keep = max(len(rows) // 4, 1)
            while keep and _size(rows[keep - 1]) == self._capacity:
                keep -= 1
            self._buffer = [piece for row in rows[:keep] for piece in row]
            self._tokens, self._added = sum(map(len, self._buffer)), 0
            yield from sorted(rows[keep:], key=_first)

    def finish(self) -> Iterator[list[Piece]]:
        """Pack what is left."""
        yield from sorted(self._pack(), key=_first)
        self._buffer, self._tokens = [], 0

    def _pack(self) -> list[list[Piece]]:
        lengths = np.array([len(piece) for piece in self._buffer], dtype=np.int64)
        return [[self._buffer[i] for i in row] for row in best_fit_decreasing(lengths, self._capacity)]


def _size(row: list[Piece]) -> int:
    return sum(map(len, row))


def _first(row: list[Piece]) -> int:
    """Rows come in the order of their earliest documents, so that the first rows are not all of long ones."""
    return min(piece.number for piece in row)
