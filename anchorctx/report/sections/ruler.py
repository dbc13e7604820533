"""RULER by task and length, and whatever else lm-eval measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from anchorctx.records.results import Result, Rows
from anchorctx.report.blocks import MISSING, Cell, Figure, Section, Table, formatted, measured, text_cell
from anchorctx.report.collect import Material
from anchorctx.report.figures.chart import Axis
from anchorctx.report.figures.charts import Grid, Line, heat_map, line_chart
from anchorctx.report.numbers import number, percent
from anchorctx.report.series import Series, by_model

METRIC = "lm_eval"
AVERAGE = "average"


def build(material: Material) -> Section | None:
    """None without RULER rows: those of lm-eval that have a length."""
    series = by_model(material.rows, METRIC, is_ruler)
    if not series:
        return None
    lengths = sorted({row.context["length"] for rows in series.values() for row in rows})
    tasks = sorted({row.context["task"] for rows in series.values() for row in rows})
    lines = []
    for model, rows in series.items():
        means = {length: mean for length in lengths if (mean := average(rows, length, tasks)) is not None}
        lines.append(Line(model, list(means), list(means.values()), color=material.color(model)))
    axis = Axis("length (tokens)", log=2, ticks=lengths)
    chart = line_chart(lines, axis, Axis("mean score", low=0.0, high=1.03, percent=True), "RULER by length")
    caption = f"Mean score of the {len(tasks)} tasks, each counting the same."
    blocks = [
        Figure("Average over tasks", chart, caption),
        *(_heat(model, rows, tasks, lengths) for model, rows in series.items()),
        _table(series, tasks, lengths),
    ]
    return Section("ruler", "RULER", _lead(series, tasks, lengths), blocks)


def build_other(material: Material) -> Section | None:
    """Other tasks of lm-eval; None where there are none."""
    rows = [row for row in material.rows if row.result.metric == METRIC and not is_ruler(row.result)]
    tasks = sorted({row.result.context["task"] for row in rows})
    # Task by task: each is an evaluation with a manifest of its own.
    series = {task: by_model(rows, METRIC, lambda row, task=task: row.context["task"] == task) for task in tasks}
    if not series:
        return None
    body = [
        [text_cell(task), text_cell(str(row.context.get("measure", ""))), text_cell(model), measured(row),
         formatted(row.n or None, "{:,}")]
        for task, models in series.items() for model, mine in models.items() for row in mine
    ]  # fmt: skip
    table = Table("By task", ("task", "measure", "model", "value (95 %)", "n"), body)
    return Section("lm-eval", "Other tasks", "Tasks of lm-eval, with its own prompts and scores.", [table])


def is_ruler(result: Result) -> bool:
    """Whether a row of lm-eval is of RULER, whose tasks come in several lengths."""
    return "length" in result.context


def average(rows: Rows, length: int, tasks: Sequence[str]) -> float | None:
    """Mean score over tasks at a length; None where one is missing, since then it would be another average."""
    found = {row.context["task"]: row.value for row in rows.of(METRIC, length=length)}
    return statistics.fmean(found.values()) if set(found) == set(tasks) else None


def _heat(model: str, rows: Rows, tasks: list[str], lengths: list[int]) -> Figure:
    names = {length: number(length) for length in lengths}
    cells = {(row.context["task"], names[row.context["length"]]): row.value for row in rows}
    grid = Grid(cells, tasks, list(names.values()), row_label="", column_label="length (tokens)")
    chart = heat_map(grid, f"RULER scores of {model} by task and length")
    return Figure(model, chart, "Score of each task at each length, 0 to 1.")


def _table(series: Series, tasks: list[str], lengths: list[int]) -> Table:
    body = []
    for model, rows in series.items():
        for task in tasks:
            cells = [measured(rows.find(METRIC, task=task, length=n), as_percent=True) for n in lengths]
            body.append([text_cell(model), text_cell(task), *cells])
        means = [average(rows, length, tasks) for length in lengths]
        cells = [MISSING if mean is None else Cell(percent(mean, 1), mean, strong=True) for mean in means]
        body.append([text_cell(model), Cell(AVERAGE, AVERAGE, strong=True), *cells])
    head = ("model", "task", *(f"{length:,}" for length in lengths))
    return Table("Scores", head, body, "Scores with 95 % intervals over documents.")


def _lead(series: Series, tasks: list[str], lengths: list[int]) -> str:
    longest = lengths[-1]
    means = {model: average(rows, longest, tasks) for model, rows in series.items()}
    words = ", ".join(f"{model} {percent(mean, 1)}" for model, mean in means.items() if mean is not None)
    at = ", ".join(f"{n:,}" for n in lengths)
    return f"{len(tasks)} tasks at {at} tokens. At {longest:,}: {words or 'incomplete'}."
