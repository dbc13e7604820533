"""The forward passes of a step: typical rows, cut into pieces and dealt out as the training's loader does.

`data.pieces` deals one process its documents. Here all processes are dealt out at once, and only lengths matter, so
that the plan sees for which process the others wait. Copies of the anchor are part of the lengths; documents of one
token train nothing and are left out, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.layout import PackedLayout
from anchorctx.pieces import deal, document_costs, shared_and_alone

STEPS = 4
"""Steps that are dealt out, at most; their mean is planned."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of typical rows, as training sees them."""

    rows: tuple[np.ndarray, ...]
    """(n,) tokens of each row's documents that are trained, copies of the anchor included."""
    longest: int
    """Tokens of the longest of all, with its copy."""
    shared: int
    """Tokens of an anchor that stands once in front of each piece (`anchor_visible=always`), else 0."""

    @classmethod
    def of(cls, rows: Sequence[PackedLayout], shared_anchor: bool, longest: int = 0) -> Documents:
        """Read rows, to which the pattern has been applied; `longest` tells of longer documents than theirs."""
        anchor = rows[0].anchor_len
        copies = 0 if shared_anchor else anchor
        lengths = [np.array([d.length for d in row.documents() if d.length > 1], np.int64) for row in rows]
        found = max((int(row.max()) for row in lengths if len(row)), default=1)
        return cls(tuple(row + copies for row in lengths), max(found, longest) + copies, anchor - copies)

    def steps(self, rows: int) -> list[np.ndarray]:
        """(n,) tokens of the documents of each of a few steps of so many rows; rows are used again where they end."""
        # 64 rows, 24 a step: rows 0 to 23 and 24 to 47
        count = min(max(len(self.rows) // rows, 1), STEPS)
        return [np.concatenate([self.rows[(s * rows + i) % len(self.rows)] for i in range(rows)]) for s in range(count)]


@dataclass(frozen=True, slots=True)
class Passes:
    """M passes of G processes, or, `spread`, of G groups of processes that share a long document a pass."""

    tokens: np.ndarray
    """(M, G) int64 tokens of each pass, copies included; 0 is an empty piece."""
    attention: np.ndarray
    """(M, G) float64 operations of attention."""
    spread: bool


@dataclass(frozen=True, slots=True)
class Dealt:
    """A few typical steps."""

    steps: tuple[tuple[Passes, ...], ...]
    """Of each step the passes over long documents that are shared, if any, and the others, if any."""
    long_documents: float
    """Documents of a step that are longer than a piece, on average."""

    @property
    def pieces(self) -> tuple[int, ...]:
        """Passes of a process in each step."""
        return tuple(sum(len(passes.tokens) for passes in step) for step in self.steps)

    @property
    def most(self) -> int:
        """Tokens of the documents of a step that are not shared: the most of all steps."""
        return max(sum(int(passes.tokens.sum()) for passes in step if not passes.spread) for step in self.steps)


def deal_steps(
    documents: Documents,
    attention: Callable[[np.ndarray], np.ndarray],
    token_cost: float,
    *,
    rows: int,
    micro_tokens: int,
    gpus: int,
    sequence: int,
) -> Dealt:
    """A few steps of so many rows over so many GPUs; the same number of passes in every process.

    Args:
        documents: of typical rows.
        attention: operations of attention (n,) of documents of so many tokens (n,).
        token_cost: what a token costs besides attention, in (query, key) pairs.
        rows: of a step.
        micro_tokens: tokens of a piece at most.
        gpus: processes.
        sequence: processes that share a document which is longer than a piece.
    """
    room, steps, long_documents = micro_tokens - documents.shared, [], []
    for tokens in documents.steps(rows):
        kinds = shared_and_alone(tokens, room, sequence)
        steps.append(
            tuple(
                _dealt(tokens[chosen], attention, token_cost, room, gpus // size, spread=size > 1)
                for chosen, size in kinds
            )
        )
        long_documents.append((tokens > room).sum())
    return Dealt(tuple(steps), float(np.mean(long_documents)))


def _dealt(
    tokens: np.ndarray,
    attention: Callable[[np.ndarray], np.ndarray],
    token_cost: float,
    room: int,
    groups: int,
    *,
    spread: bool,
) -> Passes:
    shares = deal(tokens, document_costs(tokens, token_cost), room, groups)
    whole, scores = (
        np.array([[values[piece].sum() for piece in pieces] for pieces in shares]).T  # (M, G)
        for values in (tokens, attention(tokens))
    )
    return Passes(whole, scores, spread)
