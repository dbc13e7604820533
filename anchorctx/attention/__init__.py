"""Attention under packed layouts: `attend`, its backends, and the registration with transformers."""

from anchorctx.attention.registry import BACKENDS, attend

__all__ = ["BACKENDS", "attend", "register"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """`register` imports transformers, which takes seconds: only when it is asked for."""
    if name == "register":
        from anchorctx.attention.interface import register

        return register
    raise AttributeError(name)
