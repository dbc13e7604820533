"""What the evaluations of a model say: retrieval of planted facts, held-out perplexity, and needles in a haystack."""

from __future__ import annotations

import statistics

from anchorctx.records.results import Rows
from anchorctx.report.blocks import MISSING, Block, Figure, Section, Table, formatted, measured, text_cell
from anchorctx.report.collect import Material
from anchorctx.report.figures.chart import Axis
from anchorctx.report.figures.charts import Grid, Line, heat_map, line_chart
from anchorctx.report.figures.curves import RETRIEVAL, result_line, retrieval_chart, ticks
from anchorctx.report.numbers import number, percent
from anchorctx.report.series import Series, by_model

NEEDLE = {"needle_accuracy": "share of answers right", "needle_logprob": "log-likelihood of the answer (nats)"}


def build_retrieval(material: Material) -> Section | None:
    """Retrieval accuracy against the length of the context; None without `retrieval_accuracy` rows."""
    series = by_model(material.rows, "retrieval_accuracy")
    if not series:
        return None
    lengths = sorted({row.context["length"] for rows in series.values() for row in rows})
    chart = retrieval_chart(_lines(material, series, "length"), material.pretraining_length)
    caption = "Facts planted in held-out text and asked for again; right is the value itself as the most likely token."
    body = []
    for model, rows in series.items():
        found = {row.context["length"]: measured(row) for row in rows}
        body.append([text_cell(model), *(found.get(length, MISSING) for length in lengths)])
    head = ["model", *(f"{length:,}" for length in lengths)]
    table = Table("By length", head, body, "Share of answers right, with its 95 % interval.")
    longest = lengths[-1]
    ends = [f"{model} {row.value:.2f}" for model, rows in series.items() for row in rows
            if row.context["length"] == longest]  # fmt: skip
    lead = f"At {number(longest)} tokens: {', '.join(ends)}."
    return Section("retrieval", "Retrieval", lead, [Figure(RETRIEVAL, chart, caption), table])


def build_perplexity(material: Material) -> Section | None:
    """Held-out perplexity: over all tokens, by position in the document, and against the length of the context.

    None without a row of any of the three metrics.
    """
    blocks: list[Block] = []
    if position := by_model(material.rows, "perplexity_by_position"):
        lines = _lines(material, position, "stop")
        axis = Axis("position in the document (tokens, up to)", log=2, ticks=ticks(lines))
        chart = line_chart(lines, axis, Axis("perplexity"), "Perplexity by position")
        caption = "Perplexity of the tokens between one mark and the next: a model that uses its context keeps falling."
        blocks.append(Figure("By position", chart, caption))
    if context := by_model(material.rows, "perplexity_by_context"):
        lines = _lines(material, context, "context_length")
        axis = Axis("context (tokens)", log=2, ticks=ticks(lines))
        chart = line_chart(lines, axis, Axis("perplexity"), "Perplexity by context")
        blocks.append(Figure("Against context", chart, "The same tokens, predicted from so much text before them."))
    whole = by_model(material.rows, "perplexity")
    if whole:
        rows = [
            [text_cell(model), measured(r), formatted(r.n, "{:,}"), formatted(r.about.get("tokens"), "{:,}")]
            for model, mine in whole.items()
            for r in mine
        ]
        head = ("model", "perplexity (95 % over documents)", "documents", "tokens scored")
        blocks.append(Table("Held-out perplexity", head, rows))
    if not blocks:
        return None
    means = ", ".join(f"{model} {rows[-1].value:.4g}" for model, rows in whole.items())
    return Section("perplexity", "Perplexity", f"Held out: {means}." if means else "", blocks)


def build_needle(material: Material) -> Section | None:
    """Maps of whether a fact is found, by the context's length and the fact's depth; None without needle rows."""
    blocks, means = [], []
    for metric, meaning in NEEDLE.items():
        series = by_model(material.rows, metric)
        values = [row.value for rows in series.values() for row in rows]
        if not values:
            continue
        # All maps of a metric share one scale of colours, so that models can be compared by eye.
        low, high = (0.0, 1.0) if metric == "needle_accuracy" else (min(values), 0.0)
        for model, rows in series.items():
            title = f"{model}: {meaning}"
            caption = "Depth 0 % is right behind the first token, 100 % right before the question."
            blocks.append(Figure(title, heat_map(_needle_grid(rows), title, low, high), caption))
            if metric == "needle_accuracy":
                means.append(f"{model} {statistics.fmean(row.value for row in rows):.2f}")
    if not blocks:
        return None
    lead = f"Mean over the map: {', '.join(means)}." if means else "One cell for each length and depth."
    return Section("needle", "Needle in a haystack", lead, blocks)


def _needle_grid(rows: Rows) -> Grid:
    lengths, depths = sorted(rows.distinct("length")), sorted(rows.distinct("depth"))
    cells = {(percent(row.context["depth"]), number(row.context["length"])): row.value for row in rows}
    # The names of rows and columns in the order of their numbers; cells are found by both.
    names = [percent(depth) for depth in depths], [number(length) for length in lengths]
    return Grid(cells, *names, row_label="depth of the needle", column_label="context (tokens)")


def _lines(material: Material, series: Series, key: str) -> list[Line]:
    """Values and intervals against the number `key` of their context, in the models' colours."""
    return [result_line(model, rows, key, material.color(model)) for model, rows in series.items()]
