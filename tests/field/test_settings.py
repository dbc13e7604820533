"""Settings of real checkpoints that need a word before training: dropout in attention, lengths beyond a scaling."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, RopeConfig, load_model
from anchorctx.models.build import build_config

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SMALL |= {"num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def saved(folder: Path, kind: str, **fields: object) -> str:
    AutoConfig.for_model(kind, **SMALL | fields).save_pretrained(folder)
    return str(folder)


# ibm-granite/granite-3.0-8b-base was published with it, and GPT-J's and Falcon's kind name it otherwise
@pytest.mark.parametrize(("kind", "name"), [("granite", "attention_dropout"), ("gptj", "attn_pdrop")])
def test_dropout_in_attention_is_said_before_anything_is_made(kind: str, name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind, **{name: 0.1}, **({"rotary_dim": 4} if kind == "gptj" else {}))
    with pytest.raises(UserError, match=rf"model type {kind} has {name}=0.1, which no .*: set model.no_dropout=true"):
        build_config(ModelConfig(path=path))
    assert getattr(build_config(ModelConfig(path=path, no_dropout=True)), name) == 0.0


def test_without_dropout_two_passes_are_one(tmp_path: Path) -> None:
    """Residual dropout, which training would keep, goes too."""
    fields = {"model_type": "granite", "attention_dropout": 0.1, **SMALL}
    model = load_model(ModelConfig(config=fields, no_dropout=True, attention="reference"))
    assert model.training and not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())


# huggingface/transformers #38224, vllm-project/vllm #56446: what a YaRN checkpoint reaches is its factor times the
# original length, whatever max_position_embeddings says
def test_a_length_beyond_a_checkpoints_yarn_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
    path = saved(tmp_path, "llama", rope_parameters=yarn, max_position_embeddings=16384)
    with caplog.at_level(logging.WARNING):
        config = build_config(ModelConfig(path=path, rope=RopeConfig(theta=1e6), max_length=16384))
    assert not caplog.records and config.max_position_embeddings == 16384
    with caplog.at_level(logging.WARNING):
        config = build_config(ModelConfig(path=path, rope=RopeConfig(theta=1e6), max_length=65536))
    assert "beyond the 16384 positions that the checkpoint's yarn scaling of 4096 by 4 reaches" in caplog.text
    assert "model.rope.factor=16" in caplog.text and config.max_position_embeddings == 65536
