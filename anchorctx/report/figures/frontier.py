"""What is lost against what is computed: every arm a curve over its setting, dense and a prefix cache beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.records.results import Result
from anchorctx.report.figures.chart import LEFT, Axis, Chart, label, save_charts
from anchorctx.report.figures.inline import tag
from anchorctx.report.figures.reuse import TaskRows, by_stem, curve_of, tasks_of
from anchorctx.report.figures.style import CARD, MUTED, RULE, SERIES
from anchorctx.report.numbers import with_interval

EXACT = {"dense": 0, "dense_prefix_cache": 0}
"""Arms that lose nothing but rounding, and the number of their colour."""
LOSSES = {
    "KL": "KL(dense | arm), nats a token",
    "agreement": "tokens with dense's likeliest",
    "accuracy": "share of answers right",
}
COSTS = {"cost: tokens": "prompt tokens computed, of dense's", "cost: seconds": "time to first token, of dense's"}


@dataclass(frozen=True, slots=True)
class Mark:
    """One arm in a chart: what it costs, and what it loses."""

    arm: str
    x: Result
    y: Result


def draw_frontier(rows: Sequence[Result], folder: Path) -> list[Path]:
    """The picture kvcomm_<task>_frontier.png of each task; returns the files. With several models as `draw_reuse`."""
    drawn = []
    for model, stem, mine in by_stem(rows):
        for task in tasks_of(mine):
            charts = [(title, chart) for title, chart, _ in frontier_charts(task)]
            said, problems = task.recommendation, task.find("KL", "dense")
            heading = f"{model}: {task.task}, {problems.n if problems else 0} problems"
            heading += "" if said is None else f", recommended: {said.context['recommended']}"
            if charts:
                drawn.append(save_charts(charts, folder / f"{stem}{task.task}_frontier.png", heading, len(COSTS)))
    return drawn


def curves_of(task: TaskRows, loss: str, cost: str) -> dict[str, list[Mark]]:
    """The arms' marks by their name without its setting (`blend` of `blend:0.15`), those that compute least first."""
    found: dict[str, list[Mark]] = {}
    for arm in task.arms:
        x, y, tokens = (task.find(measure, arm) for measure in (cost, loss, "cost: tokens"))
        if x is not None and y is not None and tokens is not None:
            found.setdefault(curve_of(arm), []).append(Mark(arm, x, y))
    place = {arm: row.value for arm in task.arms if (row := task.find("cost: tokens", arm)) is not None}
    return {name: sorted(marks, key=lambda mark: place[mark.arm]) for name, marks in found.items()}


def frontier_charts(task: TaskRows) -> Iterator[tuple[str, Chart, str]]:
    """Title, chart and caption: divergence, agreement and accuracy, each against tokens and against time."""
    bound = None if task.recommendation is None else task.recommendation.context["bound"]
    for loss, y in LOSSES.items():
        for cost, x in COSTS.items():
            curves = curves_of(task, loss, cost)
            if not any(name not in EXACT for name in curves):
                continue
            title = f"{loss} against {'computed tokens' if cost == 'cost: tokens' else 'time'}"
            caption = "Each arm a curve over its setting, with 95 % intervals over problems."
            if loss == "KL":
                caption += " What loses nothing but rounding stands on the lower edge."
            chart = _chart(curves, x, y, f"{task.task}: {title}", bound if loss == "KL" else None, log=loss == "KL")
            yield title, chart, caption


def _chart(curves: dict[str, list[Mark]], x: str, y: str, description: str, bound: float | None, *, log: bool) -> Chart:
    marks = [mark for name, some in curves.items() if name not in EXACT for mark in some]
    # Values from 1e-14, of exact arms, to 1: the axis begins below the least of the others.
    floor = _floor([mark.y.value for mark in marks]) if log else None
    every = [mark for some in curves.values() for mark in some]

    def draw(axes: Any) -> None:
        Axis(x, low=0.0, percent=True).apply(axes, "x", [v for mark in every for v in _ends(mark.x)])
        heights = [v for mark in every for v in _ends(mark.y)] + ([bound] if bound else [])
        Axis(y, log=10 if log else None, low=floor, percent=not log).apply(axes, "y", heights)
        axes.grid(axis="y", color=RULE, linewidth=1)
        label(axes, x, y, LEFT)
        if bound:
            axes.axhline(bound, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for name, color, look in looks:
            _curve(axes, name, curves[name], color, look == "dashed", floor)

    looks = _looks(list(curves))
    return Chart(description, draw, looks)


def _looks(names: Sequence[str]) -> list[tuple[str, int, str]]:
    """Five colours in full lines, then the same in dashed ones; grey for what is exact."""
    others = [name for name in names if name not in EXACT]
    exact = [(name, EXACT[name], "dashed" if i else "line") for i, name in enumerate(n for n in names if n in EXACT)]
    colors = len(SERIES) - 1
    return exact + [(n, 1 + i % colors, "dashed" if i // colors % 2 else "line") for i, n in enumerate(others)]


def _curve(axes: Any, name: str, marks: Sequence[Mark], color: int, dashed: bool, floor: float | None) -> None:
    def height(value: float) -> float:
        return value if floor is None else max(value, floor)

    ink = SERIES[color]
    for mark in marks:
        (left, right), (low, high) = _ends(mark.x), _ends(mark.y)
        at = mark.x.value, height(mark.y.value)
        axes.plot([left, right], [at[1], at[1]], color=ink, linewidth=1, alpha=0.5, gid=tag("line"))
        axes.plot([at[0], at[0]], [height(low), height(high)], color=ink, linewidth=1, alpha=0.5, gid=tag("line"))
    if len(marks) == 1:  # colours come twice, and a single mark has no line that could be dashed
        axes.annotate(
            name, (marks[0].x.value, height(marks[0].y.value)), (0, 8), textcoords="offset points", ha="center",
            color=MUTED,
        )  # fmt: skip
    words = [f"{m.arm}: {with_interval(m.y)} at {with_interval(m.x, as_percent=True)}" for m in marks]
    axes.plot(
        [mark.x.value for mark in marks], [height(mark.y.value) for mark in marks], color=ink, linewidth=2.2,
        linestyle=(0, (2.3, 1.8)) if dashed else "-", marker="o", markersize=7, markerfacecolor=CARD,
        markeredgewidth=2, clip_on=False, gid=tag("line", *([name] if len(marks) > 1 else []), *words),
    )  # fmt: skip


def _ends(row: Result) -> tuple[float, float]:
    """The row's interval, or its value twice."""
    return (row.value, row.value) if row.low is None or row.high is None else (row.low, row.high)


def _floor(values: Sequence[float]) -> float:
    """A power of ten below the least that is more than rounding."""
    least = min((value for value in values if value > 1e-9), default=1e-3)
    return 10.0 ** _power(least)


def _power(value: float) -> int:
    return int(f"{value / 2:e}".partition("e")[2])
