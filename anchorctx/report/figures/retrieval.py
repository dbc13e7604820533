"""Retrieval accuracy of planted facts against the length of the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from anchorctx.errors import UserError
from anchorctx.records.results import Result
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.chart import Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart

TITLE = "Retrieval of planted facts"


def retrieval_figure(results: Iterable[Result], path: Path, pretraining_length: int | None = None) -> Path:
    """Draw `retrieval_accuracy` rows against their `length`, one line a `model`, with 95 % intervals.

    `pretraining_length` (tokens) is marked where given. Returns `path`; UserError when no row is of that metric.
    """
    models: dict[str, dict[int, Result]] = {}
    for row in results:
        if row.metric == "retrieval_accuracy":  # the latest row of a length counts
            models.setdefault(str(row.context.get("model", "model")), {})[row.context["length"]] = row
    if not models:
        raise UserError(f"no retrieval_accuracy rows to draw {path} from: run anchorctx eval with evals=[retrieval]")
    lines = []
    for number, (model, found) in enumerate(models.items()):
        rows = [found[length] for length in sorted(found)]
        ends = [row.low for row in rows], [row.high for row in rows]
        lines.append(Line(model, sorted(found), [row.value for row in rows], *ends, color=number))
    return save_charts([(TITLE, retrieval_chart(lines, pretraining_length))], path)


def retrieval_chart(lines: Sequence[Line], pretraining_length: int | None) -> Chart:
    """A line for each model."""
    lengths = sorted({length for line in lines for length in line.x})
    x = Axis("context length (tokens)", log=2, ticks=lengths)
    y = Axis("share of answers right", low=0.0, high=1.03, percent=True)
    mark = (pretraining_length, "pretraining length") if pretraining_length else None
    return line_chart(lines, x, y, "Retrieval accuracy against context length", mark)
