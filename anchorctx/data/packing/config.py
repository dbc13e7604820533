"""How documents become rows, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge

from anchorctx.errors import UserError
from anchorctx.settings import Positive, check_ranges


class Policy(StrEnum):
    """Which documents share a row."""

    best_fit = "best_fit"
    """Best-fit decreasing over a buffer of documents: none that fits into a row is cut, little is padded."""
    concat_split = "concat_split"
    """In order; what reaches over the row's end continues in the next row as a document of its own. No padding."""
    one_per_row = "one_per_row"
    """Each document has a row; the rest is padding."""


class LongDocuments(StrEnum):
    """What becomes of documents longer than a row."""

    split = "split"  # type: ignore[assignment]  # hides str.split, which nobody calls on it
    """Cut into pieces that fill a row, and the remainder."""
    truncate = "truncate"
    """Only the beginning is kept."""
    drop = "drop"
    """Left out."""


@dataclass(kw_only=True, slots=True)
class PackConfig:
    """How documents become rows."""

    policy: Policy = Policy.best_fit
    """best_fit, concat_split or one_per_row."""
    long_documents: LongDocuments = LongDocuments.split
    """Documents longer than a row: split, truncate or drop. What is dropped is counted."""
    min_length: Positive = 1
    """Tokens; shorter documents, and shorter pieces left over by cutting, are dropped and counted. 1 keeps all."""
    prepend_bos: bool = False
    """Begin each document, and each piece of one, with BOS, never trained."""
    domain_tags: bool = False
    """Begin each document with the name of its domain, never trained (the paper's domain tagging)."""
    interleave: Annotated[int, Ge(1), "use 1 for whole documents, or 2 or 3"] = 1
    """Chunks into which each document is cut, scattered over its row in order; 1 leaves documents whole."""
    buffer_tokens: Annotated[int, Ge(1), "leave it at its default"] = 2**25
    """Tokens that best_fit looks at together, at least four rows."""

    def validate(self, capacity: int) -> None:
        """UserError for values out of range; `capacity` is a row's tokens without the anchor."""
        if not 1 <= self.min_length <= capacity:
            raise UserError(f"pack.min_length={self.min_length} must be 1 to {capacity}, what a row holds: change it")
        check_ranges(self, "pack")
