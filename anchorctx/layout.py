"""Where the documents of a packed row lie, and what each of its tokens may see.

A row is `T` tokens: an anchor (the first `anchor_len` tokens), then documents. Visibility and positions follow
AnchorAttention (arXiv 2411.13476, section 4): a token sees the anchor and the earlier tokens of its own document.

One shared anchor equals a private copy of it, at position 0, in front of every document: the same outputs, loss and
gradients. Laid out like that (`with_copies`) a row needs nothing but intra-document causal attention, and may be cut
between documents (`pieces`).

This module holds the specification of both in numpy, so that packing and plotting need no torch; the methods that
return tensors import torch when they are called.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anchorctx.pieces import TOKEN_COST, cut, document_costs

if TYPE_CHECKING:
    import torch


class Positions(StrEnum):
    """How position ids run over a row."""

    continuous = "continuous"
    """0..T-1 over the whole row: every rotation angle up to T is trained, the anchor keeps 0."""
    reset = "reset"
    """Each document restarts right after the anchor (at 0 where there is none)."""


class Document(NamedTuple):
    """Where one document lies in its row."""

    spans: tuple[tuple[int, int], ...]
    """(start, stop) of each of its segments in the row, in order."""
    positions: tuple[int, ...]
    """Position of each segment's first token."""

    @property
    def length(self) -> int:
        """Its tokens; no anchor counted."""
        return sum(stop - start for start, stop in self.spans)

    def where(self, copies: int = 0) -> np.ndarray:
        """(copies + length,) int64: the row's tokens to gather for it, behind so many of the row's first."""
        # spans (1, 3) and (7, 9) behind one copy: [0, 1, 2, 7, 8]
        return np.concatenate([np.arange(copies), *(np.arange(start, stop) for start, stop in self.spans)])


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The boundaries of one packed row: the only carrier of them. Hashable, plain ints, no tensors.

    A *segment* is a contiguous run of one document. With an anchor the first segment is the anchor itself.
    """

    doc_offsets: tuple[int, ...]
    """Segment boundaries `(0, ..., T)`, strictly increasing, in tokens."""
    anchor_len: int = 0
    """Tokens at the start of the row that every document sees; 0 is no anchor."""
    positions: Positions = Positions.continuous
    doc_ids: tuple[int, ...] | None = None
    """The document of each segment (the anchor's included); `None` when each segment is a document of its own."""
    starts: tuple[int, ...] | None = None
    """The position of each segment's first token (behind its copies of the anchor); `None`: as `positions` says."""
    copies: int = 0
    """Anchor tokens at the head of each document, at positions 0 to copies - 1; part of its first segment."""
    padding: bool = False
    """Is the last segment no text? It sees what a document sees, but is none: `documents` and pieces leave it out."""

    def __post_init__(self) -> None:
        offsets = self.doc_offsets
        if len(offsets) < 2 or offsets[0] != 0 or any(a >= b for a, b in zip(offsets, offsets[1:], strict=False)):
            raise ValueError(f"doc_offsets must increase strictly from 0 to the row length, got {_short(offsets)}")
        if self.anchor_len and offsets[1] != self.anchor_len:
            raise ValueError(
                f"the first segment must be the anchor: it ends at {offsets[1]}, but anchor_len is {self.anchor_len}"
            )
        if self.doc_ids is not None:
            if len(self.doc_ids) != len(offsets) - 1:
                raise ValueError(f"doc_ids has {len(self.doc_ids)} entries for {len(offsets) - 1} segments")
            if self.anchor_len and self.doc_ids[0] in self.doc_ids[1:]:
                raise ValueError("the anchor's doc_id must not be a document's: the anchor is nobody's text")
        if self.starts is not None and len(self.starts) != len(offsets) - 1:
            raise ValueError(f"starts has {len(self.starts)} entries for {len(offsets) - 1} segments")
        if self.copies and (self.anchor_len or self.starts is None):
            raise ValueError("a layout with copies of the anchor has starts, and no shared anchor: use with_copies()")

    @property
    def length(self) -> int:
        """Tokens in the row, `T`."""
        return self.doc_offsets[-1]

    @property
    def num_documents(self) -> int:
        """Documents in the row, the anchor and padding not counted."""
        segments = len(self.doc_offsets) - 1 if self.doc_ids is None else len(set(self.doc_ids))
        return segments - bool(self.anchor_len) - self.padding

    @property
    def padding_tokens(self) -> int:
        """Tokens of the row that are padding."""
        return self.doc_offsets[-1] - self.doc_offsets[-2] if self.padding else 0

    def by_document(self) -> PackedLayout:
        """The same row with each document's segments moved together, in order of first appearance: its boundaries."""
        return self if self.doc_ids is None else _grouped(self)[1]

    @property
    def together(self) -> bool:
        """Do each document's segments lie together already?"""
        if self.doc_ids is None:
            return True
        changes = 1 + sum(a != b for a, b in zip(self.doc_ids, self.doc_ids[1:], strict=False))
        return changes == len(set(self.doc_ids))

    # -- copies and pieces --------------------------------------------------------------------------------------

    def documents(self) -> tuple[Document, ...]:
        """The documents of a row (whose layout has no copies yet), in order of first appearance.

        Neither the anchor nor padding is one.
        """
        if self.copies:
            raise ValueError("the documents of a layout with copies are those of the layout that it was made from")
        ids = range(len(self.doc_offsets) - 1) if self.doc_ids is None else self.doc_ids
        spans = list(zip(self.doc_offsets, self.doc_offsets[1:], strict=False))
        first = self.position_array()[list(self.doc_offsets[:-1])].tolist()
        found: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        segments = list(zip(ids, spans, first, strict=True))
        for document, span, position in segments[bool(self.anchor_len) : len(segments) - self.padding]:
            lists = found.setdefault(document, ([], []))
            lists[0].append(span)
            lists[1].append(position)
        return tuple(Document(tuple(spans), tuple(positions)) for spans, positions in found.values())

    def _some_documents(self) -> tuple[Document, ...]:
        documents = self.documents()
        if not documents:
            raise ValueError("a row that is an anchor alone has no documents that could carry copies of it")
        return documents

    def with_copies(self) -> tuple[PackedLayout, np.ndarray]:
        """The row with a copy of the anchor in front of each document, and (T',) int64 which of its tokens to gather.

        The documents come one after the other, in order of first appearance, at their positions in the row; the shared
        anchor itself is gone. Equal in outputs, loss and gradients (the third identity of AnchorAttention). A row
        without an anchor gets no copies.
        """
        # anchor 0, documents 1-2 and 3-5: index [0, 1, 2, 0, 3, 4, 5], which are the positions too, offsets (0, 3, 7)
        documents = self._some_documents()
        index = np.concatenate([document.where(self.anchor_len) for document in documents])
        return lay_out(documents, self.anchor_len), index

    def pieces(self, max_tokens: int, token_cost: float = TOKEN_COST) -> list[tuple[PackedLayout, np.ndarray]]:
        """`with_copies`, cut between documents into pieces of at most `max_tokens` and about the same cost.

        A document that is longer than that with its copy is a piece by itself. `token_cost` is what a token costs
        besides attention, in (query, key) pairs (`pieces.TOKEN_COST`). A row that is one document, as under
        `Pattern.full`, cannot be cut.
        """
        if max_tokens <= self.anchor_len:
            raise ValueError(f"pieces of {max_tokens} tokens have no room behind an anchor of {self.anchor_len}")
        documents = self._some_documents()
        tokens = np.array([document.length + self.anchor_len for document in documents])
        chosen = cut(tokens, document_costs(tokens, token_cost), max_tokens)
        pieces = ([documents[i] for i in piece] for piece in chosen if len(piece))
        return [
            (lay_out(piece, self.anchor_len), np.concatenate([document.where(self.anchor_len) for document in piece]))
            for piece in pieces
        ]

    # -- specification, numpy -----------------------------------------------------------------------------------

    def token_docs(self) -> np.ndarray:
        """(T,) int64: the document of every token; the anchor counts as a document."""
        ids = np.arange(len(self.doc_offsets) - 1) if self.doc_ids is None else np.asarray(self.doc_ids)
        return np.repeat(ids, np.diff(self.doc_offsets))

    def allowed_array(self, window: int | None = None) -> np.ndarray:
        """(T, T) bool, `[q, k]`: may token q attend to token k? The specification: quadratic, for tests and pictures.

        `allowed(q, k) = k <= q and (doc(k) == doc(q) or k < anchor_len)`. A sliding `window` counts tokens of the
        document (a token sees itself and the `window - 1` before it); the anchor is always visible.
        """
        docs, index = self.token_docs(), np.arange(self.length)
        same = docs[:, None] == docs[None, :]
        if window is not None:
            rank = self.token_ranks()
            same &= rank[:, None] - rank[None, :] < window
        return (index[None, :] <= index[:, None]) & (same | (index < self.anchor_len)[None, :])

    def token_ranks(self) -> np.ndarray:
        """(T,) int64: how many tokens of the same document come before each token."""
        lengths = np.diff(self.doc_offsets)
        starts = np.array(self.doc_offsets[:-1])
        before = np.zeros(len(lengths), dtype=np.int64)
        if self.doc_ids is not None:
            seen: dict[int, int] = {}
            for i, (doc, length) in enumerate(zip(self.doc_ids, lengths, strict=True)):
                before[i] = seen.get(doc, 0)
                seen[doc] = int(before[i] + length)
        return np.arange(self.length) + np.repeat(before - starts, lengths)

    def position_array(self) -> np.ndarray:
        """(T,) int64 position ids."""
        if self.starts is not None:
            return self._from_starts(self.starts)
        if self.positions is Positions.continuous:
            return np.arange(self.length)
        ranks = self.token_ranks()
        ranks[self.anchor_len :] += self.anchor_len
        return ranks

    def _from_starts(self, starts: tuple[int, ...]) -> np.ndarray:
        # offsets (0, 4, 6) with one copy each, starts (7, 2): [0, 7, 8, 9, 0, 2]
        ids = range(len(starts)) if self.doc_ids is None else self.doc_ids
        seen: set[int] = set()
        parts = []
        for document, start, length in zip(ids, starts, np.diff(self.doc_offsets).tolist(), strict=True):
            copies = 0 if document in seen else min(self.copies, length)  # padding may be shorter than an anchor
            seen.add(document)
            parts += [np.arange(copies), np.arange(start, start + length - copies)]
        return np.concatenate(parts)

    def text_array(self) -> np.ndarray:
        """(T,) bool: which tokens are documents' own: neither the anchor, nor a copy of it, nor padding."""
        # offsets (0, 4, 6) with one copy each: [no, yes, yes, yes, no, yes]
        text = np.arange(self.length) >= self.anchor_len
        if self.copies:
            text &= self.token_ranks() >= self.copies
        return text & (np.arange(self.length) < self.length - self.padding_tokens)

    def attention_pairs(self, window: int | None = None) -> int:
        """Number of allowed (query, key) pairs, padding's left out: the row's attention cost, in score elements."""
        pairs = 0
        layout = self.by_document()
        lengths = np.diff(layout.doc_offsets).tolist()
        for i, length in enumerate(lengths[: len(lengths) - self.padding]):
            is_anchor = i == 0 and self.anchor_len > 0  # no window hides the anchor, not from itself either
            seen = length if window is None or is_anchor else min(length, window)
            pairs += seen * (seen + 1) // 2 + (length - seen) * seen
            pairs += 0 if is_anchor else length * self.anchor_len
        return pairs

    def cu_seqlens_array(self) -> np.ndarray:
        """(N+1,) int32: boundaries of the documents after `by_document`, the anchor first; flash kernels' own form."""
        return np.asarray(self.by_document().doc_offsets, dtype=np.int32)

    def order_array(self) -> np.ndarray:
        """(T,) int64 such that `row[order]` has documents together, as `by_document` has them."""
        return np.arange(self.length) if self.doc_ids is None else _grouped(self)[0]

    def kv_index_array(self) -> np.ndarray:
        """(T + A*(N-1),) int64: keys in `by_document` order with a copy of the anchor in front of every document."""
        offsets, anchor = self.by_document().doc_offsets, np.arange(self.anchor_len)
        spans = [np.arange(a, b) for a, b in zip(offsets, offsets[1:], strict=False)]
        if not self.anchor_len:
            return np.concatenate(spans)
        return np.concatenate([spans[0], *(part for span in spans[1:] for part in (anchor, span))])

    def cu_seqlens_k_array(self) -> np.ndarray:
        """(N+1,) int32: boundaries of the sequences that `kv_index_array` gathers."""
        offsets = self.cu_seqlens_array()
        copies = np.maximum(np.arange(len(offsets)) - 1, 0) * self.anchor_len
        return (offsets + copies).astype(np.int32)

    # -- as tensors; positions are cached per device ---------------------------------------------------------------

    def allowed(self, device: torch.device | str = "cpu", window: int | None = None) -> torch.Tensor:
        """(T, T) bool tensor of `allowed_array`; not cached, since it is quadratic."""
        return _tensor(self.allowed_array(window), device)

    def position_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(T,) int64."""
        return _position_ids(self, str(device))


class Pattern(StrEnum):
    """What a row's documents may see of each other: the paper's baselines and AnchorAttention (names: its table 1)."""

    full = "full"
    """Plain causal attention over the whole row."""
    intra_doc = "intra_doc"
    """Documents are separate, positions run on."""
    intra_doc_reset = "intra_doc_reset"
    """Documents are separate, each restarts at position 0."""
    anchor = "anchor"
    """AnchorAttention: documents are separate but all see the anchor; positions run on."""
    anchor_reset = "anchor_reset"
    """AnchorAttention with each document restarting right after the anchor (our ablation)."""

    def apply(self, row: PackedLayout) -> PackedLayout:
        """The layout that this pattern gives to a packed `row` (whose first segment is the anchor).

        Tokens stay where they are, so that every pattern trains on the same tokens; without an anchor the first
        segment is just a short document.
        """
        if self is Pattern.full:
            return PackedLayout((0, row.length))
        anchored = self in (Pattern.anchor, Pattern.anchor_reset)
        reset = self in (Pattern.intra_doc_reset, Pattern.anchor_reset)
        return replace(
            row,
            anchor_len=row.anchor_len if anchored else 0,
            positions=Positions.reset if reset else Positions.continuous,
        )


def lay_out(documents: Sequence[Document], anchor_len: int = 0, *, shared: bool = False) -> PackedLayout:
    """The layout of documents of one row or several, one after the other, each behind a copy of its row's anchor.

    With `shared` the anchor stands once, in front of all. `Document.where` says which tokens to gather.
    """
    head = 0 if shared else anchor_len
    once = (anchor_len,) if shared and anchor_len else ()
    lengths, starts, ids = [*once], [0 for _ in once], [-1 for _ in once]
    for number, document in enumerate(documents):
        for part, ((start, stop), position) in enumerate(zip(document.spans, document.positions, strict=True)):
            lengths.append(stop - start + (0 if part else head))
            starts.append(position)
            ids.append(number)
    offsets = (0, *itertools.accumulate(lengths))
    scattered = len(documents) + len(once) < len(ids)
    doc_ids = tuple(ids) if scattered else None
    return PackedLayout(offsets, anchor_len - head, doc_ids=doc_ids, starts=tuple(starts), copies=head)


@functools.lru_cache(maxsize=64)
def _grouped(layout: PackedLayout) -> tuple[np.ndarray, PackedLayout]:
    docs = layout.token_docs()
    _, first, inverse = np.unique(docs, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse.reshape(-1)], kind="stable")
    lengths = np.bincount(inverse.reshape(-1))[np.argsort(first)]
    offsets = (0, *np.cumsum(lengths).tolist())
    # boundaries: positions stay with tokens
    return order, PackedLayout(offsets, layout.anchor_len, layout.positions, padding=layout.padding)


@functools.lru_cache(maxsize=256)  # never called under a FakeTensorMode: real calls would meet fake tensors
def _position_ids(layout: PackedLayout, device: str) -> torch.Tensor:
    return _tensor(layout.position_array(), device)


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    import torch

    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        return torch.from_numpy(array).to(device)


def _short(values: tuple[int, ...]) -> str:
    return str(values) if len(values) <= 8 else f"({', '.join(map(str, values[:7]))}, ...)"
