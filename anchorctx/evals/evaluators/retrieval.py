"""Retrieval accuracy against context length: facts planted in held-out text, each asked for again in the same row.

A row is one document that fills the context, read with the model's own full attention. An answer is right when the
value is the argmax over the whole vocabulary. A guess among the values of the row is right in 1 / facts of cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.data.sources.facts import FactRows, FactTokens, fact_rows, lines_of
from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit, anchor_token, text_ids
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.config import RetrievalConfig
from anchorctx.evals.scoring import score
from anchorctx.records.results import Result, wilson_interval
from anchorctx.settings import check_ranges


class Retrieval:
    """See the module; `texts` are held-out documents, `seed` places the facts."""

    name = "retrieval"
    counts = "tok"

    def __init__(self, config: RetrievalConfig, texts: Sequence[str], seed: int) -> None:
        self.config, self._seed = config, seed
        self._stream = TokenStream(texts)
        check_ranges(config, "retrieval")
        shortest = 1 + 2 * config.facts * config.mentions
        if min(config.lengths, default=0) < shortest:
            raise UserError(
                f"retrieval lengths {config.lengths} must each hold {config.facts} facts {config.mentions} times, "
                f"which takes {shortest} tokens: raise lengths or lower facts"
            )

    def longest(self) -> int:
        """See Evaluator."""
        return max(self.config.lengths)

    def settings(self) -> dict[str, Any]:
        """See Evaluator."""
        return {name: getattr(self.config, name) for name in ("rows", "facts", "mentions", "bos")}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{"length": length} for length in self.config.lengths]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator."""
        FactTokens.of(tokenizer)
        anchor_token(tokenizer)

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """The row `retrieval_accuracy` of one length, with the Wilson interval over the queries."""
        tokenizer, length = subject.tokenizer, unit["length"]
        tokens, bos = FactTokens.of(tokenizer), anchor_token(tokenizer)
        stream, line_start = self._stream(tokenizer)
        rng = np.random.default_rng([self._seed, length])
        rows = list(self._batches(rng, tokens, bos, stream, line_start, length))
        found = spread(rows, lambda row: answered(subject, row), [row.ids.size for row in rows], progress)
        right = np.concatenate(found)
        hits, n = int(right.sum()), len(right)
        low, high = wilson_interval(hits, n)
        context = unit | {name: getattr(self.config, name) for name in ("facts", "rows", "bos")}
        yield Result(metric="retrieval_accuracy", value=hits / n, unit="1", n=n, low=low, high=high, context=context)

    def _batches(
        self,
        rng: np.random.Generator,
        tokens: FactTokens,
        bos: int,
        stream: np.ndarray,
        line_start: np.ndarray,
        length: int,
    ) -> Iterator[FactRows]:
        config = self.config
        # A row of 512 with 8 facts, each 2 times: 1 anchor, 2 * 8 * 2 = 32 tokens of facts, 479 of text.
        text = length - 1 - 2 * config.facts * config.mentions
        if text > len(stream):
            raise UserError(
                f"the held-out text has {len(stream)} tokens, fewer than a row of {length} needs: "
                "lower retrieval.lengths or hold more text out"
            )
        for first in range(0, config.rows, per := max(config.batch_tokens // length, 1)):
            starts = rng.integers(0, len(stream) - text + 1, size=(min(per, config.rows - first), 1))
            at = starts + np.arange(text)  # (rows, 1) + (text,) -> (rows, text) places in the stream
            rows = fact_rows(rng, tokens, bos, stream[at], line_start[at], facts=config.facts, mentions=config.mentions)
            yield rows if config.bos else rows.without_bos()


class TokenStream:
    """`text_stream` of some texts, kept for the last tokenizer that was used."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._last: tuple[PreTrainedTokenizerBase, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
        """See `text_stream`."""
        if self._last is None or self._last[0] is not tokenizer:
            self._last = tokenizer, text_stream(self._texts, tokenizer)
        return self._last[1]


def text_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """All texts as one stream of token ids (N,), and which tokens begin a line (N,) bool."""
    lines = [line for text in texts for line in lines_of(text)]
    encoded = text_ids(tokenizer, lines)
    sizes = np.array([len(ids) for ids in encoded], dtype=np.int64)
    stream = np.fromiter((i for ids in encoded for i in ids), dtype=np.int64, count=int(sizes.sum()))
    line_start = np.zeros(len(stream), dtype=bool)
    # Lines of 3, 0 and 2 tokens begin at cumsum - sizes = [0, 3, 3]; the empty one has no first token.
    line_start[(np.cumsum(sizes) - sizes)[sizes > 0]] = True
    return stream, line_start


def answered(subject: Subject, rows: FactRows) -> np.ndarray:
    """(queries,) bool: for every query of `rows`, in order, whether its value is the argmax over the vocabulary."""
    return score(subject, rows.ids, rows.answers).hit
