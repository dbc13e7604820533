"""Reuse of KV caches among agents: every arm of `anchorctx kvcomm` beside dense, on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.records.results import Result, Rows
from anchorctx.report.blocks import MISSING, Block, Cell, Figure, Section, Table, measured, text_cell
from anchorctx.report.collect import Material
from anchorctx.report.figures.reuse import TaskRows, error_charts, reuse_charts, tasks_of, variation_chart
from anchorctx.report.numbers import number
from anchorctx.report.sections import frontier
from anchorctx.report.sections.conversations import conversations, transcripts_of
from anchorctx.report.series import whole_evaluation

PREFIX = "kvcomm_"
COLUMNS = {
    "KL": "KL (nats)",
    "agreement": "agreement",
    "accuracy": "accuracy",
    "difference": "accuracy, less dense's",
    "calls": "reuse: calls",
    "tokens": "tokens",
    "flops": "operations",
    "p50": "TTFT p50 (ms)",
    "p95": "p95 (ms)",
}
"""What the page's table shows of an arm: the measure, and its heading."""


def build(material: Material) -> Section | None:
    """None without an evaluation of reuse."""
    series = whole_evaluation(material.rows, PREFIX, "the evaluation of KV reuse")
    blocks: list[Block] = []
    for model, rows in series.items():
        said = transcripts_of(material, model, rows)
        for place, task in enumerate(tasks_of(rows)):
            name = f"{model}: {task.task}" if len(series) > 1 else task.task
            blocks += frontier.blocks(name, task)
            blocks += [Figure(f"{name}: {title}", chart, caption) for title, chart, caption in reuse_charts(task)]
            for part, chart in error_charts(task).items():
                caption = f"Norm of the difference to dense's {part}s, by dense's norm."
                blocks.append(Figure(f"{name}: error of {part}s by layer", chart, caption))
            # How much a document's cache varies is the model's, not the task's: once, with the first task.
            if place == 0 and (chart := variation_chart(rows)) is not None:
                caption = "Norm of the change of a document's keys and values, by their norm."
                blocks.append(Figure(chart.description, chart, caption))
            blocks.append(_table(name, task))
            blocks += conversations(name, task.arms, [t for t in said if t.task == task.task])
    if not blocks:
        return None
    lead = (
        "Agents that run one checkpoint read texts that others have read; each arm reuses their keys and values in "
        "another way. Compared with computing every prompt anew (dense), on the same words."
    )
    return Section("kvcomm", "Agents that share KV caches", lead, blocks)


def _table(name: str, task: TaskRows) -> Table:
    used = {
        measure: head
        for measure, head in COLUMNS.items()
        if any(task.find(measure, arm) is not None for arm in task.arms)
    }
    body = [[text_cell(arm), *(_cell(measure, task.find(measure, arm)) for measure in used)] for arm in task.arms]
    caption = (
        "With 95 % intervals where they are known. Agreement: tokens with dense's most likely one. TTFT: time to the "
        "first token of all agents of a request, hidden work included."
    )
    return Table(f"{name} by arm", ("arm", *used.values()), body, caption)


def _cell(measure: str, row: Result | None) -> Cell:
    if row is None:
        return MISSING
    if measure == "KL":  # from 1e-14 to 10: two digits say more than an interval
        return Cell(f"{row.value:.2g}", row.value)
    return Cell(number(1e3 * row.value), row.value) if measure in ("p50", "p95") else measured(row)


# -- as text ----------------------------------------------------------------------------------------------------------

HEAD = ["arm", "KL, nat", "agreement", "accuracy (difference to dense, 95 %)", "judge", "judge, shuffled",
        "reuse: calls", "tokens", "FLOPs", "TTFT p50, ms", "p95", "kept, MiB"]  # fmt: skip


def reuse_table(rows: Sequence[Result]) -> str:
    """Markdown for each model and task: one line an arm with closeness, accuracy, reuse, time and memory; then what
    each arm costs for what it loses, and which one to use."""
    every, parts, closing = Rows(rows).latest(), [], []
    models = every.distinct("model")
    for model in models:
        parts += [f"### {model}"] if len(models) > 1 else []
        for task in tasks_of(every.of(model=model)):
            lines = [_line(HEAD), "|" + "---|" * len(HEAD), *(_line(_words(task, arm)) for arm in task.arms)]
            parts.append("\n".join([f"**{task.task}**", "", *lines]))
            if text := frontier.frontier_text(task):
                named = f"{model}: {task.task}" if len(models) > 1 else task.task
                closing.append(f"**{named}: what to use**\n\n{text}")
    starred = any("* |" in part for part in parts)
    return "\n\n".join([*parts, *(["* reuses everything by construction"] if starred else []), *closing])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _words(task: TaskRows, arm: str) -> list[str]:
    def value(measure: str, form: str, scale: float = 1.0) -> str:
        row = task.find(measure, arm)
        return "" if row is None else form.format(row.value * scale)

    difference, calls = task.find("difference", arm), task.find("calls", arm)
    accuracy = value("accuracy", "{:.3f}")
    if difference is not None and arm != "dense":
        accuracy += f" ({difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})"
    star = "*" if calls is not None and calls.context["by_construction"] else ""
    return [
        arm,
        value("KL", "{:.2g}"),
        value("agreement", "{:.4f}"),
        accuracy,
        value("judge", "{:.3f}"),
        value("judge, shuffled", "{:.3f}"),
        value("calls", "{:.0%}") + star,
        value("tokens", "{:.0%}"),
        value("flops", "{:.0%}"),
        value("p50", "{:.1f}", 1e3),
        value("p95", "{:.1f}", 1e3),
        value("kept", "{:.1f}", 2**-20),
    ]
