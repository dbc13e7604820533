"""Pieces to one row of exactly T tokens: anchor, documents (in chunks where interleaved), padding; and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.data.accounting import Accounting
from anchorctx.data.shards import Row
from anchorctx.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class RowShape:
    """What all rows share."""

    row_length: int
    """Tokens in a row, `T`."""
    anchor_len: int
    """Anchor tokens at its start, at least 1."""
    anchor_id: int
    """Token id of the anchor."""
    pad_id: int
    """Token id of the padding."""

    @property
    def capacity(self) -> int:
        """Tokens that a row has for documents."""
        return self.row_length - self.anchor_len


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one, that goes into a row: alone there for the attention."""

    number: int
    """Of the document in the corpus: pieces keep this order inside a row."""
    ids: np.ndarray
    """(n,) uint32 content, n >= 1."""
    weights: np.ndarray | None
    """(n,) float32 loss weights; None is 1 everywhere."""
    tag: np.ndarray
    """(m,) uint32 tokens in front of the content, never trained; m may be 0."""

    def __len__(self) -> int:
        return len(self.tag) + len(self.ids)

    def cut(self, start: int, stop: int) -> Piece:
        """The piece with content tokens start..stop of this one, and the same tag."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Piece(self.number, self.ids[start:stop], weights, self.tag)


@dataclass(frozen=True, slots=True)
class Segments:
    """Contiguous runs of pieces, in the order of the row: S segments."""

    piece: np.ndarray
    """(S,) index of each segment's piece."""
    start: np.ndarray
    """(S,) where it starts inside the piece, tag included."""
    length: np.ndarray
    """(S,) tokens, at least 1."""


def assemble(
    pieces: Sequence[Piece], shape: RowShape, chunks: int, rng: np.random.Generator, accounting: Accounting
) -> Row:
    """One row, its tokens added to `accounting`.

    Labels: a token is trained where its loss weight is not 0, it is content, and the token before it in the row is the
    same document's. So neither the anchor nor a document's first token is, nor the first token of a later chunk.
    """
    segments = scatter(np.array([len(piece) for piece in pieces]), chunks, rng)
    order = _token_order([len(piece) for piece in pieces], segments)
    content = np.concatenate([part for p in pieces for part in (np.zeros(len(p.tag), bool), np.ones(len(p.ids), bool))])
    ids = np.concatenate([part for piece in pieces for part in (piece.tag, piece.ids)])
    weights = np.concatenate([_weights(piece) for piece in pieces])
    tail = shape.capacity - len(ids)
    if tail < 0:
        raise ValueError(f"pieces of {len(ids)} tokens do not fit into a row's {shape.capacity}")
    head = shape.anchor_len
    row_ids = np.concatenate([np.full(head, shape.anchor_id), ids[order], np.full(tail, shape.pad_id)]).astype(np.int64)
    row_weights = np.pad(weights[order], (head, tail))
    is_content = np.pad(content[order], (head, tail))
    layout = _layout(segments, shape, len(pieces), tail)
    docs = layout.token_docs()
    follows = np.append(False, docs[1:] == docs[:-1])
    trained = is_content & follows & (row_weights > 0)
    accounting.rows += 1
    accounting.pieces += len(pieces)
    accounting.anchor += head
    accounting.padding += tail
    accounting.tags += sum(len(piece.tag) for piece in pieces)
    accounting.trained += int(np.count_nonzero(trained))
    accounting.first_tokens += int(np.count_nonzero(is_content & ~follows))
    accounting.zero_weight += int(np.count_nonzero(is_content & follows & ~trained))
    return Row(row_ids, np.where(trained, row_weights, np.float32(0)), layout)


def scatter(lengths: np.ndarray, chunks: int, rng: np.random.Generator) -> Segments:
    """Cut each piece into `chunks` nearly equal chunks (fewer if it is shorter) and shuffle them over the row.

    A piece's chunks keep their order; those that come to lie side by side are one segment.
    """
    if chunks == 1 or len(lengths) == 1:
        return Segments(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    counts = np.minimum(lengths, chunks)
    owner = rng.permutation(np.repeat(np.arange(len(lengths)), counts))
    by_owner = np.argsort(owner, kind="stable")
    rank = np.empty_like(owner)  # how many chunks of the same piece come before
    rank[by_owner] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = rank * lengths[owner] // counts[owner]
    length = (rank + 1) * lengths[owner] // counts[owner] - start
    first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    return Segments(owner[first], start[first], np.add.reduceat(length, first))


def _token_order(lengths: list[int], segments: Segments) -> np.ndarray:
    """Where each token of the row's middle lies in the pieces laid end to end."""
    offsets = np.cumsum([0, *lengths])[segments.piece] + segments.start
    ends = np.cumsum(segments.length)
    return np.arange(ends[-1]) + np.repeat(offsets - (ends - segments.length), segments.length)


def _layout(segments: Segments, shape: RowShape, pieces: int, tail: int) -> PackedLayout:
    lengths = [shape.anchor_len, *segments.length.tolist(), *([tail] if tail else [])]
    offsets = (0, *np.cumsum(lengths).tolist())
    if len(segments.piece) == pieces:
        return PackedLayout(offsets, shape.anchor_len)
    ids = (0, *(segments.piece + 1).tolist(), *([pieces + 1] if tail else []))
    return PackedLayout(offsets, shape.anchor_len, doc_ids=ids)


def _weights(piece: Piece) -> np.ndarray:
    """(m + n,) float32, in the precision in which they are stored (float16)."""
    if piece.weights is None:
        return np.ones(len(piece), dtype=np.float32)
    stored = piece.weights.astype(np.float16).astype(np.float32)
    if not np.isfinite(stored).all() or (stored < 0).any() or ((stored == 0) != (piece.weights == 0)).any():
        raise ValueError("loss weights must be 0 or within 1e-7 to 65504, the range of float16")
    return np.concatenate([np.zeros(len(piece.tag), dtype=np.float32), stored])
