"""Retrieval accuracy of planted facts against context length."""

from __future__ import annotations

from anchorctx.report.blocks import Cell, Figure, Section, Table, measured
from anchorctx.report.charts import line_chart
from anchorctx.report.collect import Material
from anchorctx.report.sections.lines import model_lines
from anchorctx.report.series import by_model
from anchorctx.report.svg import Axis, number


def build(material: Material) -> Section | None:
    """None without `retrieval_accuracy` rows."""
    series = by_model(material.rows, "retrieval_accuracy")
    if not series:
        return None
    lengths = sorted({row.result.context["length"] for rows in series.values() for row in rows})
    chart = line_chart(
        model_lines(material, series, "length"),
        Axis("context length (tokens)", log=2, ticks=lengths),
        Axis("share of answers right", low=0.0, high=1.03, percent=True),
        "Retrieval accuracy against context length",
        (material.pretraining_length, "pretraining length") if material.pretraining_length else None,
    )
    caption = "Facts planted in held-out text and asked for again; right is the value itself as the most likely token."
    table = Table("By length", ["model", *(f"{length:,}" for length in lengths)], [
        [Cell(model, model), *_cells({row.result.context["length"]: measured(row.result) for row in rows}, lengths)]
        for model, rows in series.items()
    ], "Share of answers right, with its 95 % interval.")  # fmt: skip
    longest = lengths[-1]
    ends = [f"{model} {row.result.value:.2f}" for model, rows in series.items() for row in rows
            if row.result.context["length"] == longest]  # fmt: skip
    lead = f"At {number(longest)} tokens: {', '.join(ends)}."
    return Section("retrieval", "Retrieval", lead, [Figure("Retrieval of planted facts", chart, caption), table])


def _cells(found: dict[int, Cell], lengths: list[int]) -> list[Cell]:
    return [found.get(length, Cell("–", None)) for length in lengths]
