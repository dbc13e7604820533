"""Perplexity against context length: the same tokens, predicted with more and more of their document before them.

The last `targets` tokens of every long document's first `max(lengths)` tokens are predicted from the anchor and the
`length - targets - 1` tokens of text before them. Between the rows only how much is seen differs, not what is
predicted: a model that uses its context has a falling line, and one beyond its reach a rising one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit, anchor_token
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.config import ContextConfig
from anchorctx.evals.evaluators.perplexity import (
    Piece,
    batches,
    encode,
    every,
    known_facts,
    perplexity_row,
    score_pieces,
)
from anchorctx.records.results import Result
from anchorctx.settings import check_ranges


class ContextPerplexity:
    """See the module; `texts` are the held-out documents."""

    name = "perplexity_by_context"
    counts = "tok"

    def __init__(self, config: ContextConfig, texts: Sequence[str]) -> None:
        self.config, self._texts = config, texts
        self._starts: tuple[PreTrainedTokenizerBase, list[np.ndarray]] | None = None
        check_ranges(config, "context")
        if min(config.lengths, default=0) < config.targets + 2:
            raise UserError(
                f"context.lengths={config.lengths} must each be at least context.targets={config.targets} + 2: the "
                "anchor and some text stand before the predicted tokens; raise lengths or lower targets"
            )

    def longest(self) -> int:
        """See Evaluator."""
        return max(self.config.lengths)

    def settings(self) -> dict[str, Any]:
        """See Evaluator; the longest length decides which documents and tokens are used."""
        return {"targets": self.config.targets, "documents": self.config.documents, "longest": self.longest()}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{"context_length": length} for length in self.config.lengths]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator."""
        anchor_token(tokenizer)
        self._documents(tokenizer)

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """One row, `perplexity_by_context`, over the same tokens at every length; 95 % interval over documents."""
        documents, length = self._documents(subject.tokenizer), unit["context_length"]
        pieces = [
            Piece(i, np.concatenate([ids[:1], ids[1 - length :]]), length - self.config.targets)
            for i, ids in enumerate(documents)
        ]
        groups, facts = batches(pieces, self.config.batch_tokens), known_facts(subject.tokenizer)
        sizes = [sum(len(piece.ids) for piece in group) for group in groups]

        def work(batch: list[Piece]) -> list[np.ndarray]:
            return [loss for _, loss in score_pieces(subject, batch, facts)]

        losses = [loss for group in spread(groups, work, sizes, progress) for loss in group]
        sums, counts = np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses])
        yield perplexity_row(self.name, sums, counts, unit)

    def _documents(self, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
        """The first `longest()` tokens of each long document, the anchor first; kept for the next unit."""
        if self._starts is None or self._starts[0] is not tokenizer:
            longest = self.longest()
            texts = [text for text in self._texts if len(text.encode()) >= longest - 1]  # no token is less than a byte
            encoded = [ids[:longest] for ids in encode(tokenizer, texts) if len(ids) >= longest]
            if not encoded:
                raise UserError(
                    f"none of the {len(self._texts)} held-out documents has the {longest} tokens that "
                    f"context.lengths={self.config.lengths} asks for: lower it, or name a corpus of longer documents"
                )
            self._starts = tokenizer, every(encoded, self.config.documents)
        return self._starts[1]
