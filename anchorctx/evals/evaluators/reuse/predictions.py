"""How well an arm predicts its own divergence: `kvcomm_prediction` rows, by measure.

`shared` is the part of the turns after the warm-up that were shared, `missed` the part of those whose true divergence
was above the bound, `rank` the rank correlation of what was expected and what was true in the fit's own turns, each
left out with its request; there is none where all that was expected is equal, or all that was true. `values` has the
pairs to draw: [expected, limit, true] of the shared turns beside `missed`, [expected, true] of those left out beside
`rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from anchorctx.evals.evaluators.reuse.trial import Record
from anchorctx.records.results import Result, wilson_interval


def prediction_rows(own: Sequence[Record], context: dict) -> Iterator[Result]:
    """An arm's, over all its kinds of problems; none of an arm that does not predict."""
    forecasts = [forecast for record in own for forecast in record.forecasts]
    if not forecasts:
        return
    true = [float(turn.kl.mean()) for record in own for problem in record.closeness for turn in problem]
    pairs = list(zip(forecasts, true, strict=True))
    later = [stage == "shared" for (stage, *_), _ in pairs if stage in ("shared", "dense")]
    shared = [[expected, limit, kl] for (stage, expected, limit, _), kl in pairs if stage == "shared"]
    bound = forecasts[0][-1]
    context = context | {"bound": bound}
    yield _share("shared", later, context)
    yield _share("missed", [kl > bound for *_, kl in shared], context | {"values": shared})
    left_out = [pair for record in own for pair in record.calibration]
    if len(left_out) > 2:
        expected, measured = (_ranks(np.array(x)) for x in zip(*left_out, strict=True))
        if not (np.ptp(expected) and np.ptp(measured)):  # no correlation with what never varies
            return
        context = context | {"measure": "rank", "values": left_out}
        value = float(np.corrcoef(expected, measured)[0, 1])
        yield Result(metric="kvcomm_prediction", value=value, unit="1", n=len(left_out), context=context)


def _share(measure: str, hits: Sequence[bool], context: dict) -> Result:
    """Of turns; those of a request are not independent, so that the interval is a little too narrow."""
    low, high = wilson_interval(sum(hits), len(hits))
    value = sum(hits) / len(hits) if hits else 0.0
    where = context | {"measure": measure}
    return Result(metric="kvcomm_prediction", value=value, unit="1", n=len(hits), low=low, high=high, context=where)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values have the mean of their ranks: 5, 7, 7 give 1, 2.5, 2.5."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
