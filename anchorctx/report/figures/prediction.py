"""What an arm expected its divergence to be, against what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anchorctx.records.results import Result
from anchorctx.report.figures.chart import LEFT, Axis, Chart, label, save_charts
from anchorctx.report.figures.inline import tag
from anchorctx.report.figures.reuse import TaskRows, by_stem, tasks_of
from anchorctx.report.figures.style import CARD, MUTED, RULE, SERIES

SEEN, SHARED = 0, 1
"""Numbers of colours."""
LEAST = 1e-6
"""Nats at which an axis begins at the lowest: what is less is drawn there."""


def draw_predictions(rows: Sequence[Result], folder: Path) -> list[Path]:
    """The picture kvcomm_<task>_prediction.png of each task with an arm that predicts; returns the files."""
    drawn = []
    for model, stem, mine in by_stem(rows):
        for task in tasks_of(mine):
            charts = [(arm, chart) for arm, chart in prediction_charts(task)]
            if charts:
                drawn.append(
                    save_charts(charts, folder / f"{stem}{task.task}_prediction.png", f"{model}: {task.task}", 2)
                )
    return drawn


def prediction_charts(task: TaskRows) -> Iterator[tuple[str, Chart]]:
    """Each arm that predicts, with its chart; none before its warm-up was over."""
    for arm in task.rows.of("kvcomm_prediction").distinct("arm"):
        missed = task.rows.find("kvcomm_prediction", arm=arm, measure="missed")
        rank = task.rows.find("kvcomm_prediction", arm=arm, measure="rank")
        shared = [(expected, true) for expected, _, true in missed.context["values"]] if missed is not None else []
        seen = [(expected, true) for expected, true in rank.context["values"]] if rank is not None else []
        if missed is not None and (seen or shared):
            yield arm, _chart(seen, shared, missed.context["bound"], f"{task.task}: {arm}, predicted and true")


def _chart(
    seen: Sequence[tuple[float, float]], shared: Sequence[tuple[float, float]], bound: float, description: str
) -> Chart:
    every = [(max(x, LEAST), max(y, LEAST)) for x, y in (*seen, *shared)]
    numbers = [value for pair in every for value in pair] + ([bound] if bound else [])

    def draw(axes: Any) -> None:
        # The same scale in both directions, so that right predictions lie on the diagonal.
        x, y = Axis("predicted, nats a token", log=10), Axis("true KL(dense | arm), nats a token", log=10)
        x.apply(axes, "x", numbers)
        y.apply(axes, "y", numbers)
        axes.grid(axis="y", color=RULE, linewidth=1)
        label(axes, x.label, y.label, LEFT)
        ends = x.ends(numbers)
        axes.plot(ends, ends, color=RULE, linewidth=1, gid=tag("line"))
        if bound:
            axes.axhline(bound, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for number, pairs in ((SEEN, every[: len(seen)]), (SHARED, every[len(seen) :])):
            if pairs:
                axes.plot(
                    *zip(*pairs, strict=True), color=SERIES[number], linestyle="none", marker="o", markersize=5,
                    markerfacecolor=CARD, markeredgewidth=1.5, clip_on=False, gid=tag("line"),
                )  # fmt: skip

    legend = [("dense, with each rung", SEEN, "line"), ("shared", SHARED, "line")]
    return Chart(description, draw, legend)
