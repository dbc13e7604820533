"""Training and held-out loss against the trained tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.errors import UserError
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.chart import Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart

TOKENS = Axis("trained tokens")
SMOOTH_FROM = 20
"""Points from which a running mean is drawn over the loss of single steps."""
Column = tuple[Sequence[float], Sequence[float]]
"""Trained tokens, and the value there."""


def loss_figure(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw `train/loss` and `val/loss` (nats a token) from rows of metrics.jsonl; returns `path`.

    A validation set with another loss weighting has another scale than training; both are what the run logged.
    """
    columns = []
    for key in ("train/loss", "val/loss"):
        points = [(row["tokens"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
        columns.append(([x for x, _ in points], [y for _, y in points]))
    if not any(x for x, _ in columns):
        raise UserError(f"no train/loss or val/loss to draw {path} from: give the rows of a run's metrics.jsonl")
    return save_charts([("Training and validation loss", loss_chart([("", *columns)]))], path)


def loss_chart(runs: Sequence[tuple[str, Column, Column]]) -> Chart:
    """Lines of each run: (name, training, held out); long ones as a running mean over the single steps."""
    lines: list[Line] = []
    for number, (run, (x, y), held_out) in enumerate(runs):
        prefix, color = f"{run}, " if len(runs) > 1 else "", 2 * number + 1
        smooth = len(x) >= SMOOTH_FROM
        lines.append(Line(f"{prefix}training", x, y, color=color, faint=smooth))
        if smooth:
            lines.append(Line(f"{prefix}training (running mean)", *smoothed(x, y), color=color))
        lines.append(Line(f"{prefix}held out", *held_out, color=color + 1, dashed=len(runs) > 1))
    return line_chart(lines, TOKENS, Axis("loss (nats a token)"), "Loss against trained tokens")


def smoothed(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running mean over a twentieth of the run, five points at least."""
    kernel = np.ones(width := max(len(y) // 20, 5)) / width
    return np.convolve(x, kernel, "valid").tolist(), np.convolve(y, kernel, "valid").tolist()
