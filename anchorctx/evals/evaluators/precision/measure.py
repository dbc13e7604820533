"""Rows of text, and what changes in each layer when one is read at other positions.

`Texts` cuts the corpus into rows, of running text or of several packed documents. An `Instrument` (a loaded model)
reads a row under several sets of positions in one forward pass and compares the copies with the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import anchor_token, text_ids
from anchorctx.evals.evaluators.precision.models import arithmetic_context
from anchorctx.evals.evaluators.precision.probe import Change, Probe
from anchorctx.flops import layer_windows
from anchorctx.layout import PackedLayout

DOCUMENTS_A_ROW = 8
"""A packed row has at least this many."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """Token ids behind the anchor, and where their documents lie."""

    ids: np.ndarray
    """(T,) int64; the first is the anchor token."""
    layout: PackedLayout
    """Its first segment is the anchor; positions continuous."""

    def without_first(self) -> TextRow:
        """The same text as one document without the first token: the second one is now the first."""
        return TextRow(self.ids[1:], PackedLayout((0, len(self.ids) - 1)))


class Texts:
    """Held-out documents as token ids, cut into rows on demand."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._documents = [np.asarray(ids, dtype=np.int64) for ids in text_ids(tokenizer, texts) if ids]
        self._anchor = anchor_token(tokenizer)
        self._stream = np.concatenate(self._documents) if self._documents else np.zeros(0, np.int64)
        self._ends = np.cumsum([len(ids) for ids in self._documents])

    def rows(self, length: int, count: int) -> list[TextRow]:
        """`count` rows of `length` tokens from places spread evenly over the text; UserError when it is too short."""
        text = length - 1
        if len(self._stream) < text * count:
            raise UserError(
                f"the corpus has {len(self._stream):,} tokens, but {count} different rows of {length:,} need "
                f"{text * count:,}: lower texts or lengths, or name a larger corpus"
            )
        # The rows do not overlap; what they leave over lies in equal gaps between them. 100 tokens, 3 rows of 20 (spare
        # 40): starts = [0, 20 + 20, 40 + 40].
        spare = len(self._stream) - text * count
        starts = [i * text + (spare * i) // max(count - 1, 1) for i in range(count)]
        return [self._row(start, text) for start in starts]

    def packed_rows(self, length: int, count: int) -> list[TextRow]:
        """`count` rows of several documents, each cut at an eighth of the row so that some begin late in it.

        Documents follow in order, as many rows as there are; UserError when there is not even one.
        """
        most, rows = max((length - 1) // DOCUMENTS_A_ROW, 1), []
        pieces: list[np.ndarray] = []
        for document in self._documents:
            pieces.append(document[:most])
            if sum(map(len, pieces)) >= length - 1:
                rows.append(self._packed(pieces, length))
                pieces = []
            if len(rows) == count:
                break
        if not rows:
            raise UserError(
                f"the corpus has too few documents to pack a row of {length:,} tokens: lower lengths, name a larger "
                "corpus, or leave the packed rows out with packed=false"
            )
        return rows

    def _packed(self, pieces: Sequence[np.ndarray], length: int) -> TextRow:
        # Pieces of 5, 7, 9 behind the anchor: ends = [1, 6, 13, 22]; a row of 20 has the boundaries 0, 1, 6, 13, 20.
        ends = np.cumsum([1, *map(len, pieces)])
        inside = ends[ends < length].tolist()
        return TextRow(
            np.concatenate([[self._anchor], *pieces])[:length], PackedLayout((0, *inside, length), anchor_len=1)
        )

    def _row(self, start: int, text: int) -> TextRow:
        """The stream's `text` tokens from `start` behind the anchor, with the documents' ends that fall among them."""
        # A document that ends at s in the stream ends at s - start + 1 in the row, behind the anchor.
        inside = self._ends[(self._ends > start) & (self._ends < start + text)] - start + 1
        ids = np.concatenate([[self._anchor], self._stream[start : start + text]])
        return TextRow(ids, PackedLayout((0, 1, *inside.tolist(), text + 1), anchor_len=1))


@dataclass(frozen=True, slots=True)
class Instrument:
    """A loaded model and how it is measured."""

    model: PreTrainedModel
    layers: frozenset[int]
    rows_per_pass: int
    """Copies of a row in one forward pass, beside the first."""
    emulated: bool
    """Compute bfloat16 products in float32 and round."""
    shared: bool = False
    """Compute the states that isolated copies share once: see `shares_states`."""

    def changes(
        self, row: TextRow, layout: PackedLayout, positions: Sequence[torch.Tensor], queries: torch.Tensor
    ) -> list[dict[int, Change]]:
        """Each layer's change from `positions[0]` to every other; (T,) int64 position ids, all layers isolated."""
        found: list[dict[int, Change]] = []
        for chunk in self._chunks(positions):
            probe = Probe(layout, queries, self.layers, isolate=True)
            self._forward(row, chunk, probe, queries[:1])
            found += [{layer: probe.found[layer][i] for layer in probe.found} for i in range(len(chunk) - 1)]
        return found

    def log_probabilities(
        self, row: TextRow, layout: PackedLayout, positions: Sequence[torch.Tensor], queries: torch.Tensor
    ) -> list[torch.Tensor]:
        """For every set of positions, (N,) float64 log-probability (nats) of the token after each query."""
        answers = torch.from_numpy(row.ids)[queries + 1]
        found: list[torch.Tensor] = []
        for chunk in self._chunks(positions):
            probe = Probe(layout, queries, frozenset(), isolate=False)
            logits = self._forward(row, chunk, probe, queries)  # (B, N, V)
            logp = torch.log_softmax(logits.double(), -1).cpu()
            scored = logp.gather(2, answers[None, :, None].expand(len(chunk), -1, 1))[..., 0]
            found += scored[1 if found else 0 :]  # every chunk begins with positions[0]: keep its numbers once
        return found

    def _chunks(self, positions: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The first set of positions with a few of the others at a time."""
        # positions p0..p4, two at a time: [[p0, p1, p2], [p0, p3, p4]].
        others = positions[1:]
        return [[positions[0], *others[i : i + self.rows_per_pass]] for i in range(0, len(others), self.rows_per_pass)]

    @torch.no_grad()  # in inference mode linear layers would pass by the emulation whole
    def _forward(
        self, row: TextRow, positions: Sequence[torch.Tensor], probe: Probe, kept: torch.Tensor
    ) -> torch.Tensor:
        device, shared = self.model.device, self.shared and probe.isolate
        probe.copies = len(positions)
        # Whoever sees whom is the probe's affair. A mask of four dimensions keeps transformers from making one of its
        # own, for which it wants as many rows of positions as of tokens.
        mask = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)} if shared else {}
        with arithmetic_context(self.emulated):
            return self.model(
                input_ids=torch.from_numpy(row.ids).expand(1 if shared else len(positions), -1).to(device),
                position_ids=torch.stack(list(positions)).to(device),
                use_cache=False,
                logits_to_keep=kept.to(device),
                probe=probe,
                **mask,
            ).logits


def shares_states(model: PreTrainedModel) -> bool:
    """Whether the model takes one row with several rows of positions, and then rotates it for each of them.

    Most do: cosines of shape (B, T, D) times queries of (1, H, T, D). Those that rotate a part of each head cannot join
    it with the rest, of one row.
    """
    row, queries = TextRow(np.arange(8), PackedLayout((0, 8))), torch.arange(4, 7)
    tool = Instrument(model, frozenset(range(len(layer_windows(model.config)))), 2, emulated=False, shared=True)
    try:
        changes = tool.changes(row, row.layout, [torch.arange(8), torch.arange(8) + 1000], queries)
    except RuntimeError:
        return False
    return any(bool(change.score.any()) for change in changes[0].values())  # else the positions were not heard


def late_queries(length: int, count: int) -> torch.Tensor:
    """(N,) `count` tokens spread evenly over the second half of a row, the last left out: it has no next token."""
    first, last = length // 2, length - 2
    return torch.linspace(first, last, min(count, last - first + 1)).long()


def document_queries(layout: PackedLayout, count: int, before: int = 8) -> torch.Tensor:
    """(N,) `count` tokens spread evenly over those with at least `before` tokens of their document before them.

    The last token of a document is left out: the token after it belongs to another document.
    """
    ranks, docs = layout.token_ranks(), layout.token_docs()
    # ranks count from 0 within a document, so `ranks >= before` leaves out a document's first `before` tokens.
    good = torch.from_numpy((ranks[:-1] >= before) & (docs[:-1] == docs[1:])).nonzero()[:, 0]
    return good[torch.linspace(0, len(good) - 1, min(count, len(good))).long()]
