"""`anchorctx precision` and `anchorctx kvcomm`: short names for one evaluation with its settings at the top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.errors import UserError
from anchorctx.evals.config import EvalConfig, EvalName, KvcommConfig
from anchorctx.evals.evaluators.precision.config import PrecisionConfig
from anchorctx.evals.evaluators.reuse.rows import Verdict, judge
from anchorctx.evals.runner import evaluate
from anchorctx.records.results import Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of `anchorctx kvcomm`."""

    rows: list[Result]
    verdict: Verdict | None
    """The gate's, where one was asked for."""


def evaluate_precision(config: PrecisionConfig) -> list[Result]:
    """Run (or finish) the study; returns its rows, the verdict last."""
    return evaluate(precision_evaluation(config), "precision", asked=config)


def precision_evaluation(config: PrecisionConfig) -> EvalConfig:
    """The study as an evaluation among others."""
    return EvalConfig(**_shared(config), evals=[EvalName.precision], precision=config)


def evaluate_reuse(config: KvcommConfig) -> Outcome:
    """Run (or finish) the tasks through the arms, one model after another, and judge by the gate."""
    averaged = next((model for model in config.models if model.average is not None), None)
    if averaged is not None:
        raise UserError(f"average={averaged.average} is not known to kvcomm, which compares models one by one: drop it")
    rows = evaluate(reuse_evaluation(config), "kvcomm", asked=config)
    return Outcome(rows, judge(rows, config.gate))


def reuse_evaluation(config: KvcommConfig) -> EvalConfig:
    """KV reuse as an evaluation among others."""
    return EvalConfig(**_shared(config, "models", "dtype"), evals=[EvalName.kvcomm], kvcomm=config)


def _shared(config: Any, *more: str) -> dict[str, Any]:
    names: Sequence[str] = ("model", "out_dir", "label", "config", "corpus", "seed", "device", *more)
    return {name: getattr(config, name) for name in names}
