"""`interleave`: a document in chunks that are scattered over its row, order kept; still one document to the attention.

The paper tries it and finds that it hurts; it exists so that a user can see that for himself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Segments:
    """Contiguous runs of pieces, in the order of the row: S segments."""

    piece: np.ndarray
    """(S,) index of each segment's piece."""
    start: np.ndarray
    """(S,) where it starts inside the piece, tag included."""
    length: np.ndarray
    """(S,) tokens, at least 1."""


def scatter(lengths: np.ndarray, chunks: int, rng: np.random.Generator) -> Segments:
    """Cut each piece into `chunks` nearly equal chunks (fewer if it is shorter) and shuffle them over the row.

    A piece's chunks keep their order; those that come to lie side by side are one segment.
    """
    if chunks == 1 or len(lengths) == 1:
        return Segments(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    # lengths = [4, 2] in 2 chunks each, shuffled: owner = [0, 1, 1, 0], by_owner = [0, 3, 1, 2], rank = [0, 0, 1, 1],
    # start = [0, 0, 1, 2], length = [2, 1, 1, 2]; the two chunks of piece 1 touch, so segments have 2, 2, 2 tokens
    counts = np.minimum(lengths, chunks)
    owner = rng.permutation(np.repeat(np.arange(len(lengths)), counts))
    by_owner = np.argsort(owner, kind="stable")
    rank = np.empty_like(owner)  # how many chunks of the same piece come before
    rank[by_owner] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = rank * lengths[owner] // counts[owner]
    length = (rank + 1) * lengths[owner] // counts[owner] - start
    first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    return Segments(owner[first], start[first], np.add.reduceat(length, first))


def scatter_rows(sizes: np.ndarray, counts: np.ndarray, chunks: int, seed: int, first_row: int) -> Segments:
    """The segments of many rows, row after row; `counts` (R,) of the `sizes` (P,) belong to each.

    Each row has a random state of its own, of (`seed`, its number in the set): it does not matter who makes the row.
    """
    if chunks == 1:
        return Segments(np.arange(len(sizes)), np.zeros_like(sizes), sizes)
    parts, begin = [], 0
    for row, count in enumerate(counts.tolist()):
        rng = np.random.default_rng([seed, first_row + row])
        found = scatter(sizes[begin : begin + count], chunks, rng)
        parts.append((found.piece + begin, found.start, found.length))
        begin += count
    return Segments(*(np.concatenate(column) for column in zip(*parts, strict=True)))
