"""Held-out perplexity, and perplexity against context length: documents scored alone behind the anchor.

A packed row trains just that (a document sees the anchor and itself), so that packing cannot flatter the number. The
model attends with its own plain attention, so any Hugging Face folder can be scored, trained with anchors or not.
Documents longer than `max_length` are cut there, or read in windows that slide over them; no window ever crosses into
another document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.data.sources.facts import FactTokens
from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit, anchor_token, text_ids
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.config import ContextConfig, PerplexityConfig
from anchorctx.evals.finite import exp
from anchorctx.evals.scoring import Piece, batches, score_pieces
from anchorctx.records.results import Result, ratio_interval
from anchorctx.settings import check_ranges

Item = TypeVar("Item")
FIRST_BUCKET = 128
"""Tokens; the default buckets of positions end at this and its doublings."""


class Perplexity:
    """Of whole documents, and by position in them; `texts` are the held-out documents."""

    name = "perplexity"
    counts = "tok"

    def __init__(self, config: PerplexityConfig, texts: Sequence[str]) -> None:
        self.config, self._texts = config, texts
        self._long: tuple[PreTrainedTokenizerBase, list[np.ndarray]] | None = None
        check_ranges(config, "perplexity")
        if config.stride >= config.max_length:
            raise UserError(
                f"perplexity.stride={config.stride} must be 0 to max_length - 1, which is {config.max_length - 1}: "
                "windows that slide further would leave tokens out; lower it"
            )
        self._stops = _bucket_stops(config.buckets, config.max_length)

    def longest(self) -> int:
        """See Evaluator."""
        return self.config.max_length

    def settings(self) -> dict[str, Any]:
        """See Evaluator."""
        config = self.config
        names = ("documents", "min_length", "max_length", "stride", "exclude_facts")
        return {name: getattr(config, name) for name in names} | {"buckets": self._stops}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{}]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator."""
        anchor_token(tokenizer)
        if self.config.min_length:  # else there is nothing that could be missing
            self._documents(tokenizer)

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """`perplexity` over all scored tokens, and a row `perplexity_by_position` for each bucket.

        Each is exp of a mean loss, with a 95 % interval over documents.
        """
        documents = self._documents(subject.tokenizer)
        facts = known_facts(subject.tokenizer) if self.config.exclude_facts else None
        pieces = [p for i, ids in enumerate(documents) for p in windows(i, ids, self.config)]
        sums, counts = self._sums(subject, pieces, facts, len(documents), progress)
        yield perplexity_row("perplexity", sums.sum(1), counts.sum(1), unit)
        start = 0
        for bucket, stop in enumerate(self._stops):
            if counts[:, bucket].any():
                where = {"start": start, "stop": stop}
                yield perplexity_row("perplexity_by_position", sums[:, bucket], counts[:, bucket], where)
            start = stop

    def _documents(self, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
        """Token ids of the documents that are scored; long ones, which are looked for among all, are kept."""
        if not self.config.min_length:
            return encode(tokenizer, every(self._texts, self.config.documents))
        if self._long is None or self._long[0] is not tokenizer:
            found = long_enough(tokenizer, self._texts, self.config.min_length, "perplexity.min_length")
            self._long = tokenizer, every(found, self.config.documents)
        return self._long[1]

    def _sums(
        self, subject: Subject, pieces: list[Piece], facts: FactTokens | None, documents: int, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """Summed losses and scored tokens of each document in each bucket of positions, (documents, buckets)."""
        groups = batches(pieces, self.config.batch_tokens)
        sums, counts = np.zeros((documents, len(self._stops))), np.zeros((documents, len(self._stops)), dtype=np.int64)

        def work(batch: list[Piece]) -> list[tuple[int, np.ndarray, np.ndarray]]:
            return [
                (piece.document, loss, np.searchsorted(self._stops, at, side="right"))
                for piece, (at, loss) in zip(batch, score_pieces(subject, batch, facts), strict=True)
            ]

        sizes = [sum(len(piece.ids) for piece in group) for group in groups]
        for scored in spread(groups, work, sizes, progress):
            for document, loss, bucket in scored:
                np.add.at(sums[document], bucket, loss)
                np.add.at(counts[document], bucket, 1)
        return sums, counts


class ContextPerplexity:
    """Perplexity against context length: the same tokens, predicted with more and more of their document before them.

    The last `targets` tokens of every long document's first `max(lengths)` tokens are predicted from the anchor and the
    `length - targets - 1` tokens of text before them. Rows differ only in how much is seen, not in what is predicted:
    a model that uses its context has a falling line, and one beyond its reach a rising one.
    """

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
        # longest 8, length 5, targets 2: of a t1 .. t7 the row is a t4 t5 t6 t7, and t6 t7 (from index 3) are scored.
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
            found = long_enough(tokenizer, self._texts, longest, "context.lengths")
            self._starts = tokenizer, [ids[:longest] for ids in every(found, self.config.documents)]
        return self._starts[1]


def windows(document: int, ids: np.ndarray, config: PerplexityConfig) -> Iterator[Piece]:
    """A document's `ids` (n,), the anchor first, as one piece cut at max_length, or as windows that slide over it."""
    yield Piece(document, ids[: config.max_length], 2)
    if not config.stride:
        return
    # max_length 5 (4 of text), stride 2, text t0 .. t8: windows t0-t3, t2-t5 (scores t4 t5), t4-t7, t5-t8 (scores t8).
    anchor, text, body = ids[:1], ids[1:], config.max_length - 1
    start, done = 0, body
    while done < len(text):
        start = min(start + config.stride, len(text) - body)  # so the last window is full too
        yield Piece(document, np.concatenate([anchor, text[start : start + body]]), done - start + 1)
        done = start + body


def long_enough(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], least: int, setting: str) -> list[np.ndarray]:
    """Token ids of the texts that have `least` tokens, the anchor included; UserError where none has."""
    # Short texts are passed over before they are encoded, which takes longest; no token is less than a byte.
    candidates = [text for text in texts if len(text.encode()) >= least - 1]
    found = [ids for ids in encode(tokenizer, candidates) if len(ids) >= least]
    if not found:
        raise UserError(
            f"none of the {len(texts)} held-out documents has the {least} tokens that {setting} asks for: lower it, or "
            "name a corpus of longer documents"
        )
    return found


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text's token ids (n,) int64 behind the anchor, whatever special tokens the tokenizer would add."""
    anchor = anchor_token(tokenizer)
    return [np.array([anchor, *ids], dtype=np.int64) for ids in text_ids(tokenizer, texts)]


def perplexity_row(metric: str, sums: np.ndarray, counts: np.ndarray, unit: Unit) -> Result:
    """exp of the ratio of summed losses (nats) to tokens over documents, with its 95 % interval."""
    # Documents whose tokens all are facts, or lie in other buckets, have nothing to say about this number.
    with_tokens = counts > 0
    sums, counts = sums[with_tokens], counts[with_tokens]
    documents, tokens = len(sums), int(counts.sum())
    if not tokens:
        raise UserError(f"no held-out document has a token to score for {metric}: name a corpus of longer texts")
    mean = float(sums.sum()) / tokens
    ends = ratio_interval(sums.tolist(), counts.tolist())
    low, high = (None, None) if ends is None else (exp(ends[0]), exp(ends[1]))
    context = unit | {"documents": documents, "tokens": tokens, "loss_nats": mean}
    # By document, so that two models that read the same can be compared in pairs.
    context |= {"values": (sums / counts).tolist(), "counts": counts.astype(int).tolist()}
    return Result(metric=metric, value=exp(mean), unit="1", n=documents, low=low, high=high, context=context)


def every(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items spread evenly over all; 0 is all of them."""
    if not count or count >= len(items):
        return list(items)
    # 3 of 10: items 0, 3 and 6.
    return [items[i * len(items) // count] for i in range(count)]


def known_facts(tokenizer: PreTrainedTokenizerBase) -> FactTokens | None:
    """The planted facts' tokens where the tokenizer has them."""
    return FactTokens.of(tokenizer) if "<key_00>" in tokenizer.get_vocab() else None


def _bucket_stops(stops: list[int], max_length: int) -> list[int]:
    """Where buckets of positions end: as asked for, or at 128 and its doublings; the last one at max_length."""
    if any(a >= b for a, b in zip([0, *stops], stops, strict=False)):
        raise UserError(
            f"perplexity.buckets={stops} must be positive and rising: give ends in tokens, like [512, 4096]"
        )
    # max_length 1,000: buckets end at 128, 256, 512 and 1,000.
    if not stops:
        stops = [FIRST_BUCKET * 2**i for i in range(max(max_length // FIRST_BUCKET, 1).bit_length())]
    return [*(stop for stop in stops if stop < max_length), max_length]
