"""AnchorAttention under other trainers: a collator that lays rows out, and a check of the model that reads them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorctx.integrations.check import check_model
    from anchorctx.integrations.collator import AnchorCollator, Excess
    from anchorctx.integrations.rows import row_starts

__all__ = ["AnchorCollator", "Excess", "check_model", "row_starts"]


def __getattr__(name: str) -> object:
    """torch and transformers take seconds to import: only when something is used."""
    import importlib

    homes = {"AnchorCollator": "collator", "Excess": "collator", "check_model": "check", "row_starts": "rows"}
    if name not in homes:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"anchorctx.integrations.{homes[name]}"), name)
