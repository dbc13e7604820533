"""Loss, learning rate and gradient norm over the trained tokens."""

from __future__ import annotations

from anchorctx.report.blocks import Figure, Section
from anchorctx.report.collect import Material, TrainRun
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.training import TOKENS, loss_chart
from anchorctx.report.numbers import number


def build(material: Material) -> Section | None:
    """None without a training run."""
    if not any(run.column("train/loss")[0] or run.column("val/loss")[0] for run in material.runs):
        return None
    runs = [(run.label, run.column("train/loss"), run.column("val/loss")) for run in material.runs]
    caption = "Loss a trained token in nats, weighted as in training. Held-out sets may be weighted otherwise."
    blocks = [Figure("Loss", loss_chart(runs), caption)]
    for key, title, label in (
        ("train/lr", "Learning rate", "learning rate"),
        ("train/grad_norm", "Gradient norm", "gradient norm, before clipping"),
    ):
        lines = [Line(run.label, *run.column(key), color=2 * i + 1) for i, run in enumerate(material.runs)]
        if any(line.x for line in lines):
            what = f"{title} against trained tokens"
            blocks.append(Figure(title, line_chart(lines, TOKENS, Axis(label), what), f"{what}."))
    return Section("training", "Training", " ".join(map(_lead, material.runs)), blocks)


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
