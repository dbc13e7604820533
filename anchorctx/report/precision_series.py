"""The precision study's rows as lines: what both the report and `precision.png` draw.

The three figures are the paper's (arXiv 2411.13476, section 3): the change of attention against the shift, the change
by token, and the first token's change against the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.records.results import Result

ARITHMETICS = {"bfloat16": "bfloat16", "float32_rotation": "float32 rotation", "float32": "float32"}
COLORS = {"bfloat16": 2, "float32_rotation": 1, "float32": 3}
WEIGHTS = {"trained": "", "control": ", weights drawn anew"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One line: an arithmetic of the checkpoint or of the control."""

    name: str
    arithmetic: str
    weights: str
    x: list[float]
    rows: list[Result]

    @property
    def color(self) -> int:
        """The number of its colour."""
        return COLORS[self.arithmetic]

    @property
    def dashed(self) -> bool:
        """Is it the control?"""
        return self.weights == "control"


@dataclass(frozen=True, slots=True)
class Study:
    """One model's rows of a precision study."""

    model: str
    rows: Sequence[Result]

    @property
    def length(self) -> int:
        """The longest row, in tokens."""
        return max((row.context["length"] for row in self._changes()), default=0)

    @property
    def shift(self) -> int:
        """The main shift, in tokens: the one that single keys were measured at."""
        return next((r.context["shift"] for r in self.rows if r.metric == "precision_key_change"), 0)

    @property
    def verdict(self) -> Result | None:
        """The closing row."""
        return next((row for row in self.rows if row.metric == "precision_verdict"), None)

    def by_shift(self) -> list[Arm]:
        """The change of attention against the shift, at the longest length."""
        return self._arms("precision_attention_change", "shift", rows="shift", layer="all", first="kept",
                          length=self.length)  # fmt: skip

    def by_key(self) -> list[Arm]:
        """The change of attention to one key against its position + 1, the checkpoint's, at the longest length."""
        arms = self._arms("precision_key_change", "key_start", rows="shift", layer="all", length=self.length)
        return [Arm(arm.name, arm.arithmetic, arm.weights, [x + 1 for x in arm.x], arm.rows) for arm in arms
                if arm.weights == "trained"]  # fmt: skip

    def by_length(self, metric: str = "precision_first_score_change") -> list[Arm]:
        """A change against the length, at the main shift."""
        first = "kept" if metric == "precision_attention_change" else None  # dropped is another text
        return self._arms(metric, "length", rows="shift", layer="all", shift=self.shift, first=first)

    def by_layer(self) -> list[Arm]:
        """The change of attention in each layer, at the main shift and the longest length."""
        where = {"rows": "shift", "first": "kept", "shift": self.shift, "length": self.length}
        return self._arms("precision_attention_change", "layer", **where)

    def by_offset(self) -> list[Arm]:
        """`intra_doc` against `intra_doc_reset`: the change against where the document begins in its row."""
        return self._arms("precision_offset_change", "start", rows="intra_doc")

    def value(self, metric: str, **where: Any) -> Result | None:
        """One row, or None."""
        return next((row for row in self.rows if row.metric == metric and _has(row, where)), None)

    def _changes(self) -> list[Result]:
        return [row for row in self.rows if row.metric == "precision_attention_change"]

    def _arms(self, metric: str, x: str, **where: Any) -> list[Arm]:
        arms = []
        for weights, suffix in WEIGHTS.items():
            for arithmetic, name in ARITHMETICS.items():
                at = where | {"weights": weights, "arithmetic": arithmetic}
                rows = [r for r in self.rows if r.metric == metric and _has(r, at) and _is_number(r.context[x])]
                rows.sort(key=lambda row: row.context[x])
                if rows:
                    arms.append(Arm(name + suffix, arithmetic, weights, [row.context[x] for row in rows], rows))
        return arms


def _has(row: Result, where: dict[str, Any]) -> bool:
    return all(row.context.get(key) == value for key, value in where.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
