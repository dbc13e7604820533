"""A step's rows as pieces: which documents each forward pass of each process holds.

Documents are dealt out from their lengths alone, by every process alike and without communication. A *piece* is a run
of whole documents, of one row or several, each behind its own copy of the anchor; it holds at most `max_tokens`. A
document that is longer is a piece by itself: of one process, or, where `sequence` processes work together, of all of
them, which then share its tokens and exchange keys (Ulysses). Nothing else is ever exchanged inside attention.

All processes run the same number of pieces, since collectives (ZeRO 3 gathers weights in every pass) must line up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from anchorctx.errors import UserError
from anchorctx.layout import Document, PackedLayout, Pattern, lay_out
from anchorctx.pieces import TOKEN_COST, deal, document_costs, shared_and_alone


class AnchorVisible(StrEnum):
    """What a sliding window does to the anchor."""

    window = "window"
    """A copy of the anchor is its document's first token: a window moves past it, as past any other."""
    always = "always"
    """No window hides it. One anchor is shared by all documents of a piece, which costs the merge of attention."""


def piece_tokens(
    micro_tokens: int | None, row_length: int, pattern: Pattern, sequence: int, anchor_len: int = 1
) -> int:
    """Tokens that a piece of such rows holds at most; None is a row and a sixteenth for the copies of the anchor.

    UserError for less than any document needs, and for `full` rows that would have to be cut.
    """
    tokens = row_length * 17 // 16 if micro_tokens is None else micro_tokens
    if tokens < anchor_len + 2:
        raise UserError(
            f"micro_tokens={tokens} leaves no room for a document of two tokens behind an anchor of {anchor_len}: "
            f"use at least {anchor_len + 2}"
        )
    if pattern is Pattern.full and tokens * sequence < row_length:
        processes = f" x {sequence} processes" if sequence > 1 else ""
        raise UserError(
            f"micro_tokens={tokens}{processes} cannot hold a row of {row_length} tokens, and pattern=full makes each "
            "row one document, which cannot be cut: raise micro_tokens or parallel.sequence_parallel, or take another "
            "pattern"
        )
    return tokens


@dataclass(frozen=True, slots=True)
class Cutting:
    """How rows are cut, and for whom."""

    max_tokens: int
    """Tokens of a piece at most, copies of the anchor included."""
    rank: int = 0
    world: int = 1
    """This process's number, and how many there are."""
    sequence: int = 1
    """Neighbouring processes that share a document which is longer than a piece; divides `world`."""
    token_cost: float = TOKEN_COST
    """What a token costs besides attention, in (query, key) pairs."""
    shared_anchor: bool = False
    """One anchor in front of a piece instead of a copy a document: windows then never hide it."""


class Piece(NamedTuple):
    """What one forward pass of a process holds; nothing at all where a process has fewer pieces than others."""

    documents: tuple[tuple[int, Document], ...]
    """Each with the number of its row."""
    spread: bool = False
    """Do the `sequence` processes share it?"""

    def layout(self, anchor_len: int, cutting: Cutting) -> PackedLayout:
        """Where its documents lie; an empty piece is one token of its own."""
        if not self.documents:
            return PackedLayout((0, 1))
        return lay_out([document for _, document in self.documents], anchor_len, shared=cutting.shared_anchor)


class Dealt(NamedTuple):
    """A step's documents, dealt out."""

    pieces: list[Piece]
    """Those of this process, in the order in which it runs them."""
    long_documents: int
    """Documents of all processes that are longer than a piece."""


def deal_pieces(layouts: Sequence[PackedLayout], cutting: Cutting) -> Dealt:
    """Cut whole rows, which share one anchor length, and deal the pieces out.

    Documents of one token are left out: the first token of a document is never predicted, so they train nothing.
    """
    documents = [(row, document) for row, layout in enumerate(layouts) for document in layout.documents()]
    documents = [(row, document) for row, document in documents if document.length > 1]
    copies = 0 if cutting.shared_anchor else layouts[0].anchor_len
    tokens = np.array([document.length + copies for _, document in documents], np.int64)
    room = cutting.max_tokens - (layouts[0].anchor_len - copies)
    pieces = []
    for chosen, size in shared_and_alone(tokens, room, cutting.sequence):
        costs = document_costs(tokens[chosen], cutting.token_cost)
        # 8 processes that share documents by fours: 2 groups, process 5 is in group 1
        dealt = deal(tokens[chosen], costs, room, cutting.world // size)[cutting.rank // size]
        pieces += [Piece(tuple(documents[chosen[i]] for i in piece), spread=size > 1) for piece in dealt]
    return Dealt(pieces, int((tokens > room).sum()))
