"""RULER by task and length, and whatever else lm-eval measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from anchorctx.report.blocks import Cell, Figure, Section, Table, measured
from anchorctx.report.collect import Material, Row
from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.charts import Line, heat_map, line_chart
from anchorctx.report.numbers import number
from anchorctx.report.series import by_model

AVERAGE = "average"


def build(material: Material) -> Section | None:
    """None without RULER rows: those of lm-eval that have a length."""
    series = by_model(material.rows, "lm_eval", _is_ruler)
    if not series:
        return None
    lengths = sorted({row.result.context["length"] for rows in series.values() for row in rows})
    tasks = sorted({row.result.context["task"] for rows in series.values() for row in rows})
    blocks: list[Figure | Table] = []
    lines = []
    for model, rows in series.items():
        means = {length: mean for length in lengths if (mean := average(rows, length, tasks)) is not None}
        lines.append(Line(model, list(means), list(means.values()), color=material.color(model)))
    axis = Axis("length (tokens)", log=2, ticks=lengths)
    chart = line_chart(lines, axis, Axis("mean score", low=0.0, high=1.03, percent=True), "RULER by length")
    blocks.append(Figure("Average over tasks", chart, f"Mean score of the {len(tasks)} tasks, each counting the same."))
    for model, rows in series.items():
        blocks.append(_heat(model, rows, tasks, lengths))
    blocks.append(_table(series, tasks, lengths))
    return Section("ruler", "RULER", _lead(series, tasks, lengths), blocks)


def build_other(material: Material) -> Section | None:
    """Other tasks of lm-eval; None where there are none."""
    rows = [row for row in material.rows if row.result.metric == "lm_eval" and not _is_ruler(row.result.context)]
    series = {
        task: by_model(rows, "lm_eval", lambda context, task=task: context["task"] == task)
        for task in sorted({row.result.context["task"] for row in rows})
    }
    if not series:
        return None
    body = [
        [Cell(task, task), Cell(measure := str(row.result.context.get("measure", "")), measure), Cell(model, model),
         measured(row.result), Cell(f"{row.result.n:,}" if row.result.n else "–", row.result.n or None)]
        for task, models in series.items() for model, mine in models.items() for row in mine
    ]  # fmt: skip
    table = Table("By task", ("task", "measure", "model", "value (95 %)", "n"), body)
    return Section("lm-eval", "Other tasks", "Tasks of lm-eval, with its own prompts and scores.", [table])


def average(rows: Sequence[Row], length: int, tasks: Sequence[str]) -> float | None:
    """Mean score over tasks at a length; None where one is missing, since then it would be another average."""
    found = {row.result.context["task"]: row.result.value for row in rows if row.result.context["length"] == length}
    return statistics.fmean(found.values()) if set(found) == set(tasks) else None


def _is_ruler(context: dict[str, Any]) -> bool:
    return "length" in context


def _heat(model: str, rows: Sequence[Row], tasks: list[str], lengths: list[int]) -> Figure:
    names = {length: number(length) for length in lengths}
    cells = {(row.result.context["task"], names[row.result.context["length"]]): row.result.value for row in rows}
    description = f"RULER scores of {model} by task and length"
    chart = heat_map(cells, tasks, list(names.values()), description, row_label="", column_label="length (tokens)")
    return Figure(model, chart, "Score of each task at each length, 0 to 1.")


def _table(series: dict[str, list[Row]], tasks: list[str], lengths: list[int]) -> Table:
    body = []
    for model, rows in series.items():
        found = {(row.result.context["task"], row.result.context["length"]): row.result for row in rows}
        for task in tasks:
            cells = [measured(found[task, n], percent=True) if (task, n) in found else Cell("–") for n in lengths]
            body.append([Cell(model, model), Cell(task, task), *cells])
        means = [average(rows, length, tasks) for length in lengths]
        cells = [Cell("–") if mean is None else Cell(f"{100 * mean:.1f} %", mean, strong=True) for mean in means]
        body.append([Cell(model, model), Cell(AVERAGE, AVERAGE, strong=True), *cells])
    head = ("model", "task", *(f"{length:,}" for length in lengths))
    return Table("Scores", head, body, "Scores with 95 % intervals over documents.")


def _lead(series: dict[str, list[Row]], tasks: list[str], lengths: list[int]) -> str:
    longest = lengths[-1]
    means = {model: average(rows, longest, tasks) for model, rows in series.items()}
    said = ", ".join(f"{model} {100 * mean:.1f} %" for model, mean in means.items() if mean is not None)
    return (
        f"{len(tasks)} tasks at {', '.join(f'{n:,}' for n in lengths)} tokens. At {longest:,}: {said or 'incomplete'}."
    )
