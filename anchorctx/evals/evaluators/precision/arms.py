"""The models under study: a checkpoint, and the same architecture with weights drawn anew, in each arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.precision import probe
from anchorctx.evals.evaluators.precision.config import Arithmetic
from anchorctx.models import reach
from anchorctx.models.load import load_weights, read_config, read_tokenizer
from anchorctx.models.rope import full_parameters

MOVING = ("dynamic", "longrope")
"""Scalings whose frequencies depend on the highest position."""


class Weights(StrEnum):
    """Which weights an arm has."""

    trained = "trained"
    """The checkpoint's."""
    control = "control"
    """Drawn anew, as before any training."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is studied, before any weight is read."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @property
    def reach(self) -> int:
        """Tokens that its positions reach."""
        return reach(self.config)

    @property
    def layers(self) -> int:
        """Number of its decoder layers."""
        return int(self.config.num_hidden_layers)


def open_subject(path: str, fields: dict[str, Any], device: str) -> Subject:
    """Read configuration and tokenizer; UserError when the folder is no model that can be studied."""
    config, tokenizer = read_config(path, fields).get_text_config(), read_tokenizer(path)
    if not getattr(config, "rope_parameters", None):
        raise UserError(f"model={path} ({config.model_type}) has no rotary position embeddings: name a RoPE decoder")
    kind = full_parameters(config).get("rope_type", "default")
    if kind in MOVING:
        raise UserError(
            f"model={path} has rope_type={kind}, whose frequencies change with the highest position, so that a shift "
            "is meant to change its attention: study it with config='{rope_parameters: {rope_type: default, ...}}'"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Subject(path, config, tokenizer, torch.device(device))


def load(subject: Subject, weights: Weights, arithmetic: Arithmetic, seed: int) -> PreTrainedModel:
    """One arm, ready to be probed: its forward needs `probe=`."""
    probe.register()
    dtype = torch.float32 if arithmetic is Arithmetic.float32 else torch.bfloat16
    if weights is Weights.trained:
        model = load_weights(subject.path, subject.config, dtype=dtype)
    else:
        model = _control(subject, dtype, seed)
    set_rope_dtype(model, RopeDtype.bfloat16 if arithmetic is Arithmetic.bfloat16 else RopeDtype.float32)
    model.set_attn_implementation(probe.NAME)
    return model.to(subject.device).eval()  # type: ignore[arg-type]


def _control(subject: Subject, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Drawn in float32 and rounded to `dtype`, so that every arithmetic has the same weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        drawn = AutoModelForCausalLM.from_config(copy.deepcopy(subject.config), dtype=torch.float32)
    if dtype is torch.float32:
        return drawn
    model = AutoModelForCausalLM.from_config(copy.deepcopy(subject.config), dtype=dtype)
    model.load_state_dict(drawn.state_dict())  # not model.to(dtype), which would round the frequencies too
    return model


def arms(control: bool, arithmetics: list[Arithmetic]) -> Iterator[tuple[Weights, Arithmetic]]:
    """What is studied, in order."""
    for weights in Weights if control else (Weights.trained,):
        for arithmetic in arithmetics:
            yield weights, arithmetic
