"""Loss, learning rate and gradient norm over the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anchorctx.report.blocks import Figure, Section
from anchorctx.report.charts import Line, line_chart
from anchorctx.report.collect import Material, TrainRun
from anchorctx.report.svg import Axis, number

SMOOTH_FROM = 20
"""Points from which a running mean is drawn over the loss of single steps."""
TOKENS = Axis("trained tokens")


def build(material: Material) -> Section | None:
    """None without a training run."""
    if not any(run.column("train/loss")[0] or run.column("val/loss")[0] for run in material.runs):
        return None
    blocks = [_loss(material.runs)]
    for key, title, label in (
        ("train/lr", "Learning rate", "learning rate"),
        ("train/grad_norm", "Gradient norm", "gradient norm, before clipping"),
    ):
        lines = [Line(run.label, *run.column(key), color=2 * i + 1) for i, run in enumerate(material.runs)]
        if any(line.x for line in lines):
            what = f"{title} against trained tokens"
            blocks.append(Figure(title, line_chart(lines, TOKENS, Axis(label), what), f"{what}."))
    return Section("training", "Training", " ".join(map(_lead, material.runs)), blocks)


def _loss(runs: Sequence[TrainRun]) -> Figure:
    lines: list[Line] = []
    several = len(runs) > 1
    for i, run in enumerate(runs):
        x, y = run.column("train/loss")
        name = f"{run.label}, training" if several else "training"
        if len(x) >= SMOOTH_FROM:
            lines += [Line(name, x, y, color=2 * i + 1, faint=True)]
            lines += [Line(f"{name} (running mean)", *smoothed(x, y), color=2 * i + 1)]
        else:
            lines += [Line(name, x, y, color=2 * i + 1)]
        held_out = f"{run.label}, held out" if several else "held out"
        lines += [Line(held_out, *run.column("val/loss"), color=2 * i + 2, dashed=several)]
    caption = "Loss a trained token in nats, weighted as in training. Held-out sets may be weighted otherwise."
    return Figure(
        "Loss", line_chart(lines, TOKENS, Axis("loss (nats a token)"), "Loss against trained tokens"), caption
    )


def smoothed(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running mean over a twentieth of the run, five points at least."""
    kernel = np.ones(width := max(len(y) // 20, 5)) / width
    return np.convolve(x, kernel, "valid").tolist(), np.convolve(y, kernel, "valid").tolist()


def _lead(run: TrainRun) -> str:
    tokens, held_out = run.column("val/loss")
    steps = max((int(row.get("step", 0)) for row in run.rows), default=0)
    trained = max((float(row.get("tokens", 0)) for row in run.rows), default=0.0)
    words = f"{run.label}: {steps:,} steps, {number(trained)} trained tokens"
    if pattern := run.place.manifest.get("config", {}).get("pattern"):
        words += f", pattern {pattern}"
    if len(tokens) > 1:
        words += f"; held-out loss {held_out[0]:.3f} to {held_out[-1]:.3f}"
    return words + "."
