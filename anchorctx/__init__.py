"""Long-context training of RoPE language models with AnchorAttention."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorctx.layout import PackedLayout, Pattern, Positions

__all__ = ["PackedLayout", "Pattern", "Positions", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The layout needs numpy, whose import takes longer than all of `anchorctx --version`."""
    import importlib

    if name not in __all__:
        raise AttributeError(name)
    # Not `from anchorctx import layout`, which asks for the attribute `layout` first, and so for this function again.
    return getattr(importlib.import_module("anchorctx.layout"), name)
