"""What each arm costs for what it loses, and which of them to use: the cheapest within a bound on its divergence.

`kvcomm_cost` rows have an arm's prompt tokens that are computed, those beside the prompt too, and its seconds to first
token, both over dense's. `kvcomm_recommendation` has one sentence a task; console and report repeat it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.evals.evaluators.reuse.config import GateConfig
from anchorctx.evals.evaluators.reuse.trial import Record
from anchorctx.kvcomm.arms.names import CONTROLS
from anchorctx.records.results import Result, Rows, median_interval, ratio_interval

EXACT = ("dense", "dense_prefix_cache")
"""Arms that lose nothing: what the others must be cheaper than."""


def cost_rows(own: Sequence[Record], dense: Sequence[Record], context: dict) -> Iterator[Result]:
    """An arm's `kvcomm_cost` by tokens and seconds; none for controls, which are no way to save anything."""
    if own[0].arm in CONTROLS:
        return
    problems = [row for record in own for row in _by_problem(record)]  # (prompt, computed) each
    prompt, spent = ([float(pair[i]) for pair in problems] for i in range(2))
    low, high = ratio_interval(spent, prompt) or (None, None)
    # What a cache of the agents' fixed texts alone leaves to compute, exactly: what an arm must be cheaper than.
    behind = 1 - sum(fixed for r in dense for fixed, *_ in r.contents) / sum(t for r in dense for t, *_ in r.tokens)
    where = context | {"by": "tokens", "behind_prefix": behind}
    value = sum(spent) / sum(prompt)
    yield Result(metric="kvcomm_cost", value=value, unit="1", n=len(problems), low=low, high=high, context=where)
    mine, theirs = ([sum(request.values()) for r in records for request in r.ttft] for records in (own, dense))
    # Pairs on the same problem, and their median: the machine's pace changes, and the first problem warms it up.
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    where, value = context | {"by": "seconds", "values": ratios}, statistics.median(ratios)
    yield Result(metric="kvcomm_cost", value=value, unit="1", n=len(ratios), low=low, high=high, context=where)


def _by_problem(record: Record) -> Iterator[tuple[int, int]]:
    """Prompt tokens of each problem's turns, and those computed, with their prompt or beside it."""
    turns = np.array(record.tokens, dtype=np.int64)  # (turns, 3)
    ends = np.cumsum([len(problem) for problem in record.closeness])
    for part in np.split(turns, ends[:-1]):
        prompt, computed, hidden = part.sum(0).tolist()
        yield prompt, computed + hidden


# -- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One arm on one task."""

    arm: str
    kl: Result
    tokens: Result
    seconds: Result

    @property
    def worst(self) -> float:
        """Upper end of the divergence's interval; infinite where a single problem gives none."""
        return float("inf") if self.kl.high is None else self.kl.high


def recommendation(rows: Rows, task: str, gate: GateConfig) -> Result | None:
    """The cheapest arm whose divergence is within `gate.max_kl` with its interval's upper end, as a row.

    It must compute fewer tokens than dense and a prefix cache, and be no slower than dense. The row's value and
    interval are the chosen arm's divergence; where none is chosen, that of the arm that the sentence names instead.
    None without an arm.
    """
    points = list(_points(rows, task))
    offered = [point for point in points if point.arm not in EXACT]
    if not offered:
        return None
    exact, saved = _exact(points)
    within = [point for point in offered if point.worst <= gate.max_kl]
    useful = [p for p in within if p.tokens.value < saved and p.seconds.value <= 1]
    chosen = min(useful, key=lambda p: (p.tokens.value, p.seconds.value), default=None)
    least = min(offered, key=lambda p: (p.worst, p.kl.value))  # shown where none is chosen
    if chosen is not None:
        said = f"use {chosen.arm}, the cheapest within a KL of {gate.max_kl:g}: {_words(chosen)}"
    elif within:
        least = min(within, key=lambda p: p.tokens.value)
        said = (
            f"none: stay dense; within a KL of {gate.max_kl:g} there is nothing that computes less than {exact} "
            f"({saved:.0%} of the tokens) and is as fast as dense: {_words(least)}"
        )
    elif least.kl.high is None:
        said = "none: stay dense; a single problem gives no interval: run several"
    else:
        said = f"none: stay dense; the least that was met is a KL of {least.kl.high:.2g}: {_words(least)}"
    shown = chosen or least
    if (stopped := shown.kl.context.get("stopped")) is not None:
        said += f" ({shown.kl.n} of {shown.kl.context['asked']} problems: {stopped})"
    context = {"task": task, "bound": gate.max_kl, "recommended": chosen.arm if chosen else "dense"}
    return Result(
        metric="kvcomm_recommendation",
        value=shown.kl.value,
        unit="nat",
        n=shown.kl.n,
        low=shown.kl.low,
        high=shown.kl.high,
        context=context | {"sentence": f"{task}: {said}"},
    )


def _exact(points: Sequence[Point]) -> tuple[str, float]:
    """What loses nothing and computes least, and its part of dense's tokens. A cache of the agents' fixed texts can be
    had whether it runs as an arm or not."""
    found = {point.arm: point.tokens.value for point in points if point.arm in EXACT}
    found["a cache of the agents' fixed texts"] = points[0].tokens.context.get("behind_prefix", 1.0)
    return min(found.items(), key=lambda pair: pair[1])


def _points(rows: Rows, task: str) -> Iterator[Point]:
    at = {"task": task, "kind": "all"}
    for arm in rows.of("kvcomm_cost", **at).distinct("arm"):
        kl = rows.find("kvcomm_kl", arm=arm, tokens="all", **at)
        tokens, seconds = (rows.find("kvcomm_cost", arm=arm, by=by, **at) for by in ("tokens", "seconds"))
        assert kl is not None and tokens is not None and seconds is not None
        yield Point(arm, kl, tokens, seconds)


def _words(point: Point) -> str:
    interval = "" if point.kl.high is None else f" ({point.kl.low:.2g} to {point.kl.high:.2g})"
    return (
        f"{point.arm} has {point.kl.value:.2g} nat{interval}, computes {point.tokens.value:.0%} of dense's tokens and "
        f"takes {point.seconds.value:.0%} of its time to first token"
    )
