"""How large the divergence of a turn will be, from cheap signals: fitted to turns whose true divergence was measured.

A ridge regression of the divergence's logarithm, one for each rung of a ladder of settings. The margin above what it
expects is a quantile of its residuals, each from a fit without that request's turns (a jackknife, in the manner of
conformal prediction: Barber et al., Annals of Statistics 2021). It holds as far as later requests are exchangeable with
the fitted ones: drawn from the same source, in no particular order. Then the truth is above the limit in about `miss`
of all turns; of those that are shared because their limit is low, more may be. It is a bound for a single turn: the
mean over turns is far below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FLOOR = 1e-6
"""Nats added to a divergence before its logarithm is taken: what is below makes no difference to anybody."""
RIDGE = 8.0
"""Weight of the penalty on coefficients of signals with a spread of 1, as much as eight observations: it costs little
where signals are strong, and signals that say nothing widen the margin less."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of a turn before it is decided."""

    agent: str
    request: int
    numbers: tuple[float, ...]
    """Logarithms, of any scale: how far probed tokens deviate, how many tokens are reused, how far they move."""
    contents: Mapping[str, np.ndarray]
    """By placeholder: the mean of its tokens' input embeddings (E,), in float64."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A turn whose truth is known."""

    signals: Signals
    kl: tuple[float, ...]
    """Nats a token, for each rung."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one rung's divergence on one turn."""

    expected: float
    """Nats a token."""
    limit: float
    """What it exceeds with a probability of about `miss`; infinite where too few turns were measured to say."""


class Predictor:
    """Fitted to samples, of two requests at least; further turns of the same agents can be predicted."""

    def __init__(self, samples: Sequence[Sample], miss: float) -> None:
        self._samples, self.count = tuple(samples), len(samples)
        self._agents = list(dict.fromkeys(sample.signals.agent for sample in samples))
        raw = np.array([self._numbers(sample.signals) for sample in samples])
        self._mean, spread = raw.mean(0), raw.std(0)
        self._spread = np.where(spread > 1e-9, spread, 1.0)  # a signal that never varies says nothing
        design = np.array([self._row(sample.signals) for sample in samples])
        truth = np.log(np.array([sample.kl for sample in samples]) + FLOOR)  # (samples, rungs)
        self._weights = self._fit(design, truth)
        requests = np.array([sample.signals.request for sample in samples])
        left_out = np.empty_like(truth)
        for request in np.unique(requests):
            mine = requests == request
            left_out[mine] = design[mine] @ self._fit(design[~mine], truth[~mine])
        self._margins = [margin(residuals, miss) for residuals in (truth - left_out).T]
        self.left_out: tuple[tuple[float, float], ...] = tuple(
            (math.exp(expected), sample.kl[rung])
            for row, sample in zip(left_out, samples, strict=True)
            for rung, expected in enumerate(row)
        )
        """(expected, true) of every sample and rung, expected by a fit without its request."""

    def predict(self, signals: Signals) -> list[Prediction]:
        """For each rung."""
        expected = self._row(signals) @ self._weights
        return [
            Prediction(math.exp(log), math.exp(min(log + margin, 700.0)))
            for log, margin in zip(expected.tolist(), self._margins, strict=True)
        ]

    def _row(self, signals: Signals) -> np.ndarray:
        """A one for the agent, then the signals with a mean of 0 and a spread of 1."""
        agent = [float(signals.agent == other) for other in self._agents]
        return np.array([*agent, *((self._numbers(signals) - self._mean) / self._spread)])

    def _numbers(self, signals: Signals) -> np.ndarray:
        """The signals' numbers, and how far its contents are from the nearest ones of other requests."""
        return np.array([*signals.numbers, math.log(self._novelty(signals) + FLOOR)])

    def _novelty(self, signals: Signals) -> float:
        apart = []
        for name, content in signals.contents.items():
            others = [
                sample.signals.contents[name]
                for sample in self._samples
                if sample.signals.request != signals.request and name in sample.signals.contents
            ]
            if others:
                apart.append(min(float(np.linalg.norm(content - other)) for other in others))
        return float(np.mean(apart)) if apart else 0.0

    def _fit(self, design: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """(features, rungs) coefficients; the agents' own levels are not held down."""
        penalty = np.diag([1e-6] * len(self._agents) + [RIDGE] * (design.shape[1] - len(self._agents)))
        return np.linalg.solve(design.T @ design + penalty, design.T @ truth)


def margin(residuals: np.ndarray, miss: float) -> float:
    """What a further residual exceeds with a probability of `miss` at most; infinite where there are too few."""
    # Of n + 1 exchangeable residuals the last is equally likely at each rank: 19 and a miss of 0.1 give the 18th.
    rank = math.ceil((len(residuals) + 1) * (1 - miss))
    return math.inf if rank > len(residuals) else float(np.sort(residuals)[rank - 1])
