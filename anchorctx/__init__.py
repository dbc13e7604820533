"""Long-context training of RoPE language models with AnchorAttention."""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily

if TYPE_CHECKING:
    from anchorctx.layout import PackedLayout, Pattern, Positions

__all__ = ["PackedLayout", "Pattern", "Positions", "__version__"]
__version__ = "0.1.0"
__getattr__, __dir__ = lazily(
    __name__,
    {
        "PackedLayout": "layout",
        "Pattern": "layout",
        "Positions": "layout",
    },
)
