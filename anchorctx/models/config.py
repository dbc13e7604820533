"""What a user says about the model: where it comes from, its length, RoPE, dtypes and attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from anchorctx.attention.rope import RopeDtype


class ModelDtype(StrEnum):
    """Data type of the weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class RopeType(StrEnum):
    """transformers' scalings of rotary frequencies."""

    default = "default"
    """No scaling: frequencies from `theta` alone."""
    linear = "linear"
    """Positions divided by `factor` (arXiv 2306.15595)."""
    dynamic = "dynamic"
    """NTK: theta grows with the row's length beyond the original one."""
    yarn = "yarn"
    """High frequencies kept, low ones divided by `factor` (arXiv 2309.00071)."""
    llama3 = "llama3"
    """As Llama 3.1: like yarn, with another ramp and no temperature."""


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Changes to the checkpoint's rotary embeddings; None keeps what the checkpoint has.

    Models with one set per layer type (Gemma 3, OLMo 3) change that of their full-attention layers; `extra` reaches the
    others.
    """

    type: RopeType | None = None
    """default, linear, dynamic, yarn or llama3."""
    theta: float | None = None
    """Base of the frequencies, dimensionless; the paper uses 1e6 at 16K tokens, 5e6 at 64K, 1e7 at 128K."""
    factor: float | None = None
    """New length over original length, at least 1; needed by every scaling type."""
    original_max_position_embeddings: int | None = None
    """Tokens that the model was trained for before scaling; None takes the checkpoint's."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More of transformers' parameters (`beta_fast`, `low_freq_factor`, ...); a layer type's name (`sliding_attention`)
    takes a dictionary of parameters for those layers."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model: exactly one of `path` (weights) and `config` (from scratch)."""

    path: str | None = None
    """Folder of a Hugging Face checkpoint, or its name on the hub."""
    config: dict[str, Any] = field(default_factory=dict)
    """A new, randomly initialised model: `model_type` and fields of its transformers configuration."""
    dtype: ModelDtype = ModelDtype.float32
    """float32 or bfloat16."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Changes to the rotary position embeddings."""
    rope_dtype: RopeDtype = RopeDtype.float32
    """Rotate queries and keys in float32, or in the activations' dtype as transformers does (bfloat16)."""
    max_length: int | None = None
    """New maximum length in tokens, written into the exported configuration; None keeps the checkpoint's."""
    attention: str = "auto"
    """Attention backend: auto, flash_attn, torch_varlen, cpu, flex or reference."""
    seed: int = 0
    """Seed of a new model's weights."""
