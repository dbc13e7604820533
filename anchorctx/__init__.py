"""Long-context training of RoPE language models with AnchorAttention."""

from anchorctx.layout import PackedLayout, Pattern, Positions

__all__ = ["PackedLayout", "Pattern", "Positions", "__version__"]
__version__ = "0.1.0"
