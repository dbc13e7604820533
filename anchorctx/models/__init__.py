"""Models: what a user says about one, its RoPE settings, and loading it."""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily
from anchorctx.models.config import ModelConfig, ModelDtype, RopeConfig, RopeType

if TYPE_CHECKING:
    from anchorctx.models.build import (
        build_config,
        check_attention,
        check_vocabulary,
        checkpoint_activations,
        load_model,
    )
    from anchorctx.models.rope import check_length, reach
    from anchorctx.models.save import save_model

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
__getattr__, __dir__ = lazily(
    __name__,
    {
        "build_config": "build",
        "check_attention": "build",
        "check_length": "rope",
        "check_vocabulary": "build",
        "checkpoint_activations": "build",
        "load_model": "build",
        "reach": "rope",
        "save_model": "save",
    },
)
