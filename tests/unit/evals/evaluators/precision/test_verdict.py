"""What a study says of synthetic rows, and how tokens are ranked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anchorctx.evals.evaluators.precision.probe import Change
from anchorctx.evals.evaluators.precision.rows import layer_rows, mean_result
from anchorctx.evals.evaluators.precision.verdict import Question, verdict
from anchorctx.records.results import Result


def synthetic(
    bfloat16: list[float], ours: list[float], hidden: float, cost: tuple[float, float, float]
) -> list[Result]:
    at = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16}

    def row(values: list[float], arithmetic: str, length: int = 4096, metric: str = "attention_change", **more: Any):
        context = at | {"arithmetic": arithmetic, "length": length} | more
        return mean_result(f"precision_{metric}", values, "1", context)

    mean = sum(bfloat16) / len(bfloat16)
    value, low, high = cost
    return [
        row(bfloat16, "bfloat16", first="kept"),
        row([x / 2 for x in bfloat16], "bfloat16", 512, first="kept"),
        row(ours, "float32_rotation", first="kept"),
        row([1e-6, 2e-6], "float32", first="kept"),
        row([hidden * mean, hidden * mean], "bfloat16", first="hidden"),
        row([0.129, 0.131], "bfloat16", metric="first_share"),
        row([0.258, 0.262], "bfloat16", metric="first_attention"),
        row([0.0109, 0.0111], "bfloat16", metric="other_share"),
        row([1.0, 1.0], "bfloat16", metric="first_rank"),
        row([0.9, 0.9], "bfloat16", metric="first_share", first="dropped"),
        Result(metric="precision_cost", value=value, unit="1", n=8, low=low, high=high,
               context={"length": 4096, "device": "the CPU"}),
    ]  # fmt: skip


def close(rows: list[Result]) -> Result:
    found = verdict(rows, Question("mine", 16, (512, 4096)))
    assert found is not None
    return found


def test_the_verdict_says_what_was_measured():
    closing = close(synthetic([0.010, 0.0101], [0.005, 0.0051], hidden=0.3, cost=(1.08, 1.05, 1.11)))
    assert closing.value == pytest.approx(0.4975, abs=1e-3)
    assert closing.context["sentence"] == (
        "mine: at 4,096 tokens, shifting all positions by 16 tokens moves 1.0 % of each query's attention in bfloat16, "
        "0.51 % with float32 rotation and 0.00015 % in float32; from 512 to 4,096 tokens the bfloat16 change grows "
        "(×2.00); the first token has 13 % (95 %: 12 % to 14 %) of the change, where no token can have more than 50 %, "
        "place 1 of 4,096 by size in 2 texts (the largest other token has 1.1 % (95 %: 0.97 % to 1.2 %)): 532 times an "
        "even share, and 0.50 times (95 %: 0.50 to 0.50) its part of the attention, 26 % (95 %: 23 % to 29 %); with it "
        "hidden 0.30 % moves, 0.30 times (95 %: 0.28 to 0.32) as much."
    )
    assert closing.context["recommendation"].startswith("Use rope_dtype=float32: it removes 50 %")
    assert closing.context["recommendation"].endswith(
        "With it a bfloat16 training step of 4,096 tokens on the CPU takes longer (+8.0 %, 95 %: +5.0 to +11.0 %)."
    )


def test_the_verdict_ranks_the_first_token_and_judges_nothing():
    """Nobody's sentence turns over at a threshold: the same words with other numbers."""
    for hidden in (0.1, 0.49, 0.51, 0.95, 1.5):
        sentence = close(synthetic([0.01, 0.01], [0.005, 0.0051], hidden, (1.0, 0.9, 1.1))).context["sentence"]
        assert f"moves, {hidden:.2f} times (95 %: {hidden:.2f} to {hidden:.2f}) as much" in sentence
        assert "carr" not in sentence
    rows = synthetic([0.01, 0.0101], [0.005, 0.0051], 1.0, (1.0, 0.9, 1.1))
    rank = next(row for row in rows if row.metric == "precision_first_rank")
    rank.context["values"] = [3.0, 17.0]
    assert "place 3 to 17 of 4,096 by size in 2 texts" in close(rows).context["sentence"]
    assert "takes no longer, measurably" in close(rows).context["recommendation"]
    old = [row for row in rows if row.metric not in ("precision_first_rank", "precision_other_share")]
    assert "50 %: 532 times an even share" in close(old).context["sentence"]
    assert "the first token's part is not known" in close(rows[:4]).context["sentence"]


def test_tokens_are_ranked_by_their_part_of_the_change():
    """Two layers' changes of four keys: 4 1 6 1 and 2 1 2 1 of 18; the largest other has 8, and the first 6."""

    def change(keys: list[float]) -> Change:
        one, parts = torch.ones(1, dtype=torch.float64), torch.tensor(keys, dtype=torch.float64)
        return Change(one * sum(keys) / 2, one, parts[:1], one, one, one, parts)

    context = {"rows": "shift", "length": 4}
    rows = list(layer_rows([{0: change([4, 1, 6, 1]), 1: change([2, 1, 2, 1])}], context, layers=True))
    found = {
        (row.metric.removeprefix("precision_"), row.context["layer"]): row.value
        for row in rows
        if row.metric.removeprefix("precision_") in ("first_share", "other_share", "first_rank")
    }
    assert found == pytest.approx({
        ("first_share", "all"): 6 / 18, ("other_share", "all"): 8 / 18, ("first_rank", "all"): 2,
        ("first_share", 0): 4 / 12, ("other_share", 0): 6 / 12, ("first_rank", 0): 2,
        ("first_share", 1): 2 / 6, ("other_share", 1): 2 / 6, ("first_rank", 1): 1,
    })  # fmt: skip


@pytest.mark.parametrize(("ours", "word"), [(0.0131, "does not show it"), (0.005, "differs as well")])
def test_the_recommendation_says_whether_the_models_output_shows_it(ours: float, word: str):
    rows = synthetic([0.01, 0.0101], [0.005, 0.0051], 1.0, (1.0, 0.9, 1.1))
    at = {"weights": "trained", "rows": "shift", "shift": 16, "length": 4096}
    for arithmetic, value in (("bfloat16", 0.013), ("float32_rotation", ours)):
        values = [value, value * 1.01]
        rows.append(mean_result("precision_logprob_change", values, "nats", at | {"arithmetic": arithmetic}))
    text = close(rows).context["recommendation"]
    assert f"log-probability {word}: it changes by 0.013 nats in bfloat16 and {ours:.2g} with" in text


def test_no_recommendation_without_an_effect():
    rows = synthetic([0.010, 0.012], [0.0102, 0.0112], 1.0, (1.1, 1.0, 1.2))
    assert "does not reduce the change measurably" in close(rows).context["recommendation"]
    rows = synthetic([0.010, 0.03], [0.005, 0.01], 1.0, (0.8, 0.7, 0.9))
    assert "does not grow measurably (×2.00)" in close(rows).context["sentence"]
    assert verdict([], Question("mine", 16, (4096,))) is None
