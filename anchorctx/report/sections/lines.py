"""A line for each model, from its rows."""

from __future__ import annotations

from anchorctx.report.collect import Material
from anchorctx.report.figures.charts import Line
from anchorctx.report.series import Series, sorted_by


def model_lines(material: Material, series: Series, key: str) -> list[Line]:
    """Values and intervals against the number `key` of their context, in the models' colours."""
    lines = []
    for model, rows in series.items():
        rows = sorted_by(rows, key)
        x, results = [row.result.context[key] for row in rows], [row.result for row in rows]
        ends = [r.low for r in results], [r.high for r in results]
        lines.append(Line(model, x, [r.value for r in results], *ends, color=material.color(model)))
    return lines
