"""Reuse of KV caches among agents: every arm of `anchorctx kvcomm` beside dense, and where its cache is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchorctx.records.results import Result
from anchorctx.report.blocks import Cell, Figure, Section, Table, measured
from anchorctx.report.collect import Material
from anchorctx.report.figures.charts import Chart, heat_map
from anchorctx.report.figures.reuse import error_charts, variation_chart
from anchorctx.report.numbers import number
from anchorctx.report.reuse_table import distinct, find
from anchorctx.report.series import check_one_manifest

PREFIX = "kvcomm_"
ALL = {"kind": "all"}
SHARES: dict[str, tuple[str, dict[str, Any]]] = {
    "agreement": ("kvcomm_agreement", {"tokens": "all"}),
    "accuracy": ("kvcomm_accuracy", {}),
    "judge": ("kvcomm_judge_consistency", {"shuffled": False}),
    "reuse": ("kvcomm_reuse", {"by": "tokens"}),
}
"""Column of the map: the metric, and what of its context is wanted."""
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "KL (nats)": ("kvcomm_kl", {"tokens": "all"}),
    "agreement": SHARES["agreement"],
    "accuracy": SHARES["accuracy"],
    "accuracy, less dense's": ("kvcomm_accuracy_difference", {}),
    "reuse: calls": ("kvcomm_reuse", {"by": "calls"}),
    "tokens": ("kvcomm_reuse", {"by": "tokens"}),
    "operations": ("kvcomm_reuse", {"by": "flops"}),
}


def build(material: Material) -> Section | None:
    """None without an evaluation of reuse."""
    found = [row for row in material.rows if row.result.metric.startswith(PREFIX)]
    models = list(dict.fromkeys(row.model for row in found))
    blocks: list[Figure | Table] = []
    for model in models:
        mine = [row for row in found if row.model == model]
        check_one_manifest(mine, f"the evaluation of KV reuse of {model}")
        rows = [row.result for row in mine]
        tasks = distinct(rows, "task")
        for task in tasks:
            name = f"{model}: {task}" if len(models) > 1 else task
            blocks += _task(name, task, rows, variation_chart(rows) if task == tasks[0] else None)
    if not blocks:
        return None
    lead = (
        "Agents that run one checkpoint read texts that others have read; each arm reuses their keys and values in "
        "another way. Compared with computing every prompt anew (dense), on the same words."
    )
    return Section("kvcomm", "Agents that share KV caches", lead, blocks)


def _task(name: str, task: str, rows: Sequence[Result], variation: Chart | None) -> list[Figure | Table]:
    mine = [row for row in rows if row.context.get("task") == task]
    arms = distinct(mine, "arm")
    blocks: list[Figure | Table] = [_map(name, mine, arms)]
    for part, chart in error_charts(mine, task).items():
        caption = f"Norm of the difference to dense's {part}s, by dense's norm."
        blocks.append(Figure(f"{name}: error of {part}s by layer", chart, caption))
    if variation is not None:
        caption = "Norm of the change of a document's keys and values, by their norm."
        blocks.append(Figure(variation.description, variation, caption))
    return [*blocks, _table(name, mine, arms)]


def _map(name: str, rows: Sequence[Result], arms: Sequence[str]) -> Figure:
    cells = {}
    for arm in arms:
        for column, (metric, where) in SHARES.items():
            if (row := find(rows, metric, arm=arm, **ALL, **where)) is not None:
                cells[arm, column] = row.value
    columns = [column for column in SHARES if any(at == column for _, at in cells)]
    what = f"{name}: shares by arm"
    chart = heat_map(cells, arms, columns, what, row_label="", column_label="share, 1 is best")
    caption = (
        "Agreement: tokens with dense's most likely one. Accuracy: answers right. Judge: decisions like dense's. "
        "Reuse: prompt tokens that were not computed; below 0 where an arm computes more."
    )
    return Figure(what, chart, caption)


def _table(name: str, rows: Sequence[Result], arms: Sequence[str]) -> Table:
    used = {
        column: where
        for column, where in COLUMNS.items()
        if any(find(rows, where[0], arm=arm, **ALL, **where[1]) is not None for arm in arms)
    }
    body = []
    for arm in arms:
        cells = [_cell(find(rows, metric, arm=arm, **ALL, **where)) for metric, where in used.values()]
        times = [find(rows, "kvcomm_ttft", arm=arm, **ALL, agent="request", quantile=q) for q in ("p50", "p95")]
        body.append([Cell(arm, arm), *cells, *map(_milliseconds, times)])
    caption = (
        "With 95 % intervals where they are known. TTFT: time to the first token of all agents of a request, hidden "
        "work included."
    )
    return Table(f"{name} by arm", ("arm", *used, "TTFT p50 (ms)", "p95 (ms)"), body, caption)


def _cell(row: Result | None) -> Cell:
    if row is None:
        return Cell("–", None)
    return Cell(f"{row.value:.2g}", row.value) if row.metric == "kvcomm_kl" else measured(row)


def _milliseconds(row: Result | None) -> Cell:
    return Cell("–", None) if row is None else Cell(number(1e3 * row.value), row.value)
