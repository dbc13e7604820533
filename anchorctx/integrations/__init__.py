"""AnchorAttention under other trainers: a collator that lays rows out, and a check of the model that reads them."""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily

if TYPE_CHECKING:
    from anchorctx.integrations.check import check_model
    from anchorctx.integrations.collator import AnchorCollator, Excess
    from anchorctx.integrations.rows import row_starts

__all__ = ["AnchorCollator", "Excess", "check_model", "row_starts"]
__getattr__, __dir__ = lazily(
    __name__,
    {
        "AnchorCollator": "collator",
        "Excess": "collator",
        "check_model": "check",
        "row_starts": "rows",
    },
)
