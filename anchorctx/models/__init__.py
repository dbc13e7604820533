"""Models: what a user says about one, its RoPE settings, and loading it."""

from typing import TYPE_CHECKING

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


def __getattr__(name: str) -> object:
    """torch and transformers take seconds to import: only when something is used."""
    import importlib

    if name not in __all__:
        raise AttributeError(name)
    home = {"check_length": "rope", "reach": "rope", "save_model": "save"}.get(name, "build")
    return getattr(importlib.import_module(f"anchorctx.models.{home}"), name)
