"""AnchorAttention under other trainers: attached to their model, or laid out by a collator or a dataset of rows."""

from typing import TYPE_CHECKING

from anchorctx.lazy import lazily

if TYPE_CHECKING:
    from anchorctx.integrations.attachment import attach, detach
    from anchorctx.integrations.check import check_model
    from anchorctx.integrations.collator import AnchorCollator, Excess
    from anchorctx.integrations.row_dataset import RowDataset, collate_rows, weighted_loss
    from anchorctx.integrations.rows import row_starts

__all__ = [
    "AnchorCollator",
    "Excess",
    "RowDataset",
    "attach",
    "check_model",
    "collate_rows",
    "detach",
    "row_starts",
    "weighted_loss",
]
__getattr__, __dir__ = lazily(
    __name__,
    {
        "AnchorCollator": "collator",
        "Excess": "collator",
        "RowDataset": "row_dataset",
        "attach": "attachment",
        "check_model": "check",
        "collate_rows": "row_dataset",
        "detach": "attachment",
        "row_starts": "rows",
        "weighted_loss": "row_dataset",
    },
)
