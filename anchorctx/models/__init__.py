"""Models: what a user says about one, its RoPE settings, and loading it."""

from anchorctx.models.build import (
    build_config,
    check_attention,
    check_vocabulary,
    checkpoint_activations,
    load_model,
    save_model,
)
from anchorctx.models.config import ModelConfig, ModelDtype, RopeConfig, RopeType
from anchorctx.models.rope import check_length, reach

__all__ = [
    "ModelConfig",
    "ModelDtype",
    "RopeConfig",
    "RopeType",
    "build_config",
    "check_attention",
    "check_length",
    "check_vocabulary",
    "checkpoint_activations",
    "load_model",
    "reach",
    "save_model",
]
