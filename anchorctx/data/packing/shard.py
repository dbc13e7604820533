"""Rows as the arrays of one shard: what `assemble` makes and `packed_set` stores."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

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
    chunks: int = 1
    """Chunks into which each document is scattered; 1 leaves it whole."""
    seed: int = 0
    """Seed of the scattering."""

    @property
    def capacity(self) -> int:
        """Tokens that a row has for documents."""
        return self.row_length - self.anchor_len


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row."""

    input_ids: np.ndarray
    """(T,) int64."""
    loss_weights: np.ndarray
    """(T,) float32; 0 is not trained."""
    layout: PackedLayout
    """Its first segment is the anchor; positions continuous."""


@dataclass(frozen=True, slots=True)
class Shard:
    """R rows of T tokens."""

    tokens: np.ndarray
    """(R, T) uint16 or uint32."""
    weights: np.ndarray
    """(R, T) uint8 where all are 0 or 1, else float16; 0 is not trained."""
    offsets: np.ndarray
    """Segment boundaries of all rows, `(0, ..., T)` each, flattened, int32."""
    doc_ids: np.ndarray
    """The document of each segment of the interleaved rows, flattened, int32."""
    pointers: np.ndarray
    """(R + 1, 2) int64: where each row's `offsets` and `doc_ids` begin."""
    documents: np.ndarray
    """(R,) int64: documents (or pieces) in each row."""

    def __len__(self) -> int:
        return len(self.tokens)

    def index(self) -> dict[str, np.ndarray]:
        """Arrays (R,) about the rows, which a packed set keeps in memory: see `PackedSet.row_weight` and the others."""
        return {
            "weight": self.weights.sum(axis=1, dtype=np.float64),
            "trained": np.count_nonzero(self.weights, axis=1).astype(np.int64),
            "documents": self.documents,
            "cost": attention_costs(self.offsets, self.doc_ids, self.pointers, self.documents),
        }

    def row(self, index: int, anchor_len: int) -> Row:
        """A single row, copied out of the arrays."""
        tokens, weights = self.tokens[index].astype(np.int64), self.weights[index].astype(np.float32)
        return Row(tokens, weights, self.layout(index, anchor_len))

    def layout(self, index: int, anchor_len: int) -> PackedLayout:
        """Where a row's documents lie."""
        # pointers = [[0, 0], [4, 0], [9, 4]]: row 1 has offsets[4:9] and doc_ids[0:4]; row 0 has no doc_ids
        (a, c), (b, d) = self.pointers[index].tolist(), self.pointers[index + 1].tolist()
        doc_ids = tuple(self.doc_ids[c:d].tolist()) or None
        layout = PackedLayout(tuple(self.offsets[a:b].tolist()), anchor_len, doc_ids=doc_ids)
        return replace(layout, padding=layout.num_documents > self.documents[index])

    @classmethod
    def of(cls, rows: Sequence[Row], documents: Sequence[int], dtype: type[np.integer]) -> Shard:
        """A shard of single rows, which have so many `documents` (or pieces) each; ids are stored as `dtype`."""
        # rows of 4 and 3 segments, the second interleaved: pointers = [[0, 0], [5, 0], [9, 3]]
        weights = np.stack([row.loss_weights for row in rows]).astype(np.float16)
        doc_ids = [row.layout.doc_ids or () for row in rows]
        ends = [[len(row.layout.doc_offsets) for row in rows], [len(ids) for ids in doc_ids]]
        return cls(
            np.stack([row.input_ids for row in rows]).astype(dtype),
            weights.astype(np.uint8) if np.isin(weights, (0, 1)).all() else weights,
            np.concatenate([row.layout.doc_offsets for row in rows]).astype(np.int32),
            np.concatenate(doc_ids).astype(np.int32),
            np.pad(np.cumsum(ends, axis=1), ((0, 0), (1, 0))).T.astype(np.int64),
            np.array(documents, np.int64),
        )


class Workspace(threading.local):
    """Memory that is used for one shard after the other: allocating it again would cost a quarter of the time.

    The next shard overwrites the one before. Each thread has its own memory.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        """Sent to another process, it arrives empty."""
        return type(self), ()

    def array(self, name: str, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """An array of whatever bytes were there before."""
        size = shape[0] * shape[1] * dtype.itemsize
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = np.empty(size, np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


def attention_costs(
    offsets: np.ndarray, doc_ids: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> np.ndarray:
    """(R,) float64: the sum of the squared lengths of each row's documents, in tokens squared.

    What attention costs, up to a factor that is the same for all rows. The anchor counts as a document; padding, which
    comes behind a row's `documents`, costs nothing.
    """
    # offsets = [0, 1, 4, 9], no doc_ids: lengths 1, 3, 5, cost 1 + 9 + 25 = 35 with two documents, 10 with one and
    # padding; were the second and third segment of one document (doc_ids = [0, 1, 1]): 1 + 8 * 8 = 65
    costs = np.empty(len(pointers) - 1)
    lengths = np.diff(offsets, prepend=0).astype(np.float64)  # wrong where a row begins, which is not used
    for row, ((a, c), (b, d)) in enumerate(pairwise(pointers.tolist())):
        own = lengths[a + 1 : b]
        if d > c:  # interleaved: the segments of a document count together
            own = np.bincount(doc_ids[c:d], own)
        own = own[: documents[row] + 1]
        costs[row] = own @ own
    return costs
