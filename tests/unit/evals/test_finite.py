"""No result holds a number that is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError
from anchorctx.evals.evaluators import perplexity
from anchorctx.evals.evaluators.config import PerplexityConfig, RetrievalConfig
from anchorctx.evals.evaluators.perplexity import perplexity_row
from anchorctx.evals.finite import checked
from anchorctx.evals.runner import EvalConfig, EvalName, evaluate
from anchorctx.evals.scoring import score_pieces
from anchorctx.records.results import Result, read_results

from .conftest import TEXTS


def row(**fields: Any) -> Result:
    return Result(**{"metric": "m", "value": 1.0, "unit": "1", "n": 3} | fields)


@pytest.mark.parametrize(
    "fields",
    [{"value": math.nan}, {"value": math.inf}, {"context": {"values": [1.0, math.nan]}}]
    + [{"context": {"a": {"loss_nats": -math.inf}}}],
)
def test_a_value_that_is_not_finite_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^m of tiny.* came out as (nan|inf|-inf), though the model's weights are fin"):
        list(checked([row(**fields)], "tiny"))


def test_an_interval_that_is_not_finite_is_not_known() -> None:
    (found,) = checked([row(low=0.5, high=math.inf)], "tiny")
    assert (found.value, found.low, found.high) == (1.0, None, None)
    (found,) = checked([row(low=0.5, high=2.0)], "tiny")
    assert (found.low, found.high) == (0.5, 2.0)


def test_a_loss_past_what_exp_can_hold_is_infinite_and_none_is_an_error() -> None:
    found = perplexity_row("perplexity", np.array([8000.0, 9000.0]), np.array([10, 10]), {})
    assert found.value == math.inf and found.context["loss_nats"] == 850
    with pytest.raises(UserError, match="no held-out document has a token to score for perplexity: name a corpus"):
        perplexity_row("perplexity", np.array([0.0]), np.array([0]), {})


def test_an_evaluation_ends_and_keeps_what_it_has(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that overflow in one evaluation: the rows of the one before are written, and nothing else."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = EvalConfig(
        model=str(folder),
        out_dir=str(tmp_path / "out"),
        evals=[EvalName.retrieval, EvalName.perplexity],
        corpus=SourceConfig(path=str(tmp_path / "corpus.jsonl")),
        perplexity=PerplexityConfig(max_length=128),
        retrieval=RetrievalConfig(lengths=[64], rows=2),
    )

    def overflowing(*args: Any) -> Any:
        return [(at, loss + math.inf) for at, loss in score_pieces(*args)]

    monkeypatch.setattr(perplexity, "score_pieces", overflowing)
    with pytest.raises(UserError, match="perplexity of tiny came out as inf, though the model's weights are finite"):
        evaluate(config)
    assert [row.metric for row in read_results(tmp_path / "out" / "results.jsonl")] == ["retrieval_accuracy"]
