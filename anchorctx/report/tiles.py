"""The few numbers at the top of the page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from anchorctx.report.collect import Material, TrainRun
from anchorctx.report.numbers import number, percent
from anchorctx.report.series import by_model


@dataclass(frozen=True, slots=True)
class Tile:
    """A number with what it is."""

    value: str
    name: str


def tiles(material: Material) -> list[Tile]:
    """What the folders have of: retrieval at the longest length, perplexity, precision, speed, saved attention."""
    found = [*_retrieval(material), *_perplexity(material), *_precision(material)]
    if material.runs:
        found += _training(material.runs[-1])
    return found


def _retrieval(material: Material) -> list[Tile]:
    series = by_model(material.rows, "retrieval_accuracy")
    if not series:
        return []
    model, rows = list(series.items())[-1]
    last = max(rows, key=lambda row: row.result.context["length"])
    first = [
        row for row in next(iter(series.values())) if row.result.context["length"] == last.result.context["length"]
    ]
    before = f"{percent(first[0].result.value, 0)} → " if len(series) > 1 and first else ""
    name = f"retrieval at {last.result.context['length']:,} tokens ({model})"
    return [Tile(f"{before}{percent(last.result.value, 0)}", name)]


def _perplexity(material: Material) -> list[Tile]:
    series = by_model(material.rows, "perplexity")
    if not series:
        return []
    values = [rows[-1].result.value for rows in series.values()]
    before = f"{values[0]:.3g} → " if len(values) > 1 else ""
    return [Tile(f"{before}{values[-1]:.3g}", f"held-out perplexity ({list(series)[-1]})")]


def _precision(material: Material) -> list[Tile]:
    rows = [row.result for row in material.rows if row.result.metric == "precision_verdict"]
    return [
        Tile(f"−{percent(row.value, 0)}", f"of the bfloat16 RoPE error with float32 rotation ({row.context['model']})")
        for row in rows[:1]
        if row.context.get("recommendation")
    ]


def _training(run: TrainRun) -> list[Tile]:
    speed, saved = run.column("perf/tokens_per_second")[1], run.column("perf/attention_flops_saved")[1]
    found = [Tile(number(statistics.median(speed)), f"tokens a second ({run.label})")] if speed else []
    return found + ([Tile(percent(statistics.fmean(saved), 0), "of full attention not computed")] if saved else [])
