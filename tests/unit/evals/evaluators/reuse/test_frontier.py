"""What an arm costs, and which one is recommended."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from anchorctx.evals.evaluators.reuse.config import GateConfig
from anchorctx.evals.evaluators.reuse.frontier import cost_rows, recommendation
from anchorctx.evals.evaluators.reuse.measures import Closeness
from anchorctx.evals.evaluators.reuse.predictions import prediction_rows
from anchorctx.evals.evaluators.reuse.trial import Record
from anchorctx.records.results import Result, Rows


def rows_of(arms: dict[str, tuple[Any, ...]], **about: Any) -> Rows:
    """Of (KL, half of its interval or None, tokens, seconds) by arm, the costs over dense's."""
    rows = Rows()
    for arm, (kl, half, tokens, seconds) in arms.items():
        at = {"task": "t", "kind": "all", "arm": arm} | about
        low, high = (None, None) if half is None else (kl - half, kl + half)
        where = at | {"tokens": "all"}
        rows.append(Result(metric="kvcomm_kl", value=kl, unit="nat", n=20, low=low, high=high, context=where))
        for by, value in (("tokens", tokens), ("seconds", seconds)):
            rows.append(Result(metric="kvcomm_cost", value=value, unit="1", n=20, context=at | {"by": by}))
    return rows


EXACT = {"dense": (0.0, 0.0, 1.0, 1.0), "dense_prefix_cache": (0.0, 0.0, 0.8, 0.8)}
CHEAP, MIDDLE, CLOSE = (0.20, 0.02, 0.1, 0.2), (0.03, 0.01, 0.3, 0.4), (0.01, 0.001, 0.5, 0.6)


@pytest.mark.parametrize(
    ("arms", "chosen", "said"),
    [
        # The cheapest whose interval is within 0.05, not the closest and not the cheapest of all.
        ({"a:1": CHEAP, "b:1": MIDDLE, "b:2": CLOSE}, "b:1", "use b:1, the cheapest within a KL of 0.05: "
         "b:1 has 0.03 nat (0.02 to 0.04), computes 30% of dense's tokens and takes 40% of its time"),
        # Its mean is within the bound, its interval is not.
        ({"b:1": (0.04, 0.02, 0.3, 0.4), "b:2": CLOSE}, "b:2", "use b:2"),
        ({"a:1": CHEAP, "b:1": (0.05, 0.01, 0.3, 0.4)}, "dense",
         "none: stay dense; the least that was met is a KL of 0.06: b:1 has 0.05 nat (0.04 to 0.06)"),
        # Within the bound, but no cheaper than what loses nothing, or slower than dense.
        ({"b:1": (0.01, 0.001, 0.85, 0.5)}, "dense", "nothing that computes less than dense_prefix_cache (80%"),
        ({"b:1": (0.01, 0.001, 0.3, 1.5)}, "dense", "and is as fast as dense: b:1 has"),
        ({"b:1": (0.01, None, 0.3, 0.5)}, "dense", "none: stay dense; a single problem gives no interval: run several"),
    ],
)  # fmt: skip
def test_the_cheapest_arm_within_the_bound_is_recommended(arms: dict[str, Any], chosen: str, said: str) -> None:
    found = recommendation(rows_of(EXACT | arms), "t", GateConfig())
    assert found is not None and found.context["recommended"] == chosen and found.context["bound"] == 0.05
    assert found.context["sentence"].startswith("t: ") and said in found.context["sentence"]
    named = re.findall(r"(\w+:\d) has", found.context["sentence"])
    assert not named or found.value == arms[named[0]][0]


def test_another_bound_recommends_another_arm() -> None:
    rows = rows_of(EXACT | {"a:1": CHEAP, "b:1": MIDDLE, "b:2": CLOSE})
    arms = [recommendation(rows, "t", GateConfig(max_kl=bound)) for bound in (1.0, 0.05, 0.011, 0.001)]
    assert [found.context["recommended"] for found in arms if found] == ["a:1", "b:1", "b:2", "dense"]
    assert recommendation(rows_of(EXACT), "t", GateConfig()) is None


def test_the_recommendation_says_where_a_task_ended_early() -> None:
    rows = rows_of(EXACT | {"b:1": MIDDLE}, asked=96, stopped="budget_minutes")
    found = recommendation(rows, "t", GateConfig())
    assert found is not None and found.context["sentence"].endswith("(20 of 96 problems: budget_minutes)")


def record(arm: str, tokens: list[tuple[int, int, int]], ttft: list[float]) -> Record:
    """Problems of two turns each."""
    turn = Closeness(np.array([0.1]), np.array([True]))
    made = Record(arm, "k", False, [[turn, turn] for _ in ttft])
    made.tokens, made.ttft = tokens, [{"a": seconds / 2, "b": seconds / 2} for seconds in ttft]
    return made


def test_costs_are_of_whole_problems_with_the_work_beside_the_prompt() -> None:
    dense = record("dense", [(100, 100, 0), (300, 300, 0)] * 6, [2.0, 1.0, 1.0, 1.0, 1.0, 4.0])
    mine = record("rotate", [(100, 10, 30), (300, 60, 0)] * 6, [1.0, 0.4, 0.5, 0.3, 0.5, 2.4])
    tokens, seconds = cost_rows([mine], [dense], {})
    assert tokens.value == 0.25 and (tokens.low, tokens.high) == (0.25, 0.25) and tokens.n == 6
    # Ratios on the same problems: .5 .4 .5 .3 .5 .6; six values have all of them as the interval of their median.
    assert seconds.value == pytest.approx(0.5) and (seconds.low, seconds.high) == pytest.approx((0.3, 0.6))
    assert list(cost_rows([record("zeroed", mine.tokens, [1.0] * 6)], [dense], {})) == []  # a control


def test_predictions_are_counted_beside_what_was_true() -> None:
    made = record("predicted:0.05", [(1, 1, 0)] * 6, [1.0] * 3)
    shared = ["shared", 0.01, 0.03, 0.05]
    made.forecasts = [["warmup", None, None, 0.05], [None, None, None, 0.05], ["shared", 0.02, 0.04, 0.05]]
    made.forecasts += [["dense", 0.2, 0.4, 0.05], shared, shared]
    made.calibration = [[0.01, 0.02], [0.02, 0.03], [0.03, 0.01]]
    made.closeness[2][1] = Closeness(np.array([0.01, 0.03]), np.array([True, True]))  # 0.02, all others 0.1
    part, missed, rank = prediction_rows([made], {"arm": "predicted:0.05"})
    assert (part.value, part.n) == (0.75, 4) and (missed.value, missed.n) == (pytest.approx(2 / 3), 3)
    assert missed.context["values"] == [[0.02, 0.04, 0.1], [0.01, 0.03, 0.1], [0.01, 0.03, 0.02]]
    assert rank.value == pytest.approx(-0.5) and rank.context["values"] == made.calibration
    assert list(prediction_rows([record("rotate", made.tokens, [1.0] * 3)], {})) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("column", [0, 1])
def test_what_never_varies_has_no_rank_correlation(column: int) -> None:
    """Such as divergences that are all exactly 0; the other rows stay."""
    made = record("predicted:0.05", [(1, 1, 0)] * 2, [1.0])
    made.forecasts = [["shared", 0.01, 0.03, 0.05]] * 2
    made.calibration = [[0.01 * i, 0.02 * i] for i in range(4)]
    for pair in made.calibration:
        pair[column] = 0.0
    assert [row.context["measure"] for row in prediction_rows([made], {})] == ["shared", "missed"]
