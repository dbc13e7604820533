"""A gate that predicts: a turn is shared where its divergence from dense is predicted to be within the user's bound.

The first requests are dense, so that their true divergence can be measured: what they said is run once more through
each rung of a ladder, `rotate_glue` with a few recomputed tokens or with more. Later turns take the cheapest rung that
is predicted within the bound, with its margin (`prediction`), or are dense.

The strongest signal costs a part of a layer for a few tokens: keys and values in layer 1, the first that depends on
what stands before a token, are computed anew for probes in each content, and compared with what would be reused. They
are exact, because layer 0 does not depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Ids, Prompt, Segment
from anchorctx.kvcomm.arms.basic import Rotate
from anchorctx.kvcomm.arms.blend import COMPARED, PART
from anchorctx.kvcomm.arms.names import SETTINGS, Setting
from anchorctx.kvcomm.arms.prediction import Predictor, Sample, Signals
from anchorctx.kvcomm.decoder import Buffer, Decoder
from anchorctx.kvcomm.request import Tally, TurnContext
from anchorctx.kvcomm.turn import prefill, recite

PROBED = 4
"""Neighbouring tokens in the middle of each content that are computed anew in layer 1."""
LADDER = (8, 32)
"""Tokens recomputed at the start of each content, beside all of the glue: what is tried in turn before dense."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was thought of one turn."""

    stage: str
    """`warmup`: dense, to be learnt from; `shared`; or `dense`, since no rung was within the bound."""
    expected: float | None = None
    """Nats a token, of the rung that was taken, or of the last one."""
    limit: float | None = None
    """With its margin."""
    calibration: tuple[tuple[float, float], ...] = ()
    """On the turn at which the fit was made: (expected, true) of what it was made on, each left out in turn."""


class Predicted(Rotate):
    """See the module."""

    name = "predicted"
    by_construction = False

    def __init__(
        self,
        bound: float = 0.05,
        *,
        warmup: int = 12,
        ladder: Sequence[int] = LADDER,
        miss: float = 0.1,
        tokens: int = 64,
    ) -> None:
        """All settings are the arm's own.

        Args:
            bound: the greatest divergence of a turn, in nats a token: the mean of KL(dense | arm) over its answer.
            warmup: dense requests before the first prediction.
            ladder: tokens recomputed at the start of each content, rising.
            miss: part of the turns that may turn out above their limit, 0..1.
            tokens: of each answer, at most, that divergence is measured on.
        """
        SETTINGS["predicted"].of(self.name, bound)
        for name, least, values in (("warmup", 1, [warmup]), ("ladder", 0, ladder), ("tokens", 1, [tokens])):
            for value in values:
                Setting(name, whole=True, least=least).of(self.name, value)
        if not ladder or list(ladder) != sorted(set(ladder)):
            raise UserError(
                f"the ladder {list(ladder)} of predicted must rise: name some numbers of tokens, as {LADDER}"
            )
        if not 0 < miss < 1:  # nan is not
            raise UserError(f"predicted miss={miss} must be above 0 and below 1: correct it, or leave it out for 0.1")
        if warmup < 1 / miss - 1:
            raise UserError(
                f"predicted cannot tell what is exceeded in {miss:g} of the turns from {warmup} requests: raise warmup "
                f"to {np.ceil(1 / miss - 1):.0f} or more, or miss"
            )
        self.bound, self.warmup, self.ladder, self.miss, self.tokens = bound, warmup, tuple(ladder), miss, tokens
        self.forecast: Forecast | None = None
        """Of the latest turn; None where it had nothing to reuse."""
        self._samples: list[Sample] = []
        self._predictor: Predictor | None = None

    def choose(self, context: TurnContext, buffer: Buffer) -> torch.Tensor:
        """The slots of the cheapest rung within the bound, or all."""
        prompt = context.prompt
        self.forecast = None
        if not any(segment.length for segment in prompt.placeholders):
            return dense(prompt)
        context.memo = signals = signals_of(context, buffer)
        if self._warming(prompt.agent):
            self.forecast = Forecast("warmup")
            return dense(prompt)
        calibration: tuple[tuple[float, float], ...] = ()
        if self._predictor is None or self._predictor.count < len(self._samples):
            self._predictor = Predictor(self._samples, self.miss)
            calibration = self._predictor.left_out
        predictions = self._predictor.predict(signals)
        for k, prediction in zip(self.ladder, predictions, strict=True):
            if prediction.limit <= self.bound:
                self.forecast = Forecast("shared", prediction.expected, prediction.limit, calibration)
                return rung(prompt, k)
        self.forecast = Forecast("dense", predictions[-1].expected, predictions[-1].limit, calibration)
        return dense(prompt)

    @torch.no_grad()
    def hear(self, context: TurnContext, buffer: Buffer, ids: Ids, logits: torch.Tensor) -> None:
        """Measure what each rung would have made of a dense turn."""
        signals = context.memo
        if not isinstance(signals, Signals) or not self._warming(context.prompt.agent) or not ids:
            return
        ids, decoder, length = ids[: self.tokens], context.decoder, context.prompt.length
        true = logits[: len(ids)] if len(logits) >= len(ids) else _said(decoder, buffer, length, logits[0], ids)
        kl = []
        for k in self.ladder:
            mine = dataclasses.replace(context, tally=Tally())
            found = prefill(mine, _Rung(k), len(ids))
            kl.append(divergence(true, recite(decoder, found.buffer, length, found.logits, ids)))
            mine.tally.count(len(ids), length)
            context.tally.tokens += mine.tally.tokens + found.computed
            context.tally.pairs += mine.tally.pairs + found.pairs
        self._samples.append(Sample(signals, tuple(kl)))

    def _warming(self, agent: str) -> bool:
        return sum(sample.signals.agent == agent for sample in self._samples) < self.warmup

    @property
    def nbytes(self) -> int:
        """Of the samples' contents."""
        return sum(x.nbytes for sample in self._samples for x in sample.signals.contents.values())


class _Rung(Rotate):
    """What `Predicted` does where it shares, with the probes that it has then."""

    def __init__(self, k: int) -> None:
        self.k = k

    def choose(self, context: TurnContext, buffer: Buffer) -> torch.Tensor:
        deviation(context, buffer)
        return rung(context.prompt, self.k)


def rung(prompt: Prompt, k: int) -> torch.Tensor:
    """The slots that `rotate_glue` computes: all glue but the fixed prefix, and each content's first k tokens."""
    spans = [(s.start, s.stop if s.name is None else s.start + min(k, s.length)) for s in prompt.segments[1:]]
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in spans)])


def dense(prompt: Prompt) -> torch.Tensor:
    """All slots but those of the fixed prefix, which is exact."""
    return torch.arange(prompt.segments[0].stop, prompt.length)


# -- signals ----------------------------------------------------------------------------------------------------------


def signals_of(context: TurnContext, buffer: Buffer) -> Signals:
    """Of a turn whose buffer holds what would be reused; the probes' first layers are fresh there afterwards."""
    contents = [segment for segment in context.prompt.placeholders if segment.length]
    lengths = np.array([segment.length for segment in contents])
    moves = np.array([abs(s.start - context.base(s.name).home) for s in contents if s.name is not None])
    numbers = (
        math.log(deviation(context, buffer) + 1e-9),
        math.log(lengths.sum()),
        math.log1p(float((lengths * moves).sum() / lengths.sum())),
    )
    decoder = context.decoder
    embedded = {s.name: decoder.embeddings(decoder.tensor(s.ids))[0].double().mean(0) for s in contents}
    means = {name: mean.cpu().numpy() for name, mean in embedded.items() if name is not None}
    return Signals(context.prompt.agent, context.request.number, numbers, means)


def deviation(context: TurnContext, buffer: Buffer) -> float:
    """Squared difference of the probes' keys and values in layer 1 to fresh ones, by their square; mean over tokens."""
    # A model of one layer has nothing that depends on the surroundings.
    decoder, layer = context.decoder, min(COMPARED, context.decoder.layers - 1)
    found, weights = [], []
    for segment in context.prompt.placeholders:
        if not segment.length:
            continue
        start, stop = _probes(segment)
        both = buffer.keys[layer, 0, :, start:stop], buffer.values[layer, 0, :, start:stop]  # views
        reused = [x.clone() for x in both]
        decoder.fill(decoder.tensor(context.prompt.ids[start:stop]), buffer, range(start, stop), layer + 1)
        context.tally.count(stop - start, start, PART / decoder.layers)
        pairs = zip(reused, both, strict=True)
        found.append(sum(float((old.double() - new.double()).square().sum() / new.double().square().sum())
                         for old, new in pairs))  # fmt: skip
        weights.append(segment.length)
    return float(np.average(found, weights=weights))


def _probes(segment: Segment) -> tuple[int, int]:
    """A content of 20 tokens from slot 100 on is probed at 108 to 112."""
    count = min(PROBED, segment.length)
    start = segment.start + (segment.length - count) // 2
    return start, start + count


def divergence(true: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(true | other) over tokens, of logits (n, V), in float64."""
    p, q = (logits.double().log_softmax(-1) for logits in (true, other))
    return float((p.exp() * (p - q)).sum(-1).clamp_min(0.0).mean())


def _said(decoder: Decoder, buffer: Buffer, length: int, first: torch.Tensor, ids: Ids) -> torch.Tensor:
    """Logits (n, V) of an answer that was spoken freely, of which only the first ones were kept."""
    # In a copy: run together, the answer's tokens round differently, and its message's KV is still to be taken.
    copy = decoder.buffer(length + len(ids))
    copy.keys[:, :, :, :length], copy.values[:, :, :, :length] = (
        part[:, :, :, :length] for part in (buffer.keys, buffer.values)
    )
    return recite(decoder, copy, length, first, ids)
