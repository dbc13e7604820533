"""Differences between two models, and whether chance explains them: paired where possible, else from the intervals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.records.results import Result, ratio_interval

Z = 1.959964
"""97.5 % quantile of the normal distribution."""
PAIRED_T = "paired t"
PAIRED_RATIO = "paired documents"
INTERVALS = "two intervals"
SIGN_FLIP = "sign flips over cells"
EXACT_FLIPS = 14
"""Pairs up to which all sign flips are tried; beyond, a fixed sample of 20,000."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`other - baseline`, or the ratio if `is_ratio`, with its 95 % interval and the probability of one at least as
    large if there is no difference."""

    value: float
    low: float
    high: float
    p: float
    test: str
    is_ratio: bool = False


def difference(baseline: Result, other: Result) -> Difference | None:
    """The difference between two models in one number; None if the spread of either is unknown.

    Paired Student's t over `values` of the same items where both rows have them; of perplexities, whose values are
    documents' mean losses, each document weighs by its `counts` of tokens. Else from the two 95 % intervals, as
    if independent: the interval by MOVER (Zou & Donner 2008; for Wilson's intervals Newcombe 1998), the probability by
    the normal deviate that the side towards zero implies. Perplexities are compared by their logarithms.
    """
    is_ratio = baseline.metric.startswith("perplexity")
    pair = _values(baseline), _values(other)
    if len(pair[0]) == len(pair[1]) >= 2:
        counts = other.context.get("counts")
        if not is_ratio:
            return _paired(*pair)
        if counts and counts == baseline.context.get("counts"):
            return _paired_ratio(*pair, counts)
    if None in (baseline.low, baseline.high, other.low, other.high):
        return None
    a, b = _levels(baseline, is_ratio), _levels(other, is_ratio)
    # MOVER: the lower distance of a difference is made of other's lower and baseline's upper one. 5 (4 to 7) less
    # 3 (2 to 4): value 2, down = hypot(1, 1) = 1.41, up = hypot(2, 1) = 2.24
    value = b[0] - a[0]
    down = math.hypot(b[0] - b[1], a[2] - a[0])
    up = math.hypot(b[2] - b[0], a[0] - a[1])
    towards = down if value > 0 else up
    # `towards` is 1.96 standard errors; erfc(x / sqrt(2)) is the two-sided probability of x standard errors
    p = math.erfc(abs(value) / towards * Z / math.sqrt(2)) if towards else float(value == 0)
    ends = value, value - down, value + up
    value, low, high = (math.exp(x) for x in ends) if is_ratio else ends
    return Difference(value, low, high, p, INTERVALS, is_ratio)


def over_cells(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """Mean of `other - baseline` over cells, such as tasks, that both models have; None for fewer than six.

    `p` is the probability that random signs of the differences give a mean as large: exact for few cells. The interval
    is Student's. Cells of one model are not quite independent, so that this is about these cells and no others.
    """
    # five differences of the same sign have p = 2 / 2**5 = 0.06: fewer than six can show nothing at 5 %
    moved = np.array([b - a for a, b in pairs])
    if len(moved) < 6:
        return None
    found = _paired([a for a, _ in pairs], [b for _, b in pairs])
    return Difference(found.value, found.low, found.high, _sign_flips(moved), SIGN_FLIP)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's adjusted probabilities (1979); compared with 0.05, the chance of any false alarm at all is below 0.05."""
    # [0.01, 0.04, 0.03]: sorted 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before: [0.03, 0.06, 0.06]
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min((len(order) - rank) * probabilities[index], 1.0))
        adjusted[index] = highest
    return adjusted


def student_p(t: float, freedom: int) -> float:
    """Two-sided probability of |T| >= |t| under Student's t."""
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _values(result: Result) -> list[float]:
    values = result.context.get("values")
    return list(values) if isinstance(values, list) else []


def _levels(result: Result, is_ratio: bool) -> tuple[float, float, float]:
    """(value, low, high), as logarithms for a ratio."""
    assert result.low is not None and result.high is not None
    ends = result.value, result.low, result.high
    return tuple(math.log(max(x, 1e-300)) for x in ends) if is_ratio else ends  # type: ignore[return-value]


def _paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    moved = [y - x for x, y in zip(a, b, strict=True)]
    mean, error = statistics.fmean(moved), statistics.stdev(moved) / math.sqrt(len(moved))
    half = student_quantile(len(moved) - 1) * error
    p = student_p(mean / error, len(moved) - 1) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p, PAIRED_T)


def _paired_ratio(a: Sequence[float], b: Sequence[float], counts: Sequence[int]) -> Difference:
    """The ratio of two perplexities: `a` and `b` are documents' mean losses in nats, `counts` their tokens."""
    sums = [(y - x) * count for x, y, count in zip(a, b, counts, strict=True)]
    ends = ratio_interval(sums, counts)
    assert ends is not None
    mean, half = math.fsum(sums) / sum(counts), (ends[1] - ends[0]) / 2
    p = math.erfc(abs(mean) / half * Z / math.sqrt(2)) if half else float(mean == 0)
    return Difference(math.exp(mean), math.exp(ends[0]), math.exp(ends[1]), p, PAIRED_RATIO, is_ratio=True)


def _sign_flips(moved: np.ndarray) -> float:
    if len(moved) <= EXACT_FLIPS:
        # (2**n, n): all ways to choose the signs
        signs = np.array(list(itertools.product((1, -1), repeat=len(moved))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), size=(20_000, len(moved)))
        signs[0] = 1  # what was observed is one of the possibilities
    sums = np.abs(signs @ moved)
    return float((sums >= abs(moved.sum()) * (1 - 1e-12)).mean())
