"""Figures of lines: the loss of a run, retrieval against length, a plan's scaling, and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.errors import UserError
from anchorctx.records.results import Result, Rows
from anchorctx.report.collect import Column, column
from anchorctx.report.figures.chart import Axis, Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart

TOKENS = Axis("trained tokens")
SMOOTH_FROM = 20
"""Points from which a running mean is drawn over the loss of single steps."""
RETRIEVAL = "Retrieval of planted facts"


def result_line(name: str, rows: Iterable[Result], key: str, color: int) -> Line:
    """Rows as a line with their intervals, against the number `key` of their context."""
    found = sorted(rows, key=lambda row: row.context[key])
    x, y = [row.context[key] for row in found], [row.value for row in found]
    return Line(name, x, y, [row.low for row in found], [row.high for row in found], color)


def ticks(lines: Iterable[Line]) -> list[float]:
    """Every x of some lines, for an axis that is marked where something was measured."""
    return sorted({x for line in lines for x in line.x})


# -- training ---------------------------------------------------------------------------------------------------------


def loss_figure(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw `train/loss` and `val/loss` (nats a token) from rows of metrics.jsonl; returns `path`.

    A validation set with another loss weighting has another scale than training; both are what the run logged.
    UserError when no row has either.
    """
    training, held_out = column(rows, "train/loss"), column(rows, "val/loss")
    if not (training[0] or held_out[0]):
        raise UserError(f"no train/loss or val/loss to draw {path} from: give the rows of a run's metrics.jsonl")
    return save_charts([("Training and validation loss", loss_chart([("", training, held_out)]))], path)


def loss_chart(runs: Sequence[tuple[str, Column, Column]]) -> Chart:
    """Lines of each run: (name, training, held out); long ones as a running mean over the single steps."""
    lines: list[Line] = []
    for number, (run, (x, y), held_out) in enumerate(runs):
        # Two colours a run from blue on: training, and held out.
        prefix, color = f"{run}, " if len(runs) > 1 else "", 2 * number + 1
        smooth = len(x) >= SMOOTH_FROM
        lines.append(Line(f"{prefix}training", x, y, color=color, faint=smooth))
        if smooth:
            lines.append(Line(f"{prefix}training (running mean)", *_smoothed(x, y), color=color))
        lines.append(Line(f"{prefix}held out", *held_out, color=color + 1, dashed=len(runs) > 1))
    return line_chart(lines, TOKENS, Axis("loss (nats a token)"), "Loss against trained tokens")


def _smoothed(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running mean over a twentieth of the run, five points at least."""
    kernel = np.ones(width := max(len(y) // 20, 5)) / width
    # Only where the window is full, and over x too, so that a mean stands in the middle of what it is the mean of.
    return np.convolve(x, kernel, "valid").tolist(), np.convolve(y, kernel, "valid").tolist()


# -- retrieval --------------------------------------------------------------------------------------------------------


def retrieval_figure(results: Iterable[Result], path: Path, pretraining_length: int | None = None) -> Path:
    """Draw `retrieval_accuracy` rows against their `length`, one line a `model`, with 95 % intervals.

    `pretraining_length` (tokens) is marked where given. Returns `path`; UserError when no row is of that metric.
    """
    rows = Rows(results).of("retrieval_accuracy").latest()
    if not rows:
        raise UserError(f"no retrieval_accuracy rows to draw {path} from: run anchorctx eval with evals=[retrieval]")
    models = dict.fromkeys(row.model for row in rows)
    lines = [
        result_line(model or "model", [row for row in rows if row.model == model], "length", number)
        for number, model in enumerate(models)
    ]
    return save_charts([(RETRIEVAL, retrieval_chart(lines, pretraining_length))], path)


def retrieval_chart(lines: Sequence[Line], pretraining_length: int | None) -> Chart:
    """A line for each model; a mark at `pretraining_length` (tokens) where given."""
    x = Axis("context length (tokens)", log=2, ticks=ticks(lines))
    y = Axis("share of answers right", low=0.0, high=1.03, percent=True)
    mark = (pretraining_length, "pretraining length") if pretraining_length else None
    return line_chart(lines, x, y, "Retrieval accuracy against context length", mark)


# -- plans and memory -------------------------------------------------------------------------------------------------


def scaling_figure(points: Sequence[Mapping[str, float]], title: str, path: Path) -> Path:
    """Draw a simulated plan's points against GPUs: bytes that a GPU sends in a step, and efficiency; returns `path`."""
    # SP is how many GPUs share a row; each such number is a line over the whole range of GPUs.
    sent, computing = [], []
    for number, sequence in enumerate(sorted({point["sequence"] for point in points})):
        mine = [point for point in points if point["sequence"] == sequence]
        name, gpus = f"SP {sequence:g}", [point["gpus"] for point in mine]
        gigabytes = [(point["sequence_bytes"] + point["zero_bytes"]) / 1e9 for point in mine]
        sent.append(Line(name, gpus, gigabytes, color=number))
        computing.append(Line(name, gpus, [point["efficiency"] for point in mine], color=number))
    x = Axis("GPUs (DP x SP)", log=2, ticks=ticks(sent))
    charts = [
        ("Communication", line_chart(sent, x, Axis("GB sent by a GPU in a step", low=0.0), "")),
        ("Expected efficiency (weak scaling)",
         line_chart(computing, x, Axis("time spent computing", low=0.0, high=1.05, percent=True), "")),
    ]  # fmt: skip
    return save_charts(charts, path, title)


def memory_figure(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draw measured peaks and (dashed) predicted ones against the row length, a colour an arm.

    Rows have `arm`, `tokens`, `measured` and `predicted` bytes. Returns `path`.
    """
    lines = []
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["tokens"])
        # In the same colour, so that a look at one arm compares the two.
        for name, key in ((arm, "measured"), (f"{arm}, planned", "predicted")):
            values = [row[key] / 2**30 for row in mine]
            lines.append(Line(name, [r["tokens"] for r in mine], values, color=number, dashed=key == "predicted"))
    x = Axis("row length (tokens)", log=2, ticks=ticks(lines))
    chart = line_chart(lines, x, Axis("peak memory of a process (GiB)", log=2), title)
    return save_charts([(title, chart)], path)
