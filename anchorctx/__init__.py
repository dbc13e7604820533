"""Long-context training of RoPE language models with AnchorAttention."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorctx.layout import PackedLayout, Pattern, Positions

__all__ = ["PackedLayout", "Pattern", "Positions", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The layout needs numpy, whose import takes longer than all of `anchorctx --version`."""
    from anchorctx import layout

    if name not in __all__:
        raise AttributeError(name)
    return getattr(layout, name)
