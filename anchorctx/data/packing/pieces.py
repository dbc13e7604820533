"""What packing works on: arrays of references to documents' tokens, never the tokens themselves.

Everything that decides which tokens share a row (`packer` and the policies) reads and writes these arrays, so that a
corpus is planned from its lengths alone and its tokens are copied once, by `assemble`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

PIECE = np.dtype(
    [
        ("document", "<i8"),  # number in the corpus, copies counted: pieces keep this order inside a row
        ("part", "<i4"),  # which of the token stores holds it
        ("start", "<i8"),  # its first token there
        ("length", "<i8"),  # its tokens, at least 1
        ("size", "<i8"),  # the tokens that it takes in a row: `length` and its tag's
        ("tag", "<i4"),  # which tag is put in front of it; 0 is none
        ("source", "<i4"),  # the source (or domain) that its tokens are counted under
    ]
)
"""A document, or a part of one, that goes into a row, where it is a document by itself for the attention."""


def make_pieces(lengths: np.ndarray, **fields: np.ndarray | int) -> np.ndarray:
    """(P,) PIECE with the given `lengths` (P,); fields left out are 0, `size` is `length` unless given."""
    pieces = np.zeros(len(lengths), PIECE)
    pieces["length"] = pieces["size"] = lengths
    for name, values in fields.items():
        pieces[name] = values
    return pieces


def cut_pieces(pieces: np.ndarray, lengths: np.ndarray, skip: np.ndarray | int = 0) -> np.ndarray:
    """The pieces with only `lengths` of their tokens, after the first `skip`; their tags stay."""
    # a piece of 20 tokens from 100 on, tag of 2, cut to 8 after 8: start = 108, length = 8, size = 22 - 12 = 10
    cut = pieces.copy()
    cut["start"] += skip
    cut["size"] += lengths - pieces["length"]
    cut["length"] = lengths
    return cut


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of pieces."""

    pieces: np.ndarray
    """(P,) PIECE, row after row."""
    ends: np.ndarray
    """(R,) int64: where in `pieces` each row ends."""

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def counts(self) -> np.ndarray:
        """(R,) pieces of each row."""
        return np.diff(self.ends, prepend=0)

    def part(self, start: int, stop: int) -> Rows:
        """Rows start..stop."""
        # ends = [2, 3, 6]: rows 1..3 are pieces 2..6 with ends = [1, 4]
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - first
        return Rows(self.pieces[first : first + int(ends[-1]) if len(ends) else first], ends)

    @classmethod
    def joined(cls, several: Iterable[Rows]) -> Rows:
        """All rows of `several`, in order."""
        # ends [2, 3] and [1, 4] of 3 and 4 pieces: [2, 3, 4, 7]
        pieces, ends, total = [np.empty(0, PIECE)], [np.empty(0, np.int64)], 0
        for rows in several:
            pieces.append(rows.pieces)
            ends.append(rows.ends + total)
            total += len(rows.pieces)
        return cls(np.concatenate(pieces), np.concatenate(ends))


@dataclass(slots=True)
class Tags:
    """What stands in front of documents and is never trained: BOS (`prepend_bos`) and domain names (`domain_tags`).

    Tags are numbered; number 0 is the empty tag.
    """

    ids: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint32)])
    """(m,) token ids of each."""

    @property
    def lengths(self) -> np.ndarray:
        """(number of tags,) int64: tokens of each."""
        return np.array([len(ids) for ids in self.ids], np.int64)

    def add(self, ids: np.ndarray) -> int:
        """The number of a new tag; 0 if it is empty."""
        if not len(ids):
            return 0
        self.ids.append(ids)
        return len(self.ids) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest tag."""
        return int(self.lengths.max())


class Text(Protocol):
    """The tokens of many documents end to end, and their loss weights."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens: uint16 or uint32."""
        ...

    @property
    def has_weights(self) -> bool:
        """Are there loss weights? Else each is 1."""
        ...

    def read_tokens(self, start: int, into: np.ndarray) -> None:
        """Fill `into` (n,) with the tokens from `start` on."""
        ...

    def read_weights(self, start: int, into: np.ndarray) -> None:
        """Fill `into` (n,) float16 with the loss weights from `start` on; 1 where there are none."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayText:
    """In memory."""

    tokens: np.ndarray
    """(N,)."""
    weights: np.ndarray | None = None
    """(N,) float16, or None."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return self.tokens.dtype

    @property
    def has_weights(self) -> bool:
        """Are there loss weights?"""
        return self.weights is not None

    def read_tokens(self, start: int, into: np.ndarray) -> None:
        """Copy tokens."""
        into[:] = self.tokens[start : start + len(into)]

    def read_weights(self, start: int, into: np.ndarray) -> None:
        """Copy loss weights."""
        into[:] = 1 if self.weights is None else self.weights[start : start + len(into)]
