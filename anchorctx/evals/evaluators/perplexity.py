"""Held-out perplexity: each document scored alone behind the anchor, by the model's own plain attention.

That is what a packed row trains (a document sees the anchor and itself), without any packing: so packing cannot flatter
the number, and any Hugging Face folder can be scored, trained with anchors or not. Documents longer than `max_length`
are cut there, or read in windows that slide over them; no window ever crosses into another document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.data.sources.facts import FactTokens
from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit, anchor_token
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.config import PerplexityConfig
from anchorctx.evals.scoring import pad, score
from anchorctx.records.results import Result, ratio_interval
from anchorctx.settings import check_ranges

Item = TypeVar("Item")
FIRST_BUCKET = 128
"""Tokens; the default buckets of positions end at this and its doublings."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One input: a document, or a window of it, behind the anchor."""

    document: int
    """Its number."""
    ids: np.ndarray
    """(T,) int64, the anchor first."""
    first: int
    """Index of the first token that is scored here: 2 at a document's start, whose first token is given, as in
    training; later windows score what no earlier one did."""


class Perplexity:
    """See the module; `texts` are the held-out documents."""

    name = "perplexity"
    counts = "tok"

    def __init__(self, config: PerplexityConfig, texts: Sequence[str]) -> None:
        self.config, self._texts = config, texts
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
        names = ("documents", "max_length", "stride", "exclude_facts")
        return {name: getattr(config, name) for name in names} | {"buckets": self._stops}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{}]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator."""
        anchor_token(tokenizer)

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """`perplexity` over all scored tokens, and a row `perplexity_by_position` for each bucket.

        Each is exp of a mean loss, with a 95 % interval over documents.
        """
        texts = every(self._texts, self.config.documents)
        documents = encode(subject.tokenizer, texts)
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


def score_pieces(
    subject: Subject, pieces: Sequence[Piece], facts: FactTokens | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each piece, the positions (n,) of its scored tokens and their losses (n,) in nats; `facts` are left out."""
    ids = pad([piece.ids for piece in pieces])
    chosen = np.zeros(ids.shape, dtype=bool)
    for row, piece in zip(chosen, pieces, strict=True):
        row[piece.first : len(piece.ids)] = True
        if facts is not None:
            row[: len(piece.ids)] &= ~facts.is_fact(piece.ids)
    loss = score(subject, ids, chosen).loss
    ends = np.cumsum(chosen.sum(1))
    return [(np.flatnonzero(row), loss[end - row.sum() : end]) for row, end in zip(chosen, ends.tolist(), strict=True)]


def windows(document: int, ids: np.ndarray, config: PerplexityConfig) -> Iterator[Piece]:
    """A document's `ids` (n,), the anchor first, as one piece cut at max_length, or as windows that slide over it."""
    yield Piece(document, ids[: config.max_length], 2)
    if not config.stride:
        return
    anchor, text, body = ids[:1], ids[1:], config.max_length - 1
    start, done = 0, body
    while done < len(text):
        start = min(start + config.stride, len(text) - body)  # the last window is full too
        yield Piece(document, np.concatenate([anchor, text[start : start + body]]), done - start + 1)
        done = start + body


def batches(pieces: Sequence[Piece], batch_tokens: int) -> list[list[Piece]]:
    """Pieces of similar lengths together, so that little is padded."""
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.ids)):
        if not groups or len(piece.ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(piece)
    return groups


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text's token ids (n,) int64 behind the anchor, whatever special tokens the tokenizer would add."""
    anchor = anchor_token(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [np.array([anchor, *ids], dtype=np.int64) for ids in encoded]  # type: ignore[misc]


def perplexity_row(metric: str, sums: np.ndarray, counts: np.ndarray, unit: Unit) -> Result:
    """exp of the ratio of summed losses (nats) to tokens over documents, with its 95 % interval."""
    with_tokens = counts > 0
    sums, counts = sums[with_tokens], counts[with_tokens]
    documents, tokens = len(sums), int(counts.sum())
    if not tokens:
        return Result(metric=metric, value=math.nan, unit="1", n=0, context=unit)
    mean = float(sums.sum()) / tokens
    ends = ratio_interval(sums.tolist(), counts.tolist())
    low, high = (None, None) if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
    context = unit | {"documents": documents, "tokens": tokens, "loss_nats": mean}
    return Result(metric=metric, value=math.exp(mean), unit="1", n=documents, low=low, high=high, context=context)


def every(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items spread evenly over all; 0 is all of them."""
    if not count or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def known_facts(tokenizer: PreTrainedTokenizerBase) -> FactTokens | None:
    """The planted facts' tokens where the tokenizer has them."""
    return FactTokens.of(tokenizer) if "<key_00>" in tokenizer.get_vocab() else None


def _bucket_stops(stops: list[int], max_length: int) -> list[int]:
    """Where buckets of positions end: those asked for, or 128 and its doublings, and max_length at last."""
    if any(a >= b for a, b in zip([0, *stops], stops, strict=False)):
        raise UserError(
            f"perplexity.buckets={stops} must be positive and rising: give ends in tokens, like [512, 4096]"
        )
    if not stops:
        stops = [FIRST_BUCKET * 2**i for i in range(max(max_length // FIRST_BUCKET, 1).bit_length())]
    return [*(stop for stop in stops if stop < max_length), max_length]
