"""Training runs: loss, learning rate and gradient norm, then throughput, memory and what masking saves."""

from __future__ import annotations

import statistics

from anchorctx.report.blocks import MISSING, Block, Cell, Figure, Section, Table, formatted, text_cell
from anchorctx.report.collect import Column, Material, TrainRun
from anchorctx.report.figures.chart import Axis
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.curves import TOKENS, loss_chart
from anchorctx.report.numbers import number, percent

CURVES = (
    ("train/lr", "Learning rate", Axis("learning rate"), "Learning rate against trained tokens."),
    ("train/grad_norm", "Gradient norm", Axis("gradient norm, before clipping"),
     "Gradient norm against trained tokens."),
)  # fmt: skip
SPEED = (
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
"""Name in metrics.jsonl, title, axis and caption of each figure."""


def build(material: Material) -> Section | None:
    """Loss, learning rate and gradient norm over the trained tokens; None without a training run."""
    runs = [(run.label, run.column("train/loss"), run.column("val/loss")) for run in material.runs]
    if not any(training[0] or held_out[0] for _, training, held_out in runs):
        return None
    caption = "Loss a trained token in nats, weighted as in training. Held-out sets may be weighted otherwise."
    blocks = [Figure("Loss", loss_chart(runs), caption), *_figures(material, CURVES)]
    return Section("training", "Training", " ".join(map(_lead, material.runs)), blocks)


def build_speed(material: Material) -> Section | None:
    """Throughput, memory and what masking saves; None when no run reports its speed."""
    blocks: list[Block] = [*_figures(material, SPEED)]
    if not blocks:
        return None
    head = ("run", "tokens a second (median)", "seconds a step (median)", "attention saved (mean)", "peak GiB")
    blocks.append(Table("By run", head, [_row(run) for run in material.runs]))
    saved = [v for run in material.runs for v in run.column("perf/attention_flops_saved")[1]]
    lead = "What a training step costs."
    if saved:
        needed = percent(1 - statistics.fmean(saved))
        lead = f"The rows needed {needed} of full causal attention's operations, on average."
    return Section("speed", "Speed and memory", lead, blocks)


def _figures(material: Material, figures: tuple[tuple[str, str, Axis, str], ...]) -> list[Figure]:
    """A line for each run; without the figures that no run has numbers for."""
    found = []
    for key, title, axis, caption in figures:
        # Odd colours, as in the figure of the loss, where even ones are held-out sets.
        lines = [Line(run.label, *_steps(run.column(key)), color=2 * i + 1) for i, run in enumerate(material.runs)]
        if any(line.x for line in lines):
            found.append(Figure(title, line_chart(lines, TOKENS, axis, f"{title} against trained tokens"), caption))
    return found


def _steps(column: Column) -> Column:
    """Without what the validation before the first step leaves at 0."""
    points = [(x, y) for x, y in zip(*column, strict=True) if y > 0 or x > 0]
    return [x for x, _ in points], [y for _, y in points]


def _lead(run: TrainRun) -> str:
    tokens, held_out = run.column("val/loss")
    steps = max((int(row.get("step", 0)) for row in run.rows), default=0)
    trained = max((float(row.get("tokens", 0)) for row in run.rows), default=0.0)
    words = f"{run.label}: {steps:,} steps, {number(trained)} trained tokens"
    if run.place.pattern:
        words += f", pattern {run.place.pattern}"
    # Before training and at its end; a single value would say nothing about what training did.
    if len(tokens) > 1:
        words += f"; held-out loss {held_out[0]:.3f} to {held_out[-1]:.3f}"
    return words + "."


def _row(run: TrainRun) -> list[Cell]:
    speed, seconds = run.column("perf/tokens_per_second")[1], run.column("perf/step_seconds")[1]
    saved, memory = run.column("perf/attention_flops_saved")[1], run.column("memory/peak_gib")[1]
    return [
        text_cell(run.label),
        formatted(statistics.median(speed) if speed else None, "{:,.0f}"),
        formatted(statistics.median(seconds) if seconds else None, "{:.2f}"),
        # Full attention saves nothing: a dash rather than 0 %.
        Cell(percent(mean), mean) if saved and (mean := statistics.fmean(saved)) else MISSING,
        formatted(max(memory) if memory else None, "{:.2f}"),
    ]
