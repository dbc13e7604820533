"""Needle map: is a fact retrieved, by how long the context is and how deep in it the fact lies?

A row is text of the user's corpus with one needle at a depth from 0 (right behind the anchor) to 1 (right before the
question), and with distractors of the same form elsewhere, so that the needle must be told apart by its key. The
question stands at the end. The answer is right when each of its tokens is the model's argmax, given those before it,
which is when greedy decoding would write it. Its log-likelihood also tells apart models that are never right.

Two styles: `facts`, the planted key and value tokens of `anchorctx.data.sources.facts`, for very small models that
learnt them; and `sentences`, in plain English in the manner of RULER's multi-key needles (arXiv 2404.06654), for real
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchorctx.data.sources.facts import NUM_KEYS, FactTokens
from anchorctx.errors import UserError
from anchorctx.evals.base import Progress, Subject, Unit, anchor_token
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.config import NeedleConfig, NeedleStyle
from anchorctx.evals.evaluators.perplexity import known_facts
from anchorctx.evals.evaluators.retrieval import TokenStream
from anchorctx.evals.scoring import pad, score
from anchorctx.records.results import Result, mean_interval, wilson_interval
from anchorctx.settings import check_ranges

PLACES = (
    "harbour orchard library station bakery quarry chapel foundry museum brewery lighthouse mill tannery dairy theatre "
    "vineyard kennel arsenal laundry aquarium nursery sawmill hostel armoury cannery distillery gallery observatory "
    "stable shipyard greenhouse refinery"
).split()
STATEMENT = "The code of the {place} is {code}.\n"
QUESTION = "\nQuestion: What is the code of the {place}?\nAnswer: The code of the {place} is"


class NeedleMap:
    """See the module; `texts` are the haystack, `seed` places the needles."""

    name = "needle"
    counts = "tok"

    def __init__(self, config: NeedleConfig, texts: Sequence[str], seed: int) -> None:
        self.config, self._seed, self._stream = config, seed, TokenStream(texts)
        check_ranges(config, "needle")
        if not config.lengths or not config.depths:
            raise UserError(
                f"needle.lengths={config.lengths} and needle.depths={config.depths} must not be empty: "
                "give at least one each"
            )
        if config.distractors >= len(PLACES):
            raise UserError(
                f"needle.distractors={config.distractors} must be 0 to {len(PLACES) - 1}: there are no more names for "
                "them, lower it"
            )

    def longest(self) -> int:
        """See Evaluator."""
        return max(self.config.lengths)

    def settings(self) -> dict[str, Any]:
        """See Evaluator."""
        return {name: getattr(self.config, name) for name in ("rows", "distractors", "style")}

    def units(self) -> list[Unit]:
        """See Evaluator."""
        return [{"length": length, "depth": depth} for length in self.config.lengths for depth in self.config.depths]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See Evaluator: makes a row of the shortest length, which is where needles do not fit."""
        needles = self._needles(tokenizer)
        self._row(np.random.default_rng(0), needles, tokenizer, min(self.config.lengths), 0.0)
        if len(self._stream(tokenizer)[0]) < self.longest():
            raise UserError(
                f"the haystack has {len(self._stream(tokenizer)[0])} tokens, fewer than a row of {self.longest()}: "
                "lower needle.lengths, or name a larger corpus"
            )

    def run(self, subject: Subject, unit: Unit, progress: Progress) -> Iterator[Result]:
        """`needle_accuracy` with its Wilson interval, and `needle_logprob` (nats an answer), of one cell."""
        tokenizer, length, depth = subject.tokenizer, unit["length"], unit["depth"]
        needles, rng = self._needles(tokenizer), np.random.default_rng([self._seed, length, round(depth * 1e6)])
        rows = [self._row(rng, needles, tokenizer, length, depth) for _ in range(self.config.rows)]
        per = max(self.config.batch_tokens // length, 1)
        groups = [rows[i : i + per] for i in range(0, len(rows), per)]
        found = spread(groups, lambda group: _answers(subject, group), [len(g) * length for g in groups], progress)
        hits, logprobs = (np.concatenate(part) for part in zip(*found, strict=True))
        context = unit | {"style": needles.style.value, "distractors": self.config.distractors}
        low, high = wilson_interval(int(hits.sum()), len(hits))
        options: dict[str, Any] = {"n": len(hits), "context": context}
        yield Result(metric="needle_accuracy", value=float(hits.mean()), unit="1", low=low, high=high, **options)
        # A log-likelihood is at most 0, and so is the end of its interval.
        ends = mean_interval(logprobs.tolist())
        low, high = (None, None) if ends is None else (ends[0], min(ends[1], 0.0))
        yield Result(metric="needle_logprob", value=float(logprobs.mean()), unit="nats", low=low, high=high, **options)

    def _needles(self, tokenizer: PreTrainedTokenizerBase) -> Facts | Sentences:
        style = self.config.style
        if style is NeedleStyle.auto:
            style = NeedleStyle.sentences if known_facts(tokenizer) is None else NeedleStyle.facts
        return Facts(FactTokens.of(tokenizer)) if style is NeedleStyle.facts else Sentences(tokenizer)

    def _row(
        self,
        rng: np.random.Generator,
        needles: Facts | Sentences,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        depth: float,
    ) -> tuple[np.ndarray, int]:
        """A row (length,) and how many tokens at its end are the answer."""
        statements, question, answer = needles.draw(rng, 1 + self.config.distractors)
        text = length - 1 - sum(map(len, statements)) - len(question) - len(answer)
        if text < 1:
            raise UserError(
                f"needle.lengths={length} has no room for text beside {len(statements)} needles, question and answer "
                f"({length - text} tokens): raise it, or lower needle.distractors"
            )
        stream, line_start = self._stream(tokenizer)
        start = int(rng.integers(0, max(len(stream) - text, 0) + 1))
        ids, starts = stream[start : start + text], line_start[start : start + text]
        # slots[0] is our needle's, the others are the distractors'; each is an index into the text.
        slots = [_nearest(starts, depth), *(_nearest(starts, d) for d in rng.random(self.config.distractors).tolist())]
        parts, done = [np.array([anchor_token(tokenizer)])], 0
        # Of several needles at one place ours comes first, but last right before the question (depth 1).
        for i in sorted(range(len(slots)), key=lambda i: (slots[i], (i == 0) == (depth == 1.0))):
            parts += [ids[done : slots[i]], statements[i]]
            done = slots[i]
        return np.concatenate([*parts, ids[done:], question, answer]), len(answer)


@dataclass(frozen=True, slots=True)
class Facts:
    """Needles of two tokens: a key and its value; the key alone is the question."""

    tokens: FactTokens
    style = NeedleStyle.facts

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """`count` statements with different keys, and the question and answer about the first; token ids."""
        # Keys differ, or the question would have two answers; values may repeat.
        keys = self.tokens.keys[rng.permutation(NUM_KEYS)[:count]]
        values = self.tokens.values[rng.integers(0, NUM_KEYS, size=count)]
        return [np.array(pair) for pair in zip(keys, values, strict=True)], keys[:1], values[:1]


@dataclass(frozen=True, slots=True)
class Sentences:
    """Needles in plain English: places and their five-digit codes."""

    tokenizer: PreTrainedTokenizerBase
    style = NeedleStyle.sentences

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """See `Facts.draw`."""
        places = [PLACES[i] for i in rng.permutation(len(PLACES))[:count]]
        codes = rng.integers(10_000, 100_000, size=count).tolist()
        statements = [self._ids(STATEMENT.format(place=p, code=c)) for p, c in zip(places, codes, strict=True)]
        question = QUESTION.format(place=places[0])
        asked = self._ids(question)
        # Encoded in one piece: some tokenizers put a space before each text.
        whole = self._ids(f"{question} {codes[0]}")
        return statements, asked, whole[len(asked) :]

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def _answers(subject: Subject, rows: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """For each row, is every token of its answer the argmax (B,) bool, and the answer's log-likelihood (B,) in nats."""
    ids = pad([row for row, _ in rows])
    chosen = np.zeros(ids.shape, dtype=bool)
    for where, (row, size) in zip(chosen, rows, strict=True):
        where[len(row) - size : len(row)] = True
    # Answers of 2, 3 and 2 tokens begin at [0, 2, 5] in the scored tokens; reduceat takes each one's all and sum.
    found, starts = score(subject, ids, chosen), np.cumsum([0, *(size for _, size in rows[:-1])])
    return np.logical_and.reduceat(found.hit, starts), -np.add.reduceat(found.loss, starts)


def _nearest(line_start: np.ndarray, depth: float) -> int:
    """Where to insert at `depth` of a text: the nearest line's start within 2 % of the text, else the very place."""
    at = round(depth * len(line_start))
    places = np.array([0, *np.flatnonzero(line_start), len(line_start)])
    # 1,000 tokens at depth 0.5: at = 500. A line that starts at 512 is within 20 tokens (2 %) and is taken.
    near = int(places[np.abs(places - at).argmin()])
    return near if abs(near - at) <= len(line_start) / 50 else at
