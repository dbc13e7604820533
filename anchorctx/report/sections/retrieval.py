"""Retrieval accuracy of planted facts against context length."""

from __future__ import annotations

from anchorctx.report.blocks import Cell, Figure, Section, Table, measured
from anchorctx.report.collect import Material
from anchorctx.report.figures.retrieval import TITLE, retrieval_chart
from anchorctx.report.numbers import number
from anchorctx.report.sections.lines import model_lines
from anchorctx.report.series import by_model


def build(material: Material) -> Section | None:
    """None without `retrieval_accuracy` rows."""
    series = by_model(material.rows, "retrieval_accuracy")
    if not series:
        return None
    lengths = sorted({row.result.context["length"] for rows in series.values() for row in rows})
    chart = retrieval_chart(model_lines(material, series, "length"), material.pretraining_length)
    caption = "Facts planted in held-out text and asked for again; right is the value itself as the most likely token."
    table = Table("By length", ["model", *(f"{length:,}" for length in lengths)], [
        [Cell(model, model), *_cells({row.result.context["length"]: measured(row.result) for row in rows}, lengths)]
        for model, rows in series.items()
    ], "Share of answers right, with its 95 % interval.")  # fmt: skip
    longest = lengths[-1]
    ends = [f"{model} {row.result.value:.2f}" for model, rows in series.items() for row in rows
            if row.result.context["length"] == longest]  # fmt: skip
    lead = f"At {number(longest)} tokens: {', '.join(ends)}."
    return Section("retrieval", "Retrieval", lead, [Figure(TITLE, chart, caption), table])


def _cells(found: dict[int, Cell], lengths: list[int]) -> list[Cell]:
    return [found.get(length, Cell("–", None)) for length in lengths]
