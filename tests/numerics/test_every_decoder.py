"""Every causal decoder of transformers, by each way in: packed documents stay apart, or one sentence says why not.

A packed row (each document behind its copy of the anchor) against every document alone through the model's own eager
attention, logits and gradients, float64. The ways in: our training's `load_model`; plain Python,
`from_pretrained(..., attn_implementation="anchor")`; `check_model` and a flattened batch with `cu_seq_lens_q`.

Tolerance: measured over all exact decoders, logits differ by at most 2e-14 of their standard deviation, gradients by
4e-14 of their largest (or of 1), except where transformers itself computes a part in float32 (`IN_FLOAT32`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anchorctx.attention import register
from anchorctx.attention.architecture import REASONS, check_architecture, known, refusal
from anchorctx.errors import UserError
from anchorctx.integrations import check_model
from anchorctx.models import ModelConfig, build_config, load_model
from anchorctx.testing import decoders
from anchorctx.testing.tiny import true_float64

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
IN_FLOAT32: set[str] = set()
"""Decoders of which a part cannot be computed in float64."""
SAMPLE = {"llama", "gemma4", "llama4", "nemotron", "gptj", "gpt_neox_japanese", "qwen3_next", "rwkv", "bart", "gpt2"}
"""Run in CI: a plain one, a wrapper with head dimensions by layer, chunks, a hook, a table of angles, and refused ones."""
UNTRIED = {"gemma3n"}
"""Needs `timm`, which is not installed here: refused in a sentence that says so."""
NEVER_ASK: set[str] = set()
"""Refused by all but plain Python, where no function of ours is ever called: these drop `layouts` and go on."""


def cases() -> list[Any]:
    return [pytest.param(t, marks=() if t in SAMPLE else pytest.mark.slow) for t in decoders.TYPES]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says much about the default configurations of old models."""
    monkeypatch.setattr(transformers.logging, "warning_once", lambda *args: None, raising=False)
    register()


def is_exact(model_type: str) -> bool:
    return model_type in known()[0]


@pytest.mark.filterwarnings("ignore")  # transformers' own, of old models
@pytest.mark.parametrize("model_type", [c for c in cases() if is_exact(c.values[0])])
def test_documents_stay_apart(model_type: str, tmp_path: Path) -> None:
    config = decoders.tiny(model_type)
    decoders.build(config, "eager").save_pretrained(tmp_path)
    dtype = torch.float32 if model_type in IN_FLOAT32 else torch.float64
    tolerance, row = TOLERANCE[dtype], decoders.row()
    with true_float64():
        plain = prepared(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"), dtype)
        expected = decoders.logits_alone(plain, row)
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        (expected * cotangent).sum().backward()

        trained = prepared(load_model(ModelConfig(path=str(tmp_path))), dtype)
        found = packed(trained, row, layouts=(row.layout,))
        (found * cotangent).sum().backward()
        assert decoders.difference(found, expected) < tolerance
        assert gradient_difference(trained, plain) < tolerance

        python = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="anchor")
        python = prepared(python, dtype)
        try_out(python, row, expected, tolerance, layouts=(row.layout,))
        try:
            check_model(python)
        except UserError:
            return
        try_out(python, row, expected, tolerance, cu_seq_lens_q=torch.tensor(row.layout.doc_offsets))


def prepared(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.set_experts_implementation("eager")  # torch's grouped matrix product has no float64
    return model.to(dtype).eval()
