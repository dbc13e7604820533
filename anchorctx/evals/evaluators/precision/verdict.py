"""What a study says, from its rows: one sentence with numbers, a recommendation, and the table that is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.evals.evaluators.precision.config import Arithmetic
from anchorctx.evals.evaluators.precision.rows import ALL, interval_half
from anchorctx.records.results import Result, Rows
from anchorctx.records.table import text_table

COLUMNS = ("shift", "bfloat16", "float32_rotation", "float32")
TITLES = ("shift (tokens)", "bfloat16", "float32 rotation", "float32")


@dataclass(frozen=True, slots=True)
class Question:
    """What the verdict is about."""

    model: str
    shift: int
    lengths: Sequence[int]


def verdict(rows: Sequence[Result], question: Question) -> Result | None:
    """The row `precision_verdict`: the share of the change that float32 rotation removes, with `sentence` and
    `recommendation` in its context; None where bfloat16 was not studied."""
    at = {"weights": "trained", "rows": "shift", "layer": ALL, "shift": question.shift, "length": question.lengths[-1]}
    change = {a: find(rows, "precision_attention_change", arithmetic=a.value, first="kept", **at) for a in Arithmetic}
    bfloat16, ours = change[Arithmetic.bfloat16], change[Arithmetic.float32_rotation]
    if bfloat16 is None:
        return None
    removed, half = _removed(bfloat16, ours) if ours is not None else (0.0, None)
    sentence = f"{question.model}: {_changes(rows, question, change, at)}; {_growth(rows, question, at)}"
    context = {
        "model": question.model,
        "shift": question.shift,
        "length": question.lengths[-1],
        "sentence": sentence + _first_token(rows, at) + ".",
        "recommendation": _recommendation(rows, removed, half, at) if ours is not None else "",
    }
    low, high = (None, None) if half is None else (removed - half, removed + half)
    return Result(
        metric="precision_verdict", value=removed, unit="1", n=bfloat16.n, low=low, high=high, context=context
    )


def find(rows: Sequence[Result], metric: str, /, **context: Any) -> Result | None:
    """The row of `metric` whose context has all of `context`, or None."""
    return Rows(rows).find(metric, **context)


def _removed(before: Result, after: Result) -> tuple[float, float | None]:
    """Mean over texts of the share of the change that is gone, and half its interval."""
    # `values` has one number for each text, and both arithmetics read the same texts: paired.
    pairs = zip(before.context["values"], after.context["values"], strict=True)
    shares = [1 - b / a if a else 0.0 for a, b in pairs]
    return statistics.fmean(shares), interval_half(shares)


def _changes(
    rows: Sequence[Result], question: Question, change: dict[Arithmetic, Result | None], at: dict[str, Any]
) -> str:
    names = {
        Arithmetic.bfloat16: "in bfloat16",
        Arithmetic.float32_rotation: "with float32 rotation",
        Arithmetic.float32: "in float32",
    }
    parts = [f"{percent(row.value)} {names[a]}" for a, row in change.items() if row is not None]
    control = find(
        rows, "precision_attention_change", arithmetic="bfloat16", first="kept", **at | {"weights": "control"}
    )
    beside = f" (weights drawn anew: {percent(control.value)} in bfloat16)" if control else ""
    tokens = "token" if question.shift == 1 else "tokens"
    # "3.1 % in bfloat16" becomes "3.1 % of each query's attention in bfloat16", in the first part alone.
    parts[0] = parts[0].replace(" %", " % of each query's attention", 1)
    return (
        f"at {question.lengths[-1]:,} tokens, shifting all positions by {question.shift:,} {tokens} moves "
        f"{_listed(parts)}{beside}"
    )


def _growth(rows: Sequence[Result], question: Question, at: dict[str, Any]) -> str:
    shortest, longest = question.lengths[0], question.lengths[-1]
    ends = [
        find(rows, "precision_attention_change", arithmetic="bfloat16", first="kept", **at | {"length": length})
        for length in (shortest, longest)
    ]
    if shortest == longest or ends[0] is None or ends[1] is None or not ends[0].value:
        return ""
    factor = ends[1].value / ends[0].value
    word = ("grows" if factor > 1 else "shrinks") if _differ(ends[0], ends[1]) else "does not grow measurably"
    return f"from {shortest:,} to {longest:,} tokens the bfloat16 change {word} (×{factor:.2f}); "


def _differ(a: Result, b: Result) -> bool:
    """Whether the 95 % interval of the difference of two independent means leaves out 0."""
    # Half widths of independent means add in squares.
    if a.high is None or b.high is None:
        return False
    return abs(a.value - b.value) > math.hypot(a.high - a.value, b.high - b.value)


def _first_token(rows: Sequence[Result], at: dict[str, Any]) -> str:
    """The first token's part of the change beside other tokens' and beside its attention, and what hiding it does."""

    def bfloat16(metric: str, **more: Any) -> Result | None:
        return find(rows, metric, arithmetic="bfloat16", **at | more)

    kept, hidden = (bfloat16("precision_attention_change", first=first) for first in ("kept", "hidden"))
    # None: not the rows of texts whose first token was dropped.
    share, attention, other, rank = (
        bfloat16(f"precision_{name}", first=None)
        for name in ("first_share", "first_attention", "other_share", "first_rank")
    )
    if kept is None or hidden is None or share is None or attention is None:
        return "the first token's part is not known"
    place = "" if other is None or rank is None else f", {_place(rank, other, at['length'])}"
    return (
        f"the first token has {percent(share.value)}{_within(share)} of the change, where no token can have more than "
        f"50 %{place}: {share.value * at['length']:.3g} times an even share, and {_times(share, attention)} its part "
        f"of the attention, {percent(attention.value)}{_within(attention)}; with it hidden {percent(hidden.value)} "
        f"moves, {_times(hidden, kept)} as much"
    )


def _place(rank: Result, other: Result, length: int) -> str:
    """Where the first token stands among all by size, with the largest of the others."""
    places = sorted(int(place) for place in rank.context["values"])
    which = f"{places[0]:,}" if places[0] == places[-1] else f"{places[0]:,} to {places[-1]:,}"
    texts = "the one text" if len(places) == 1 else f"{len(places)} texts"
    return (
        f"place {which} of {length:,} by size in {texts} (the largest other token has {percent(other.value)}"
        f"{_within(other)})"
    )


def _times(part: Result, whole: Result) -> str:
    """How often `whole` goes into `part`, with the interval over texts."""
    # Both have one number for each text, of the same texts: paired.
    ratios = [a / b for a, b in zip(part.context["values"], whole.context["values"], strict=True) if b]
    if not ratios:
        return "no multiple of"
    mean, half = statistics.fmean(ratios), interval_half(ratios)
    spread = "" if half is None else f" (95 %: {mean - half:.2f} to {mean + half:.2f})"
    return f"{mean:.2f} times{spread}"


def _within(row: Result) -> str:
    return "" if row.low is None or row.high is None else f" (95 %: {percent(row.low)} to {percent(row.high)})"


def _recommendation(rows: Sequence[Result], removed: float, half: float | None, at: dict[str, Any]) -> str:
    # Measurably: the interval of what is removed does not reach 0.
    helps = removed > (half if half is not None else 0.0)
    spread = f" (95 %: {percent(removed - half)} to {percent(removed + half)})" if half is not None else ""
    if not helps:
        return f"rope_dtype=float32 does not reduce the change measurably ({percent(removed)}{spread}): either will do."
    after = _after_all_layers(rows, at)
    cost = find(rows, "precision_cost")
    price = ""
    if cost is not None and cost.low is not None and cost.high is not None:
        where = f"a bfloat16 training step of {cost.context['length']:,} tokens on {cost.context['device']}"
        span = f"({100 * (cost.value - 1):+.1f} %, 95 %: {100 * (cost.low - 1):+.1f} to {100 * (cost.high - 1):+.1f} %)"
        # A ratio whose interval has 1 in it is no difference.
        known = (
            "takes longer" if cost.low > 1 else "takes less time" if cost.high < 1 else "takes no longer, measurably"
        )
        price = f" With it {where} {known} {span}."
    rest = "what is left is the one rounding of queries and keys to bfloat16"
    return f"Use rope_dtype=float32: it removes {percent(removed)}{spread} of the change; {rest}.{after}{price}"


def _after_all_layers(rows: Sequence[Result], at: dict[str, Any]) -> str:
    """Whether the same shows at the end of the model, where every rounding on the way adds its own."""
    # These rows are of all layers together and have no `layer`.
    at = {key: value for key, value in at.items() if key != "layer"}
    spoken = [find(rows, "precision_logprob_change", arithmetic=a, **at) for a in ("bfloat16", "float32_rotation")]
    if spoken[0] is None or spoken[1] is None:
        return ""
    word = "differs as well" if _differ(spoken[0], spoken[1]) else "does not show it"
    return (
        f" The next token's log-probability {word}: it changes by {spoken[0].value:.2g} nats in bfloat16 and "
        f"{spoken[1].value:.2g} with float32 rotation, since the rest of the model is in bfloat16 either way."
    )


def percent(share: float) -> str:
    """A share as per cent with two significant digits, or three from 10 % on."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:#.2g} %"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def table(rows: Sequence[Result]) -> str:
    """The change of attention by shift at the longest length, for the checkpoint and the control, and the verdict."""
    lines: list[str] = []
    changes = [
        row
        for row in rows
        if row.metric == "precision_attention_change"
        and row.context["rows"] == "shift"
        and row.context["layer"] == ALL
        and row.context["first"] == "kept"
    ]
    # One grid a model: shifts down, arithmetics across, at the longest length only.
    longest = max((row.context["length"] for row in changes), default=0)
    for weights, title in (("trained", "the checkpoint"), ("control", "the same with weights drawn anew")):
        mine = [row for row in changes if row.context["weights"] == weights and row.context["length"] == longest]
        if mine:
            lines += ["", f"attention that moves, {title}, {longest:,} tokens", *_grid(mine)]
    for row in rows:
        if row.metric == "precision_verdict":
            lines += ["", row.context["sentence"], *filter(None, [row.context["recommendation"]])]
    return "\n".join(lines)


def _grid(rows: Sequence[Result]) -> list[str]:
    value = {(row.context["shift"], row.context["arithmetic"]): row.value for row in rows}
    lines: list[Sequence[object]] = [TITLES]
    for shift in sorted({shift for shift, _ in value}):
        cells = (value.get((shift, name)) for name in COLUMNS[1:])
        lines.append([shift, *("" if x is None else f"{100 * x:.4f} %" for x in cells)])
    return text_table(lines, ">", indent=2)
