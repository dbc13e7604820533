"""Held-out perplexity: over all, by position in the document, and against the length of the context."""

from __future__ import annotations

from anchorctx.report.blocks import Cell, Figure, Section, Table, measured
from anchorctx.report.collect import Material
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.charts import line_chart
from anchorctx.report.sections.lines import model_lines
from anchorctx.report.series import by_model

AXIS = Axis("perplexity")


def build(material: Material) -> Section | None:
    """None without a row of any of the three metrics."""
    whole = by_model(material.rows, "perplexity")
    position = by_model(material.rows, "perplexity_by_position")
    context = by_model(material.rows, "perplexity_by_context")
    blocks: list[Figure | Table] = []
    if position:
        axis = Axis("position in the document (tokens, up to)", log=2, ticks=_ticks(position, "stop"))
        chart = line_chart(model_lines(material, position, "stop"), axis, AXIS, "Perplexity by position")
        caption = "Perplexity of the tokens between one mark and the next: a model that uses its context keeps falling."
        blocks.append(Figure("By position", chart, caption))
    if context:
        axis = Axis("context (tokens)", log=2, ticks=_ticks(context, "context_length"))
        chart = line_chart(model_lines(material, context, "context_length"), axis, AXIS, "Perplexity by context")
        blocks.append(Figure("Against context", chart, "The same tokens, predicted from so much text before them."))
    if whole:
        rows = [
            [Cell(model, model), measured(r.result), _count(r.result.n), _count(r.result.context.get("tokens"))]
            for model, mine in whole.items()
            for r in mine
        ]
        head = ("model", "perplexity (95 % over documents)", "documents", "tokens scored")
        blocks.append(Table("Held-out perplexity", head, rows))
    if not blocks:
        return None
    said = ", ".join(f"{model} {rows[-1].result.value:.4g}" for model, rows in whole.items())
    return Section("perplexity", "Perplexity", f"Held out: {said}." if said else "", blocks)


def _ticks(series: dict, key: str) -> list[float]:
    return sorted({row.result.context[key] for rows in series.values() for row in rows})


def _count(count: int | None) -> Cell:
    return Cell("–", None) if count is None else Cell(f"{count:,}", count)
