"""Where every token went: exact integers, and a check that none was lost or counted twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Accounting:
    """Counts of tokens, of a packed set."""

    document_tokens: int = 0
    """Tokens of the documents' texts."""
    eos_tokens: int = 0
    """EOS tokens appended to documents."""
    trained: int = 0
    """Content tokens with a label."""
    first_tokens: int = 0
    """Content tokens without one because another document's token (or the anchor) comes before them in the row."""
    zero_weight: int = 0
    """Content tokens without one because their loss weight is 0."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Content tokens that are in no row, by reason."""
    anchor: int = 0
    """Anchor tokens of all rows."""
    tags: int = 0
    """Tokens of domain tags."""
    padding: int = 0
    """Tokens that fill rows up."""
    rows: int = 0
    """Rows packed."""
    pieces: int = 0
    """Documents or parts of documents in rows, each alone for the attention."""

    def check(self, row_length: int) -> None:
        """Raise RuntimeError unless every token is accounted for exactly once."""
        came = self.document_tokens + self.eos_tokens
        went = self.trained + self.first_tokens + self.zero_weight
        if came != went + self.dropped.total():
            raise RuntimeError(f"tokens were lost in packing: {came} came in, {self.to_dict()}")
        if self.rows * row_length != went + self.anchor + self.tags + self.padding:
            raise RuntimeError(f"rows do not add up: {self.rows} x {row_length}, {self.to_dict()}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON for the manifest."""
        names = [name for name in self.__slots__ if name != "dropped"]  # type: ignore[attr-defined]
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return counts | {"dropped": dict(self.dropped)}

    def table(self, row_length: int) -> str:
        """What a user reads after packing."""
        cells, content = self.rows * row_length, self.document_tokens + self.eos_tokens
        lines = [
            _line("tokens of documents", self.document_tokens, content),
            _line("+ EOS", self.eos_tokens, content),
            *(_line(f"- dropped: {reason}", n, content) for reason, n in sorted(self.dropped.items())),
            _line(f"= in {self.rows:,} rows of {row_length:,}", content - self.dropped.total(), cells),
            _line("  trained", self.trained, cells),
            _line("  first of a piece", self.first_tokens, cells),
            _line("  loss weight 0", self.zero_weight, cells),
            _line("+ anchors", self.anchor, cells),
            _line("+ domain tags", self.tags, cells),
            _line("+ padding", self.padding, cells),
        ]
        return "\n".join(lines)


def _line(name: str, count: int, of: int) -> str:
    return f"{name:<34}{count:>18,}{100 * count / max(of, 1):>9.2f} %"
