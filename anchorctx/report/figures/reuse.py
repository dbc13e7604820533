"""The evaluation of KV reuse in charts, for the page and for PNG files: every arm beside dense, and where it errs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.records.results import Result, Rows
from anchorctx.report.figures.chart import Axis, Chart, save_charts
from anchorctx.report.figures.charts import Bars, Line, bar_chart, line_chart
from anchorctx.report.figures.curves import result_line, ticks
from anchorctx.report.figures.style import SERIES

MEASURES: dict[str, tuple[str, dict[str, Any]]] = {
    "KL": ("kvcomm_kl", {"tokens": "all"}),
    "agreement": ("kvcomm_agreement", {"tokens": "all"}),
    "accuracy": ("kvcomm_accuracy", {}),
    "difference": ("kvcomm_accuracy_difference", {}),
    "judge": ("kvcomm_judge_consistency", {"shuffled": False}),
    "judge, shuffled": ("kvcomm_judge_consistency", {"shuffled": True}),
    "calls": ("kvcomm_reuse", {"by": "calls"}),
    "tokens": ("kvcomm_reuse", {"by": "tokens"}),
    "flops": ("kvcomm_reuse", {"by": "flops"}),
    "p50": ("kvcomm_ttft", {"agent": "request", "quantile": "p50"}),
    "p95": ("kvcomm_ttft", {"agent": "request", "quantile": "p95"}),
    "kept": ("kvcomm_kept_bytes", {}),
    "cost: tokens": ("kvcomm_cost", {"by": "tokens"}),
    "cost: seconds": ("kvcomm_cost", {"by": "seconds"}),
}
"""What every arm has a number of: the metric, and what it is of where the metric has several."""
KL_FLOOR = 1e-8
"""Where bars of a logarithmic KL axis begin, in nats: float32's rounding."""
ERROR_ARMS = ("naive", "rotate", "rotate_glue", "kvcomm_ungated", "mean_offset", "anchored")
"""Arms whose errors are drawn by layer, each with its first setting: those with an error of their own, and few enough
for a colour each."""
CAUSES = {"content": "other text before", "shift": "other place"}
BLUE, GREEN, SKY, ORANGE = 1, 3, 5, 2
"""Numbers of colours."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """What one model did in one task of the evaluation."""

    task: str
    rows: Rows

    @property
    def arms(self) -> list[str]:
        """The ways to reuse caches, in the order that they were run."""
        return self.rows.distinct("arm")

    def find(self, measure: str, arm: str, kind: str = "all") -> Result | None:
        """An arm's row of one of MEASURES, over all kinds of problems or of one kind."""
        metric, where = MEASURES[measure]
        return self.rows.find(metric, arm=arm, kind=kind, **where)

    @property
    def recommendation(self) -> Result | None:
        """What the evaluation says is to be used."""
        return self.rows.find("kvcomm_recommendation")

    def values(self, measure: str, kind: str = "all", scale: float = 1.0) -> list[float | None]:
        """A measure of every arm, times `scale`; None where it was not measured."""
        rows = (self.find(measure, arm, kind) for arm in self.arms)
        return [None if row is None else row.value * scale for row in rows]


def tasks_of(rows: Rows) -> list[TaskRows]:
    """One model's rows by task, in order of appearance."""
    return [TaskRows(task, rows.of(task=task)) for task in rows.distinct("task")]


def by_stem(rows: Sequence[Result]) -> Iterator[tuple[str, str, Rows]]:
    """Each model, what its pictures' names begin with (its own only where there are several), and its rows."""
    every = Rows(rows).latest()
    models = every.distinct("model")
    for model in models:
        named = re.sub(r"[^\w.-]+", "_", model) + "_" if len(models) > 1 else ""
        yield model, f"kvcomm_{named}", every.of(model=model)


def draw_reuse(rows: Sequence[Result], folder: Path) -> list[Path]:
    """All pictures that the rows allow, kvcomm_<task>.png and kvcomm_<task>_cache.png; returns the files.

    With several models each one's name is in the files' names.
    """
    drawn = []
    for model, stem, mine in by_stem(rows):
        tasks = tasks_of(mine)
        for task in tasks:
            charts = [(title, chart) for title, chart, _ in reuse_charts(task)]
            problems = task.find("KL", "dense")
            heading = f"{model}: {task.task}, {problems.n if problems else 0} problems"
            columns = 3 if len(charts) > 4 else 2
            drawn.append(save_charts(charts, folder / f"{stem}{task.task}.png", heading, columns))
        # Errors of the cache are much the same in every task: one picture, of the first that has them.
        for task, charts in [(task, found) for task in tasks if (found := error_charts(task))][:1]:
            named = [(chart.description, chart) for chart in [*charts.values(), variation_chart(mine)] if chart]
            drawn.append(save_charts(named, folder / f"{stem}{task.task}_cache.png"))
    return drawn


def reuse_charts(task: TaskRows) -> Iterator[tuple[str, Chart, str]]:
    """Title, chart and caption of each figure with a bar for every arm; nothing of what was not measured."""
    # A task with one kind of problem has rows of `all` alone.
    kinds = [kind for kind in task.rows.distinct("kind") if kind != "all"] or ["all"]
    share = {"low": 0.0, "high": 1.02, "percent": True}
    figures = (
        ("Divergence from dense", [("", task.values("KL"), BLUE)],
         Axis("KL(dense | arm), nats a token", log=10, low=KL_FLOOR), "Mean over turns, by every token of an answer."),
        ("Accuracy", [(kind, task.values("accuracy", kind), i) for i, kind in enumerate(kinds, 1)],
         Axis("share of answers right", **share), "Answers that hold what was asked for, by kind of problem."),
        ("Decision agent through the arm",
         [("the same order", task.values("judge"), BLUE), ("another order", task.values("judge, shuffled"), ORANGE)],
         Axis("decisions like dense's", **share),
         "How often the deciding agent chooses as it does with dense's caches."),
        ("Reuse", [(by, task.values(by), i) for i, by in enumerate(("calls", "tokens", "flops"), 1)],
         Axis("share saved (negative: extra work)", percent=True),
         "Calls that reused a cache, prompt tokens and operations that were not computed."),
        ("Time, all hidden work in",
         [("p50", task.values("p50", scale=1e3), SKY), ("p95", task.values("p95", scale=1e3), ORANGE)],
         Axis("TTFT of a request (ms)"), "Time to the first token of all agents of a request."),
        ("Memory", [("", task.values("kept", scale=2**-20), GREEN)], Axis("MiB kept between requests"),
         "The most that an arm keeps."),
    )  # fmt: skip
    for title, series, axis, caption in figures:
        bars = [
            Bars(name, values, color % len(SERIES))
            for name, values, color in series
            if any(value is not None for value in values)
        ]
        if bars:
            yield title, bar_chart(task.arms, bars, axis, f"{task.task}: {title}"), caption


def error_charts(task: TaskRows) -> dict[str, Chart]:
    """The error of each arm's keys and of its values by layer, for one model and task; empty where all are 0."""
    found = {}
    # An arm has the same colour in both figures, also where only its values are wrong.
    first = {arm.partition(":")[0]: arm for arm in reversed(task.rows.of("kvcomm_kv_error").distinct("arm"))}
    measured = [first[name] for name in ERROR_ARMS if name in first]
    for part in ("key", "value"):
        lines = []
        for color, arm in enumerate(measured):
            rows = task.rows.of("kvcomm_kv_error", arm=arm, part=part, measure="relative")
            lines += _by_layer(rows, arm, color)
        if lines:
            found[part] = _layer_chart(lines, "relative error", f"{task.task}: error of {part}s by layer")
    return found


def curve_of(arm: str) -> str:
    """Without the number of the main setting: `blend` of blend:0.15, `kvcomm:h=values` of kvcomm:0.3,h=values."""
    name, _, rest = arm.partition(":")
    options = ",".join(word for word in rest.split(",") if "=" in word)
    return f"{name}:{options}" if options else name


def variation_chart(rows: Rows) -> Chart | None:
    """What another text before a document, and another place, change of its keys and values; None if not measured."""
    lines = []
    for color, (cause, part) in enumerate((cause, part) for cause in CAUSES for part in ("key", "value")):
        lines += _by_layer(rows.of("kvcomm_variation", cause=cause, part=part), f"{part}s: {CAUSES[cause]}", color)
    return _layer_chart(lines, "relative change", "One document in another context") if lines else None


def _by_layer(rows: Rows, name: str, color: int) -> list[Line]:
    """A line; none where every value is 0."""
    line = result_line(name, rows, "layer", color)
    # Without intervals: six bands over each other would hide the lines.
    return [dataclasses.replace(line, low=(), high=())] if any(line.y) else []


def _layer_chart(lines: Sequence[Line], y: str, title: str) -> Chart:
    return line_chart(lines, Axis("layer", ticks=ticks(lines)), Axis(y, low=0.0), title)
