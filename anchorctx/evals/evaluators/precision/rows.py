"""From changes to result rows: means over texts with their 95 % intervals.

Every row's context has `model`, `weights` (trained, control, random), `arithmetic` and `rows` (shift, intra_doc), and
`layer`: a number, or `all` for the mean over the measured layers. `values` holds what each text gave, for paired tests.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from anchorctx.evals.evaluators.precision.probe import Change
from anchorctx.records.results import Result, mean_interval

SINGLE_KEYS = 8
"""The first keys have a row each; the others share rows, each twice as wide as the one before."""
ALL = "all"
"""The `layer` of a mean over layers."""


def mean_result(metric: str, values: Sequence[float], unit: str, context: dict[str, Any]) -> Result:
    """The mean of one value a text, with Student's 95 % interval where there are two texts or more."""
    mean = statistics.fmean(values)
    low, high = mean_interval(values) or (None, None)
    # Kept for paired tests between two models or arithmetics on the same texts.
    context = context | {"values": list(values)}
    return Result(metric=metric, value=mean, unit=unit, n=len(values), low=low, high=high, context=context)


def interval_half(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % interval; None for one value."""
    ends = mean_interval(values)
    return None if ends is None else (ends[1] - ends[0]) / 2


def layer_rows(texts: Sequence[dict[int, Change]], context: dict[str, Any], layers: bool) -> Iterator[Result]:
    """The rows of one shift at one length: the mean over layers, and each layer if `layers`.

    `texts` are the changes of each text, by layer.
    """
    yield from _change_rows([list(text.values()) for text in texts], context | {"layer": ALL})
    for layer in sorted(texts[0]) if layers else ():
        yield from _change_rows([[text[layer]] for text in texts], context | {"layer": layer})


def _change_rows(texts: Sequence[Sequence[Change]], context: dict[str, Any]) -> Iterator[Result]:
    """`texts` are the changes of each text, of the layers that the rows are the mean of."""

    def row(metric: str, name: str, unit: str = "1", **more: Any) -> Result:
        values = [_mean([getattr(change, name) for change in text]) for text in texts]
        return mean_result(metric, values, unit, context | more)

    yield row("precision_attention_change", "attention", first="kept")
    # The same with the first token left out of the softmax: what remains is not the first token's.
    yield row("precision_attention_change", "hidden", first="hidden")
    yield row("precision_score_change", "score", "nats")
    yield row("precision_first_score_change", "first_score", "nats")
    yield row("precision_first_attention", "first_attention")
    shares = [_first_share(text) for text in texts]
    if all(share is not None for share in shares):
        yield mean_result("precision_first_share", [share or 0.0 for share in shares], "1", context)
        if context["rows"] == "shift":  # one document, so that key 0 is every query's first token
            ranked = [_ranked(text) for text in texts]
            yield mean_result("precision_other_share", [largest for largest, _ in ranked], "1", context)
            yield mean_result("precision_first_rank", [float(rank) for _, rank in ranked], "1", context)


def key_rows(texts: Sequence[dict[int, Change]], context: dict[str, Any]) -> Iterator[Result]:
    """`precision_key_change`: the change of attention to one key, mean over the keys from `key_start` to `key_stop`."""
    # (T,) for each text: the mean over layers of the change of attention to each key.
    means = [torch.stack([change.keys for change in text.values()]).mean(0) for text in texts]
    for start, stop in key_bins(len(means[0])):
        at = context | {"layer": ALL, "key_start": start, "key_stop": stop}
        yield mean_result("precision_key_change", [float(mean[start:stop].mean()) for mean in means], "1", at)


def key_bins(length: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the key ranges that rows are made for."""
    # length 100: 0-1, 1-2, ..., 7-8, 8-16, 16-32, 32-64, 64-100.
    start = 0
    while start < length:
        stop = min(start + 1 if start < SINGLE_KEYS else 2 * start, length)
        yield start, stop
        start = stop


def _mean(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack(list(tensors)).mean())


def _first_share(changes: Sequence[Change]) -> float | None:
    """The first token's part of the sum of absolute changes, 0 to 0.5; None where nothing changed."""
    # `attention` is half the sum of absolute changes; the other half is what other tokens gain. One token moves at most
    # as much as all others together, hence 0.5 at most.
    total = sum(float(2 * change.attention.sum()) for change in changes)
    return sum(float(change.first.sum()) for change in changes) / total if total else None


def _ranked(changes: Sequence[Change]) -> tuple[float, int]:
    """The largest part of the change that a token beside the first has, and the first token's place by size, from 1."""
    # Keys change by 4, 1, 6, 1 of 12: the largest other has 6 / 12, and the first is in second place.
    keys = torch.stack([change.keys for change in changes]).mean(0)
    return float(keys[1:].max() / keys.sum()), 1 + int((keys[1:] > keys[0]).sum())
