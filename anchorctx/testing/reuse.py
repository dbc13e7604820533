"""A small prompt for tests of KV reuse: glue and contents of a few tokens, with an arm's view of it."""

from __future__ import annotations

import torch

from anchorctx.kvcomm.agents import Frame, Ids, Template
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.request import Prefixes, RequestState, TurnContext
from anchorctx.testing.numerics import max_error

BOS = 1
TEMPLATE = Template.parse("ab{x}cd{y}{x}ef")
"""Neighbouring placeholders, and one that stands twice."""
X: Ids = (20, 31, 42, 53, 64, 75)
Y: Ids = (9, 8, 7)


def encode(text: str) -> Ids:
    """A token a character."""
    return tuple(ord(c) % 90 + 3 for c in text)


def context(decoder: Decoder, contents: dict[str, Ids], template: Template = TEMPLATE, number: int = 0) -> TurnContext:
    """What an arm sees of an agent's turn in request `number`, with nothing computed yet."""
    frame = Frame("agent", template, encode, BOS)
    return TurnContext(
        decoder, frame.prompt(contents), frame, RequestState(number, dict(contents)), Prefixes(decoder, BOS, (5, 6))
    )


def dense_logits(decoder: Decoder, ids: Ids) -> torch.Tensor:
    """(T, V), by the model alone."""
    return decoder.model(input_ids=decoder.tensor(ids), use_cache=False).logits[0]


def error(a: KV, b: KV) -> float:
    """The largest difference of two segments."""
    return max(max_error(a.keys, b.keys), max_error(a.values, b.values))


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(B, T) tokens."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))
