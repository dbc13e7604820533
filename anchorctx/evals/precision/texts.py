"""The rows of text that the study reads: one document's worth of running text, or several documents packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import anchor_token
from anchorctx.layout import PackedLayout


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

    def _row(self, start: int, text: int) -> TextRow:
        """The stream's `text` tokens from `start` behind the anchor, with the documents' ends that fall among them."""
        inside = self._ends[(self._ends > start) & (self._ends < start + text)] - start + 1
        ids = np.concatenate([[self._anchor], self._stream[start : start + text]])
        return TextRow(ids, PackedLayout((0, 1, *inside.tolist(), text + 1), anchor_len=1))
