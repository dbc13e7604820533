"""The study's outcome as text."""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.evals.evaluators.precision.rows import ALL
from anchorctx.records.results import Result
from anchorctx.records.table import text_table

COLUMNS = ("shift", "bfloat16", "float32_rotation", "float32")
TITLES = ("shift (tokens)", "bfloat16", "float32 rotation", "float32")


def table(rows: Sequence[Result]) -> str:
    """The change of attention by shift at the longest length, for the checkpoint and the control, and the verdict."""
    lines: list[str] = []
    changes = [
        row
        for row in rows
        if row.metric == "precision_attention_change"
        and row.context["rows"] == "shift"
        and row.context["layer"] == ALL
        and row.context["first"] == "kept"
    ]
    longest = max((row.context["length"] for row in changes), default=0)
    for weights, title in (("trained", "the checkpoint"), ("control", "the same with weights drawn anew")):
        mine = [row for row in changes if row.context["weights"] == weights and row.context["length"] == longest]
        if mine:
            lines += ["", f"attention that moves, {title}, {longest:,} tokens", *_grid(mine)]
    for row in rows:
        if row.metric == "precision_verdict":
            lines += ["", row.context["sentence"], *filter(None, [row.context["recommendation"]])]
    return "\n".join(lines)


def _grid(rows: Sequence[Result]) -> list[str]:
    value = {(row.context["shift"], row.context["arithmetic"]): row.value for row in rows}
    lines: list[Sequence[object]] = [TITLES]
    for shift in sorted({shift for shift, _ in value}):
        cells = (value.get((shift, name)) for name in COLUMNS[1:])
        lines.append([shift, *("" if x is None else f"{100 * x:.4f} %" for x in cells)])
    return text_table(lines, ">", indent=2)
