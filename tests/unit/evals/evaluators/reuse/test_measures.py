"""How near an arm is to dense, and the gate's bounds on that."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import GateConfig
from anchorctx.evals.evaluators.reuse.measures import context_error, kv_error, paired_difference
from anchorctx.evals.evaluators.reuse.rows import check_arm, judge
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.records.results import Result
from anchorctx.testing.tiny import text_model


def test_intervals_of_paired_answers() -> None:
    value, low, high = paired_difference([True] * 6 + [False] * 4, [True] * 4 + [False] * 6)
    assert value == pytest.approx(0.2) and low < 0.2 < high
    same = paired_difference([True] * 10, [True] * 10)
    assert same[0] == 0.0 and same[1] < 0.0 < same[2]
    assert paired_difference([True] * 1000, [True] * 1000)[2] < same[2]


def test_cache_errors_are_by_layer_and_part() -> None:
    true = KV(torch.ones(2, 1, 1, 3, 4), torch.ones(2, 1, 1, 3, 4))
    keys = true.keys.clone()
    keys[1] *= 1.5
    values = true.values.clone()
    values[0] *= -1
    found = kv_error(KV(keys, values), true)
    np.testing.assert_allclose(found.relative, [[0, 0.5], [2, 0]])
    np.testing.assert_allclose(found.cosine, [[1, 1], [-1, 1]], rtol=1e-6)


def test_content_and_place_are_told_apart() -> None:
    decoder = Decoder(text_model(train_tokenizer(vocabulary=300, sample_chars=20_000), 1024).eval())
    text, other, document = list(range(3, 43)), list(range(50, 90)), list(range(100, 120))
    content, shift = context_error(decoder, document, text, other, 1)
    for found in (content, shift):
        assert found.relative[:, 0].max() < 1e-5 < found.relative[:, 1].min()
    same, _ = context_error(decoder, document, text, text, 1)
    assert same.relative.max() == 0.0


def gate_rows(
    task: str, kl: float = 0.01, agreement: float = 0.99, reuse: float = 0.5, ttft: float = 0.5
) -> list[Result]:
    def row(metric: str, value: float, arm: str = "rotate", **where: str) -> Result:
        context = {"arm": arm, "task": task, "kind": "all"} | where
        return Result(metric=metric, value=value, unit="1", n=1, context=context)

    return [
        row("kvcomm_kl", kl, tokens="all"),
        row("kvcomm_agreement", agreement, tokens="all"),
        row("kvcomm_reuse", reuse, by="contents"),
        row("kvcomm_ttft", 2 * ttft, agent="request", quantile="p50"),
        row("kvcomm_ttft", 2.0, arm="dense", agent="request", quantile="p50"),
    ]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kl": 0.06}, r"KL 0.06 \(at most 0.05\): NOT MET"),
        ({"agreement": 0.9}, r"agreement 0.9000 \(at least 0.95\): NOT MET"),
        ({"reuse": 0.0}, r"reuse 0.000 of the contents' tokens \(at least 0.1\): NOT MET"),
        ({"ttft": 2.0}, r"time to first token 2.00 of dense's \(at most 1\): NOT MET"),
    ],
)
def test_the_gate_reads_the_worst_task(bad: dict[str, float], said: str) -> None:
    good = gate_rows("x")
    assert judge(good, GateConfig()) is None
    verdict = judge(good, GateConfig(arm="rotate"))
    assert verdict is not None and verdict.passed and "NOT MET" not in verdict.text
    verdict = judge(good + gate_rows("y", **bad), GateConfig(arm="rotate"))
    assert verdict is not None and not verdict.passed and verdict.text.count("\n") == 1
    assert re.search(said, verdict.text) and verdict.text.count("NOT MET") == 1
    with pytest.raises(UserError, match="gate.arm=rotate is not among the arms"):
        check_arm(GateConfig(arm="rotate"), ["copy"])
