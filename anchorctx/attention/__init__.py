"""Attention under packed layouts: `attend`, its backends, and the registration with transformers."""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily

if TYPE_CHECKING:
    from anchorctx.attention.interface import register
    from anchorctx.attention.keywords import hand_on_keywords
    from anchorctx.attention.registry import BACKENDS, attend

__all__ = ["BACKENDS", "attend", "hand_on_keywords", "register"]
__getattr__, __dir__ = lazily(
    __name__,
    {
        "BACKENDS": "registry",
        "attend": "registry",
        "hand_on_keywords": "keywords",
        "register": "interface",
    },
)
