"""A run goes on from its own checkpoints alone, and says what is new."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import LlamaConfig

from anchorctx.errors import UserError
from anchorctx.train.checkpoints import compare

from .engine import FakeEngine
from .saving import state_of


def test_a_run_that_differs_is_named(tmp_path: Path, engine: FakeEngine) -> None:
    state = state_of(engine, 1)
    compare.check_same_run(state, {"seed": 0}, tmp_path)
    with pytest.raises(UserError, match="written with seed=0, but this run has seed=1: give the same"):
        compare.check_same_run(state, {"seed": 1}, tmp_path)


def test_a_model_that_differs_is_named(tmp_path: Path, engine: FakeEngine) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    state = dataclasses.replace(state_of(engine, 1), model=compare.configuration(config))
    compare.check_same_model(state, LlamaConfig.from_dict(config.to_dict()), state.shapes, tmp_path)
    changes = {"rms_norm_eps": 1e-4, "num_attention_heads": 8, "hidden_act": "gelu", "hidden_size": 32}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}, "attention_bias": True}
    for key, value in changes.items():
        other = LlamaConfig.from_dict(config.to_dict() | {key: value})
        with pytest.raises(UserError, match=rf"written with model.{key}=.*, but this run has model.{key}="):
            compare.check_same_model(state, other, state.shapes, tmp_path)
    shapes = state.shapes | {"vector": [6]}
    with pytest.raises(UserError, match=r"has vector with \[5\], but this run's model with \[6\]"):
        compare.check_same_model(state, config, shapes, tmp_path)
    del shapes["vector"]
    with pytest.raises(UserError, match=r"has vector with \[5\], but this run's model without it"):
        compare.check_same_model(state, config, shapes, tmp_path)


def test_a_changed_schedule_is_said_and_an_unchanged_one_is_not(
    tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = {"steps": 10, "optim.betas": (0.9, 0.95)}
    state = dataclasses.replace(state_of(engine, 1), schedule={"steps": 10, "optim.betas": [0.9, 0.95]})
    compare.say_changes(state, schedule, tmp_path)
    assert not caplog.records
    compare.say_changes(state, schedule | {"steps": 20}, tmp_path / "step_5")
    assert caplog.messages == ["continuing step_5 with steps=20 (was 10)"]
