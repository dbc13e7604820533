"""Planted facts: key-value pairs of tokens that a document states once and asks for again later.

A *mention* is two tokens, `<key_07><val_33>`. A key's first mention in a document states the fact, drawn at random;
every later one is a *query*: the key asks, the value is the *answer*. Answers can be predicted only by looking the key
up, so a very small model can learn retrieval from them, and it can be scored exactly, without a judge.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_KEYS = 64
"""Different keys, and as many values."""
KEY_TOKENS = [f"<key_{i:02d}>" for i in range(NUM_KEYS)]
VALUE_TOKENS = [f"<val_{i:02d}>" for i in range(NUM_KEYS)]
SPECIAL_TOKENS = [*KEY_TOKENS, *VALUE_TOKENS]
"""What a tokenizer must know as single tokens for facts to be planted."""
TEXT_WEIGHT = 0.1
"""Loss weight of a text token, when an answer weighs 1: there are some twenty times as many of them."""


@dataclass(frozen=True, slots=True)
class FactTokens:
    """Token ids of the keys and values in one tokenizer."""

    keys: np.ndarray
    """(64,) int64."""
    values: np.ndarray
    """(64,) int64."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> FactTokens:
        """Look the facts' tokens up; UserError when the tokenizer does not have them all."""
        ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
        missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i in (None, tokenizer.unk_token_id)]
        if missing:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no token {missing[0]}, which "
                "planted facts need: add SPECIAL_TOKENS of anchorctx.data.sources.facts to it, or prepare without facts"
            )
        return cls(np.asarray(ids[:NUM_KEYS], dtype=np.int64), np.asarray(ids[NUM_KEYS:], dtype=np.int64))

    def is_fact(self, ids: np.ndarray) -> np.ndarray:
        """Bool array of the shape of `ids`: tokens that are keys or values."""
        return np.isin(ids, self.keys) | np.isin(ids, self.values)

    def mentions(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the facts are in one document's `ids` (T,): positions of stated keys, and of querying keys."""
        # ids k1 v5 x k2 v9 k1 v5: pairs = [0, 3, 5], of which 0 and 3 state, and 5 queries
        pairs = np.flatnonzero(np.isin(ids[:-1], self.keys) & np.isin(ids[1:], self.values))
        stated = np.zeros(len(pairs), dtype=bool)
        stated[np.unique(ids[pairs], return_index=True)[1]] = True
        return pairs[stated], pairs[~stated]

    def loss_weights(self, ids: np.ndarray) -> np.ndarray:
        """Weights (T,) float32 of the loss of predicting each token of one document's `ids` (T,), unshifted as labels.

        1 on answers, 0.1 on text, and 0 on what cannot be known: stated pairs and which key is asked for.
        """
        ids = np.asarray(ids)
        weights = np.where(self.is_fact(ids), 0.0, TEXT_WEIGHT).astype(np.float32)
        _, queries = self.mentions(ids)
        weights[queries + 1] = 1.0
        return weights


def loss_weights(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """`FactTokens.loss_weights` under the tokenizer that made the ids."""
    return FactTokens.of(tokenizer).loss_weights(ids)


def lines_of(text: str) -> list[str]:
    """The text's lines with their ends; only \\n ends a line, as for the tokenizer of `stdlib`."""
    return io.StringIO(text, newline="\n").readlines()


def plant(text: str, rng: np.random.Generator, facts: int, mentions: int = 2) -> str:
    """State `facts` facts (at most 64) in `text`, `mentions` times each, at random line boundaries; one document."""
    keys, values = _draw(rng, 1, facts, mentions)
    # 3 lines have 4 slots, before each and at the end; the k-th mention goes into the k-th slot, so that a fact's first
    # mention in `keys` is its first in the text
    lines = lines_of(text)
    slots = np.sort(rng.integers(0, len(lines) + 1, size=facts * mentions))
    inserted: list[list[str]] = [[] for _ in range(len(lines) + 1)]
    for slot, key, value in zip(slots.tolist(), keys[0].tolist(), values[0].tolist(), strict=True):
        inserted[slot].append(KEY_TOKENS[key] + VALUE_TOKENS[value])
    return "".join("".join(pairs) + line for pairs, line in zip(inserted, [*lines, ""], strict=True))


@dataclass(frozen=True, slots=True)
class FactRows:
    """Rows with facts, made directly in tokens; B rows of T tokens, each one document behind its BOS."""

    ids: np.ndarray
    """(B, T) int64."""
    answers: np.ndarray
    """(B, T) bool: tokens that answer a query."""
    text: np.ndarray
    """(B, T) bool: tokens of the text that the facts were planted in."""

    def without_bos(self) -> FactRows:
        """The same rows from their second token on, (B, T - 1)."""
        return FactRows(self.ids[:, 1:], self.answers[:, 1:], self.text[:, 1:])


def fact_rows(
    rng: np.random.Generator,
    tokens: FactTokens,
    bos: int,
    text: np.ndarray,
    line_start: np.ndarray,
    *,
    facts: int,
    mentions: int = 2,
) -> FactRows:
    """Plant `facts` facts, `mentions` times each, in every row of `text`; T = 1 + n + 2 * facts * mentions.

    Args:
        rng: source of all randomness.
        tokens: the facts' token ids.
        bos: token id that every row begins with.
        text: (B, n) token ids; n = 0 makes rows of facts alone.
        line_start: (B, n) bool, tokens that begin a line: facts are planted in front of these, or at the row's end.
        facts: different facts in a row, at most 64.
        mentions: times a fact appears, the statement included.
    """
    batch, length = text.shape
    count = facts * mentions
    keys, values = _draw(rng, batch, facts, mentions)
    slots = _draw_slots(rng, line_start, count)  # (B, count), in text tokens
    # where each mention's key lands: slots = [0, 3], so behind BOS, and behind 3 tokens of text and the first mention:
    # at = [1, 6], the row being BOS k v t t t k v ...
    at = 1 + slots + 2 * np.arange(count)
    rows = np.arange(batch)[:, None]
    is_text = np.ones((batch, 1 + length + 2 * count), dtype=bool)
    is_text[:, 0] = False
    is_text[rows, at] = is_text[rows, at + 1] = False
    ids = np.full(is_text.shape, bos, dtype=np.int64)
    ids[rows, at], ids[rows, at + 1] = tokens.keys[keys], tokens.values[values]
    ids[is_text] = text.reshape(-1)
    answers = np.zeros_like(is_text)
    answers[rows, at + 1] = _repeated(keys)
    return FactRows(ids, answers, is_text)


def _draw(rng: np.random.Generator, batch: int, facts: int, mentions: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (B, facts * mentions) in 0..63, in the order of a row's mentions; a row's keys are distinct."""
    if not 0 < facts <= NUM_KEYS:
        raise ValueError(f"a document takes 1 to {NUM_KEYS} facts, one a key, got {facts}")
    # sorting random numbers makes a random permutation of each row at once
    keys = np.argsort(rng.random((batch, NUM_KEYS)), axis=1)[:, :facts]
    values = rng.integers(0, NUM_KEYS, size=(batch, facts))
    # a permutation of 0 .. 5 modulo 3 has each of 3 facts twice: [4, 0, 5, 3, 1, 2] -> [1, 0, 2, 0, 1, 2]
    order = np.argsort(rng.random((batch, facts * mentions)), axis=1) % facts
    return np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)


def _draw_slots(rng: np.random.Generator, line_start: np.ndarray, count: int) -> np.ndarray:
    """Sorted insertion points (B, count), drawn with replacement from the line starts and the row's end."""
    batch, length = line_start.shape
    allowed = np.concatenate([line_start, np.ones((batch, 1), dtype=bool)], axis=1)
    number = allowed.sum(1, keepdims=True)
    places = np.argsort(~allowed, axis=1, kind="stable")  # the allowed ones first, in order
    return np.take_along_axis(places, np.sort(rng.integers(0, number, size=(batch, count)), axis=1), 1)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """(B, n) bool: the same key came before in the row."""
    index = np.arange(keys.shape[1])
    same = keys[:, :, None] == keys[:, None, :]
    return (same & (index[:, None] > index[None, :])).any(2)
