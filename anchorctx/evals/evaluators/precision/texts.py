"""The rows of text that the study reads: one document's worth of running text, or several documents packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import anchor_token
from anchorctx.layout import PackedLayout

DOCUMENTS_A_ROW = 8
"""At least so many in a packed row."""


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
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self._documents = [np.asarray(ids, dtype=np.int64) for ids in encoded if len(ids)]  # type: ignore[union-attr]
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
        ends = np.cumsum([1, *map(len, pieces)])
        inside = ends[ends < length].tolist()
        return TextRow(
            np.concatenate([[self._anchor], *pieces])[:length], PackedLayout((0, *inside, length), anchor_len=1)
        )

    def _row(self, start: int, text: int) -> TextRow:
        """The stream's `text` tokens from `start` behind the anchor, with the documents' ends that fall among them."""
        inside = self._ends[(self._ends > start) & (self._ends < start + text)] - start + 1
        ids = np.concatenate([[self._anchor], self._stream[start : start + text]])
        return TextRow(ids, PackedLayout((0, 1, *inside.tolist(), text + 1), anchor_len=1))
