"""Where every token went, by source and by reason: exact integers, and an error if one was lost or counted twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from anchorctx.records.table import text_table

CAME = {
    "document_tokens": "tokens of documents",
    "eos_tokens": "+ EOS",
    "repeated": "+ repeated by the mixture",
}
"""What each source brings: its documents' tokens, EOS tokens appended to them, and tokens of further copies."""
WENT = {
    "trained": "  trained",
    "first_tokens": "  first of a piece",
    "zero_weight": "  masked (loss weight 0)",
}
"""What rows hold of each source: trained tokens, tokens that are not trained because another document's token (or the
anchor) comes before them in the row, and tokens that are not trained because their loss weight is 0: their label is
-100, or planted facts say so."""
CELLS = {"anchor": "+ anchors", "tags": "+ BOS and domain tags", "padding": "+ padding"}
"""What rows hold that is of no source."""
SHORT, TRUNCATED, TOO_LONG = "shorter than min_length", "truncated", "longer than a row"
"""Reasons why tokens of documents are in no row; the mixture has two more."""


class Accounting:
    """Counts of tokens of a packed set; `counts` and `dropped` have one number for each source."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = list(sources)
        self.counts = {name: np.zeros(len(sources), np.int64) for name in [*CAME, *WENT]}
        """(sources,) tokens under each name of CAME and WENT."""
        self.dropped: dict[str, np.ndarray] = {}
        """(sources,) tokens that are in no row, by reason."""
        self.cells = dict.fromkeys(CELLS, 0)
        """Tokens of rows under each name of CELLS."""
        self.rows = 0
        self.pieces = 0
        """Documents or parts of documents in rows, each alone for the attention."""

    def add(self, name: str, sources: np.ndarray, tokens: np.ndarray) -> None:
        """Count `tokens` (n,) under `name`; `sources` (n,) are indices of the sources that they are of."""
        self.counts[name] += _by_source(sources, tokens, len(self.sources))

    def drop(self, reason: str, sources: np.ndarray, tokens: np.ndarray) -> None:
        """Count `tokens` (n,) of `sources` (n,) that will be in no row."""
        if tokens.any():
            counts = self.dropped.setdefault(reason, np.zeros(len(self.sources), np.int64))
            counts += _by_source(sources, tokens, len(self.sources))

    def merge_rows(self, other: Accounting) -> None:
        """Add what `other` counted in rows; what came in and was dropped is counted once, by the planner."""
        for name in WENT:
            self.counts[name] += other.counts[name]
        for name in CELLS:
            self.cells[name] += other.cells[name]
        self.rows += other.rows
        self.pieces += other.pieces

    def total(self, name: str) -> int:
        """All sources' tokens under a name of CAME or WENT."""
        return int(self.counts[name].sum())

    @property
    def total_dropped(self) -> Counter[str]:
        """All sources' tokens that are in no row, by reason."""
        return Counter({reason: int(tokens.sum()) for reason, tokens in self.dropped.items()})

    @property
    def content(self) -> np.ndarray:
        """(sources,) tokens of documents in rows: the mixture as it turned out."""
        return self._sum([self.counts[name] for name in WENT])

    def check(self, row_length: int) -> None:
        """Raise RuntimeError unless every token of every source, and every cell of the rows, is counted exactly once.

        The sides are counted independently: what came in by the planner, what was dropped by the policies, the rest
        from the rows as they were made.
        """
        # documents of 100 tokens and 4 EOS = 80 trained + 5 first of a piece + 9 of weight 0 + 10 dropped
        came = self._sum([self.counts[name] for name in CAME])
        went = self.content + self._sum(list(self.dropped.values()))
        for source, before, after in zip(self.sources, came.tolist(), went.tolist(), strict=True):
            if before != after:
                raise RuntimeError(f"{before - after} tokens of {source} are unaccounted for: {self.to_dict()}")
        if self.rows * row_length != self.content.sum() + sum(self.cells.values()):
            raise RuntimeError(f"rows do not add up: {self.rows} x {row_length}, {self.to_dict()}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON for the manifest: totals, and under `sources` the same for each source."""
        totals = {name: self.total(name) for name in self.counts} | {"dropped": dict(self.total_dropped)}
        sources = {source: self._of(index) for index, source in enumerate(self.sources)}
        return totals | self.cells | {"rows": self.rows, "pieces": self.pieces, "sources": sources}

    def table(self, row_length: int) -> str:
        """What a user reads after packing."""
        cells, came = self.rows * row_length, sum(self.total(name) for name in CAME)
        names = {**CAME, **WENT}
        dropped = sorted(self.total_dropped.items())
        rows = [
            *(_row(names[name], self.total(name), came) for name in CAME if name != "repeated" or self.total(name)),
            *(_row(f"- dropped: {reason}", n, came) for reason, n in dropped),
            _row(f"= in {self.rows:,} rows of {row_length:,}", int(self.content.sum()), cells),
            *(_row(names[name], self.total(name), cells) for name in WENT),
            *(_row(text, self.cells[name], cells) for name, text in CELLS.items()),
        ]
        return "\n".join(text_table(rows, "<>") + (self._source_table() if len(self.sources) > 1 else []))

    def _sum(self, counts: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.zeros(len(self.sources), np.int64), *counts]).sum(axis=0)

    def _of(self, index: int) -> dict[str, Any]:
        counts = {name: int(tokens[index]) for name, tokens in self.counts.items()}
        return counts | {"dropped": {reason: int(n[index]) for reason, n in self.dropped.items() if n[index]}}

    def _source_table(self) -> list[str]:
        """One line for each source: tokens that came, were dropped and are in rows, and its share of the content."""
        rows: list[Sequence[object]] = [("by source", "came", "dropped", "in rows", "share")]
        content = self.content
        for index, source in enumerate(self.sources):
            came = sum(int(self.counts[name][index]) for name in CAME)
            # content has all that came and was not dropped, see `check`
            share = 100 * content[index] / max(content.sum(), 1)
            name = source if len(source) <= 32 else f"...{source[-29:]}"
            rows.append((f"  {name}", came, came - content[index], content[index], f"{share:.2f} %"))
        return text_table(rows, "<>")


def _by_source(sources: np.ndarray, tokens: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64 sums; float64 holds them exactly up to 2**53."""
    return np.bincount(sources, tokens, count).astype(np.int64)


def _row(name: str, count: int, of: int) -> tuple[str, int, str]:
    return name, count, f"{100 * count / max(of, 1):.2f} %"
