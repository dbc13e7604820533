"""The evaluation of KV reuse in pictures: every arm beside dense, and where its cache is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.records.results import Result
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.chart import Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.style import BLUE, GREEN, ORANGE, SERIES, SKY, new_figure, save, styled
from anchorctx.report.numbers import number
from anchorctx.report.reuse_table import distinct, find, rows_by_model

KL_FLOOR = 1e-8
"""Where bars of a logarithmic KL axis begin, in nats: float32's rounding."""
ERROR_ARMS = ("naive", "rotate", "rotate_glue", "kvcomm_ungated", "mean_offset", "anchored")
"""Arms whose errors are drawn by layer: those with an error of their own, and few enough for a colour each."""
CAUSES = {"content": "other text before", "shift": "other place"}


def draw_reuse(rows: Sequence[Result], folder: Path) -> list[Path]:
    """All pictures that the rows allow; with several models each one's name is in the files' names."""
    models, drawn = rows_by_model(rows), []
    for model, mine in models.items():
        stem = "kvcomm_" + (re.sub(r"[^\w.-]+", "_", model) + "_" if len(models) > 1 else "")
        tasks = distinct(mine, "task")
        drawn += [reuse_figure(mine, task, folder / f"{stem}{task}.png") for task in tasks]
        for task, charts in [(task, found) for task in tasks if (found := error_charts(mine, task))][:1]:
            named = [(chart.description, chart) for chart in [*charts.values(), variation_chart(mine)] if chart]
            drawn.append(save_charts(named, folder / f"{stem}{task}_cache.png"))
    return drawn


def error_charts(rows: Sequence[Result], task: str) -> dict[str, Chart]:
    """The error of each arm's keys and of its values by layer, for one model and task; empty where all are 0."""
    found = {}
    for part in ("key", "value"):
        lines = []
        for color, arm in enumerate(arm for arm in ERROR_ARMS if find(rows, "kvcomm_kv_error", task=task, arm=arm)):
            where = {"task": task, "arm": arm, "part": part, "measure": "relative"}
            lines += _by_layer(rows, "kvcomm_kv_error", where, arm, color)
        if lines:
            found[part] = _chart(lines, "relative error", f"{task}: error of {part}s by layer")
    return found


def variation_chart(rows: Sequence[Result]) -> Chart | None:
    """What another text before a document, and another place, change of its keys and values; None if not measured."""
    lines = []
    for color, (cause, part) in enumerate((cause, part) for cause in CAUSES for part in ("key", "value")):
        where = {"cause": cause, "part": part}
        lines += _by_layer(rows, "kvcomm_variation", where, f"{part}s: {CAUSES[cause]}", color)
    return _chart(lines, "relative change", "One document in another context") if lines else None


def _by_layer(rows: Sequence[Result], metric: str, where: dict[str, Any], name: str, color: int) -> list[Line]:
    """A line, of the latest row of each layer; none where every value is 0."""
    found = {r.context["layer"]: r.value for r in rows if r.metric == metric and where.items() <= r.context.items()}
    layers = sorted(found)
    return [Line(name, layers, [found[at] for at in layers], color=color)] if any(found.values()) else []


def _chart(lines: Sequence[Line], y: str, title: str) -> Chart:
    ticks = sorted({layer for line in lines for layer in line.x})
    return line_chart(lines, Axis("layer", ticks=ticks), Axis(y, low=0.0), title)


@styled
def reuse_figure(rows: Sequence[Result], task: str, path: Path) -> Path:
    """Divergence, accuracy by kind, consistency of the decision, reuse, time and kept bytes of every arm."""
    own = [r for r in rows if r.context.get("task") == task]
    arms = distinct(own, "arm")
    scored = find(own, "kvcomm_accuracy") is not None
    figure, axes = new_figure(14 if scored else 10, 2 * (0.9 + 0.27 * len(arms)), columns=3 if scored else 2, rows=2)
    panels = list(axes.flat)
    _draw_divergence(panels[0], own, arms)
    if scored:
        _draw_accuracy(panels[1], own, arms)
        judged = {f"{name} order": {"shuffled": name == "another"} for name in ("the same", "another")}
        _grouped(panels[2], [_series(own, "kvcomm_judge_consistency", arms, label, c) for label, c in judged.items()])
        panels[2].set(xlabel="decisions like dense's", xlim=(0, 1.02), title="Decision agent through the arm")
    reuse, time, memory = panels[-3:]
    _grouped(reuse, [_series(own, "kvcomm_reuse", arms, by, {"by": by}) for by in ("calls", "tokens", "flops")])
    reuse.set(xlabel="share saved (negative: extra work)", title="Reuse")
    _draw_times(time, own, arms)
    _bars(memory, [_value(own, "kvcomm_kept_bytes", arm) / 2**20 for arm in arms], GREEN)
    memory.set(xlabel="MiB kept between requests", title="Memory")
    for place, panel in enumerate(panels):
        panel.set_yticks(range(len(arms)), [] if place % (len(panels) // 2) else arms)
    figure.suptitle(_title(own, task), x=0.01, ha="left", fontsize=10)
    figure.set_layout_engine("constrained")
    return save(figure, path)


def _bars(axes: Any, values: Sequence[float], color: str, least: float = 0.0) -> None:
    axes.barh(range(len(values)), values, color=color, height=0.65)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    for place, value in enumerate(values):
        axes.annotate(f" {number(value)}", (max(value, least), place), va="center", fontsize=8)
    axes.margins(x=0.18)


def _grouped(axes: Any, series: Sequence[tuple[str, list[float]]]) -> None:
    """Bars side by side for each arm, and a legend below."""
    height = 0.8 / len(series)
    for i, (label, values) in enumerate(series):
        places = np.arange(len(values)) - 0.4 + height * (i + 0.5)
        axes.barh(places, values, height, color=SERIES[i % len(SERIES)], label=label)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if len(series) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}  # under the axis label
        axes.legend(fontsize=7, ncols=4, **below)


def _series(
    rows: Sequence[Result], metric: str, arms: Sequence[str], label: str, context: dict[str, Any]
) -> tuple[str, list[float]]:
    return label, [_value(rows, metric, arm, **context) for arm in arms]


def _draw_divergence(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    _bars(axes, [_value(rows, "kvcomm_kl", arm, tokens="all") for arm in arms], BLUE, KL_FLOOR)
    axes.set_xscale("log")
    axes.set_xlim(left=KL_FLOOR)
    axes.set(xlabel="KL(dense | arm), nats a token", title="Divergence from dense")


def _draw_accuracy(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    kinds = [kind for kind in distinct(rows, "kind") if kind != "all"] or ["all"]
    _grouped(axes, [_series(rows, "kvcomm_accuracy", arms, kind, {"kind": kind}) for kind in kinds])
    axes.set(xlabel="share of answers right", xlim=(0, 1.02), title="Accuracy")


def _draw_times(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    p50, p95 = (
        [1e3 * _value(rows, "kvcomm_ttft", arm, agent="request", quantile=q) for arm in arms] for q in ("p50", "p95")
    )
    _bars(axes, p50, SKY)
    axes.plot(p95, range(len(arms)), "|", color=ORANGE, markersize=9, markeredgewidth=2)
    axes.set(xlabel="TTFT of a request, ms (bar p50, line p95)", title="Time, all hidden work in")


def _value(rows: Sequence[Result], metric: str, arm: str, **context: Any) -> float:
    row = find(rows, metric, arm=arm, **({"kind": "all"} | context))
    return float("nan") if row is None else row.value


def _title(rows: Sequence[Result], task: str) -> str:
    problems = find(rows, "kvcomm_kl", arm="dense", kind="all", tokens="all")
    return f"{rows[0].context['model']}: {task}, {problems.n if problems else 0} problems"
