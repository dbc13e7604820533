"""Attention under packed layouts: `attend`, its backends, and the registration with transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorctx.attention.interface import register
    from anchorctx.attention.keywords import hand_on_keywords
    from anchorctx.attention.registry import BACKENDS, attend

__all__ = ["BACKENDS", "attend", "hand_on_keywords", "register"]


def __getattr__(name: str) -> object:
    """torch and transformers take seconds to import: only when something is used."""
    import importlib

    homes = {"BACKENDS": "registry", "attend": "registry", "hand_on_keywords": "keywords", "register": "interface"}
    if name not in homes:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"anchorctx.attention.{homes[name]}"), name)
