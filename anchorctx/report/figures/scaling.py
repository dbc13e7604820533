"""Figures about size: a plan scaled to many GPUs, and peak memory against row length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.chart import save_charts
from anchorctx.report.figures.charts import Line, line_chart


def scaling_figure(points: Sequence[Mapping[str, float]], title: str, path: Path) -> Path:
    """Draw `plan.search.simulate`'s points: bytes that a GPU sends in a step, and efficiency; returns `path`."""
    sent, share = [], []
    for number, sequence in enumerate(sorted({point["sequence"] for point in points})):
        mine = [point for point in points if point["sequence"] == sequence]
        name, gpus = f"SP {sequence:g}", [point["gpus"] for point in mine]
        gigabytes = [(point["sequence_bytes"] + point["zero_bytes"]) / 1e9 for point in mine]
        sent.append(Line(name, gpus, gigabytes, color=number))
        share.append(Line(name, gpus, [point["efficiency"] for point in mine], color=number))
    x = Axis("GPUs (DP x SP)", log=2, ticks=sorted({point["gpus"] for point in points}))
    charts = [
        ("Communication", line_chart(sent, x, Axis("GB sent by a GPU in a step", low=0.0), "")),
        ("Expected efficiency (weak scaling)",
         line_chart(share, x, Axis("time spent computing", low=0.0, high=1.05, percent=True), "")),
    ]  # fmt: skip
    return save_charts(charts, path, title)


def memory_figure(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draw measured peaks and (dashed) predicted ones against the row length, a colour an arm.

    Rows have `arm`, `tokens`, `measured` and `predicted` bytes. Returns `path`.
    """
    lines = []
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["tokens"])
        for name, key in ((arm, "measured"), (f"{arm}, planned", "predicted")):
            values = [row[key] / 2**30 for row in mine]
            lines.append(Line(name, [r["tokens"] for r in mine], values, color=number, dashed=key == "predicted"))
    x = Axis("row length (tokens)", log=2, ticks=sorted({row["tokens"] for row in rows}))
    chart = line_chart(lines, x, Axis("peak memory of a process (GiB)", log=2), title)
    return save_charts([(title, chart)], path)
