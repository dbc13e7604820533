"""Every model against the first: differences with intervals, and whether chance explains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anchorctx.records.results import Result
from anchorctx.records.statistics import INTERVALS, PAIRED_T, SIGN_FLIP, Difference, difference, holm, over_cells
from anchorctx.report.blocks import Cell, Section, Table, measured
from anchorctx.report.collect import Material
from anchorctx.report.series import KEYS, Series, by_model, comparable, place_of

SKIPPED = "precision_"
"""Metrics with a section that compares its own arms."""
KVCOMM = "kvcomm_"
LEVEL = 0.05
FEW = 8
"""Cells of a metric that are listed one by one; of more, only all together."""
TESTS = {
    PAIRED_T: "Student's t over the same items in both",
    INTERVALS: "from the two 95 % intervals as if independent, which is cautious where the items were the same",
    SIGN_FLIP: "random signs of the differences of all cells (task, length, depth) of one metric",
}


@dataclass(frozen=True, slots=True)
class Compared:
    """One line of the table."""

    metric: str
    what: str
    """The cell: length, task, depth."""
    other: str
    before: Result | None
    after: Result | None
    found: Difference


def build(material: Material) -> Section | None:
    """None when no two models have a cell in common."""
    metrics = dict.fromkeys(row.result.metric for row in material.rows)
    metrics = [metric for metric in metrics if not metric.startswith((SKIPPED, KVCOMM))]
    compared = [line for metric in metrics for series in _families(material, metric) for line in _lines(metric, series)]
    if not compared:
        return None
    baseline = _baseline(material)
    adjusted = holm([line.found.p for line in compared])
    rows = [_row(line, p) for line, p in zip(compared, adjusted, strict=True)]
    several = len({line.found.test for line in compared}) > 1
    rows = [row if several else row[:-1] for row in rows]
    head = ("measure", "model", baseline, "this model", "difference (95 %)", "p", "p, all lines", "test")[
        : len(rows[0])
    ]
    differ = sum(p < LEVEL for p in adjusted)
    used = [f"{test} ({TESTS[test]})" for test in dict.fromkeys(line.found.test for line in compared)]
    caption = (
        f"Against {baseline}, the first model; perplexities as ratios. Tested by {'; by '.join(used)}. "
        f"“p, all lines” has Holm's correction for looking at {len(rows)} lines; bold is below 0.05."
    )
    lead = (
        f"{differ} of {len(rows)} differences to {baseline} are larger than chance explains (5 %, all lines together)."
    )
    return Section("comparison", "Comparison", lead, [Table("Against the first model", head, rows, caption)])


def _baseline(material: Material) -> str:
    return next(row.model for row in material.rows if not row.result.metric.startswith((SKIPPED, KVCOMM)))


def _families(material: Material, metric: str) -> Iterator[Series]:
    """A metric's series with the baseline first; lm-eval's are RULER's and each other task's, measured apart."""
    baseline = _baseline(material)
    wanted: list[Callable[[dict[str, Any]], bool]] = [lambda context: True]
    if metric == "lm_eval":
        tasks = dict.fromkeys(r.result.context["task"] for r in material.rows if r.result.metric == metric)
        wanted = [lambda context: "length" in context]
        wanted += [lambda c, task=task: "length" not in c and c["task"] == task for task in tasks]
    for where in wanted:
        series = by_model(material.rows, metric, where)
        if baseline in series:
            yield {baseline: series.pop(baseline)} | series


def _lines(metric: str, series: Series) -> Iterator[Compared]:
    """Every model against the first: cell by cell where they are few, and all cells together."""
    (_, baseline), *others = series.items()
    before = {place_of(row.result): row.result for row in baseline}
    for other, rows in others:
        found = ((before.get(place_of(row.result)), row.result) for row in rows)
        pairs = [(a, b) for a, b in found if a is not None and comparable(a, b)]
        if len(pairs) <= FEW:
            for a, b in pairs:
                if (found := difference(a, b)) is not None:
                    yield Compared(metric, _what(b), other, a, b, found)
        whole = over_cells([(a.value, b.value) for a, b in pairs])
        if whole is not None:
            yield Compared(metric, f"mean of {len(pairs)} cells", other, None, None, whole)


def _what(result: Result) -> str:
    parts = []
    for name in KEYS:
        value = result.context.get(name)
        if value is not None:
            parts.append(f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int | float) else str(value))
    return ", ".join(parts)


def _row(line: Compared, adjusted: float) -> Sequence[Cell]:
    found = line.found
    form = "×{:.3f}" if found.is_ratio else "{:+.3f}"
    ends = f"{form} ({form} to {form})".format(found.value, found.low, found.high)
    measure = line.metric.replace("_", " ") + (f", {line.what}" if line.what else "")
    return [
        Cell(measure, measure),
        Cell(line.other, line.other),
        measured(line.before) if line.before else Cell("–"),
        measured(line.after) if line.after else Cell("–"),
        Cell(ends, found.value),
        Cell(_probability(found.p), found.p),
        Cell(_probability(adjusted), adjusted, strong=adjusted < LEVEL),
        Cell(found.test, found.test),
    ]


def _probability(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
