"""Needle maps: is a fact found, by how long the context is and how deep in it the fact lies?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from anchorctx.report.blocks import Figure, Section
from anchorctx.report.collect import Material, Row
from anchorctx.report.figures.charts import heat_map
from anchorctx.report.numbers import number, percent
from anchorctx.report.series import by_model

METRICS = {"needle_accuracy": "share of answers right", "needle_logprob": "log-likelihood of the answer (nats)"}


def build(material: Material) -> Section | None:
    """None without needle rows. Maps of one metric share one scale of colours."""
    blocks, said = [], []
    for metric, meaning in METRICS.items():
        series = by_model(material.rows, metric)
        values = [row.result.value for rows in series.values() for row in rows]
        if not values:
            continue
        ends = (0.0, 1.0) if metric == "needle_accuracy" else (min(values), 0.0)
        for model, rows in series.items():
            blocks.append(_map(f"{model}: {meaning}", rows, ends))
            if metric == "needle_accuracy":
                said.append(f"{model} {statistics.fmean(row.result.value for row in rows):.2f}")
    if not blocks:
        return None
    lead = f"Mean over the map: {', '.join(said)}." if said else "One cell for each length and depth."
    return Section("needle", "Needle in a haystack", lead, blocks)


def _map(title: str, rows: Sequence[Row], ends: tuple[float, float]) -> Figure:
    lengths = sorted({row.result.context["length"] for row in rows})
    depths = sorted({row.result.context["depth"] for row in rows})
    cells = {
        (percent(row.result.context["depth"], 0), number(row.result.context["length"])): row.result.value
        for row in rows
    }
    chart = heat_map(
        cells, [percent(depth, 0) for depth in depths], [number(length) for length in lengths], title,
        row_label="depth of the needle", column_label="context (tokens)", low=ends[0], high=ends[1],
    )  # fmt: skip
    return Figure(title, chart, "Depth 0 % is right behind the first token, 100 % right before the question.")
