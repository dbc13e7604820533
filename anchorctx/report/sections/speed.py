"""Throughput, memory and what masking saves."""

from __future__ import annotations

import statistics

from anchorctx.report.blocks import Cell, Figure, Section, Table
from anchorctx.report.collect import Material, TrainRun
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.training import TOKENS
from anchorctx.report.numbers import percent

CHARTS = (
    ("perf/tokens_per_second", "Throughput", Axis("tokens a second", low=0.0), "Tokens of rows a second, all devices."),
    ("memory/peak_gib", "Peak memory", Axis("GiB", low=0.0), "Most memory ever held by one process, so far."),
    (
        "perf/attention_flops_saved",
        "Attention not computed",
        Axis("share of full attention", low=0.0, high=1.0, percent=True),
        "Share of full causal attention's operations that the step's rows do not need, from their layouts.",
    ),
    ("perf/mfu", "Utilisation (MFU)", Axis("of the device's peak", low=0.0, percent=True),
     "Operations that the layouts really need over the device's dense bfloat16 peak."),
)  # fmt: skip


def build(material: Material) -> Section | None:
    """None when no run reports its speed."""
    blocks = []
    for key, title, axis, caption in CHARTS:
        lines = [Line(run.label, *_measured(run, key), color=2 * i + 1) for i, run in enumerate(material.runs)]
        if any(line.x for line in lines):
            chart = line_chart(lines, TOKENS, axis, f"{title} against trained tokens")
            blocks.append(Figure(title, chart, caption))
    if not blocks:
        return None
    rows = [_row(run) for run in material.runs]
    head = ("run", "tokens a second (median)", "seconds a step (median)", "attention saved (mean)", "peak GiB")
    blocks.append(Table("By run", head, rows))
    return Section("speed", "Speed and memory", _lead(material), blocks)


def _measured(run: TrainRun, key: str) -> tuple[list[float], list[float]]:
    """The column without what the validation before the first step leaves at 0."""
    points = [(x, y) for x, y in zip(*run.column(key), strict=True) if y > 0 or x > 0]
    return [x for x, _ in points], [y for _, y in points]


def _values(run: TrainRun, key: str) -> list[float]:
    return run.column(key)[1]


def _row(run: TrainRun) -> list[Cell]:
    speed, seconds = _values(run, "perf/tokens_per_second"), _values(run, "perf/step_seconds")
    saved, memory = _values(run, "perf/attention_flops_saved"), _values(run, "memory/peak_gib")
    return [
        Cell(run.label, run.label),
        _cell(statistics.median(speed) if speed else None, "{:,.0f}"),
        _cell(statistics.median(seconds) if seconds else None, "{:.2f}"),
        Cell(percent(mean), mean) if saved and (mean := statistics.fmean(saved)) else Cell("–"),
        _cell(max(memory) if memory else None, "{:.2f}"),
    ]


def _cell(value: float | None, form: str) -> Cell:
    return Cell("–", None) if value is None else Cell(form.format(value), value)


def _lead(material: Material) -> str:
    saved = [v for run in material.runs for v in _values(run, "perf/attention_flops_saved")]
    if not saved:
        return "What a training step costs."
    return f"The rows needed {percent(1 - statistics.fmean(saved))} of full causal attention's operations, on average."
