"""The ways in which commands read a model's folder, for tests of what they refuse: each raises UserError or returns."""

from __future__ import annotations

from pathlib import Path

from anchorctx.evals import subject
from anchorctx.evals.config import EvalConfig
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision.config import Arithmetic
from anchorctx.models import ModelConfig, build_config, load_model
from anchorctx.models.load import check_weights
from anchorctx.plan.config import PlanConfig
from anchorctx.plan.planner import Planner


def train(path: Path) -> None:
    """As `anchorctx train`."""
    load_model(ModelConfig(path=str(path)))


def train_sharded(path: Path) -> None:
    """What a run under ZeRO 3 does before transformers hands out the shares."""
    check_weights(str(path), build_config(ModelConfig(path=str(path))))


def plan(path: Path) -> None:
    """As `anchorctx plan`, for rows of 64 tokens."""
    Planner(PlanConfig(model=ModelConfig(path=str(path)), row_length=64))


def evaluation(path: Path) -> None:
    """As `anchorctx eval`."""
    config = EvalConfig(model=str(path), out_dir="x")
    (model,) = subject.models_of(config)
    subject.load(model, subject.read_config(model), subject.read_tokenizer(model), config)


def precision(path: Path) -> None:
    """As `anchorctx precision`."""
    models.load(models.open_checkpoint(str(path), {}, "cpu"), models.Weights.trained, Arithmetic.float32, 0)
