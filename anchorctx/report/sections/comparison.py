"""Every model against the first: differences with intervals, and whether chance explains them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from anchorctx.records.results import Result
from anchorctx.records.statistics import (
    INTERVALS,
    PAIRED_RATIO,
    PAIRED_T,
    SIGN_FLIP,
    Difference,
    difference,
    holm,
    over_cells,
)
from anchorctx.report.blocks import Cell, Section, Table, measured, text_cell
from anchorctx.report.collect import Material
from anchorctx.report.sections import precision, reuse, ruler
from anchorctx.report.series import Series, by_model

SKIPPED = (precision.PREFIX, reuse.PREFIX)
"""Metrics with a section that compares arms of one model."""
LEVEL = 0.05
FEW = 8
"""Cells of a metric that are listed one by one; where there are more, only all of them together."""
TESTS = {
    PAIRED_T: "Student's t over the same items in both",
    PAIRED_RATIO: "the losses of the same documents in both, each by its number of tokens",
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
    metrics = dict.fromkeys(metric for row in material.rows if not (metric := row.result.metric).startswith(SKIPPED))
    if not metrics:
        return None
    # The oldest evaluation's: `collect` sorts folders by time.
    baseline = next(row.model for row in material.rows if row.result.metric in metrics)
    families = itertools.chain.from_iterable(_families(material, metric, baseline) for metric in metrics)
    compared = list(itertools.chain.from_iterable(map(_lines, families)))
    if not compared:
        return None
    # Over all lines of the table, whatever they measure: a reader looks at all of them.
    adjusted = holm([line.found.p for line in compared])
    rows = [_row(line, p) for line, p in zip(compared, adjusted, strict=True)]
    head = ["measure", "model", baseline, "this model", "difference (95 %)", "p", "p, all lines", "test"]
    used = [f"{test} ({TESTS[test]})" for test in dict.fromkeys(line.found.test for line in compared)]
    if len(used) == 1:  # the caption names it; a column of equal words would not help
        head, rows = head[:-1], [row[:-1] for row in rows]
    caption = (
        f"Against {baseline}, the first model; perplexities as ratios. Tested by {'; by '.join(used)}. "
        f"“p, all lines” has Holm's correction for looking at {len(rows)} lines; bold is below 0.05."
    )
    differ = sum(p < LEVEL for p in adjusted)
    lead = (
        f"{differ} of {len(rows)} differences to {baseline} are larger than chance explains (5 %, all lines together)."
    )
    return Section("comparison", "Comparison", lead, [Table("Against the first model", head, rows, caption)])


def _families(material: Material, metric: str, baseline: str) -> Iterator[Series]:
    """A metric's series with the baseline first; lm-eval's are RULER's and each other task's, measured apart."""
    wanted = [lambda row: True]
    if metric == ruler.METRIC:
        others = [row.result for row in material.rows if row.result.metric == metric and not ruler.is_ruler(row.result)]
        tasks = dict.fromkeys(row.context["task"] for row in others)
        # `task=task` binds the loop's value now; the function is called later.
        wanted = [ruler.is_ruler]
        wanted += [lambda row, task=task: not ruler.is_ruler(row) and row.context["task"] == task for task in tasks]
    for of_family in wanted:
        series = by_model(material.rows, metric, of_family)
        if baseline in series:
            yield {baseline: series.pop(baseline)} | series


def _lines(series: Series) -> Iterator[Compared]:
    """Every model against the first: cell by cell where they are few, and all cells together."""
    (_, baseline), *others = series.items()
    before = {row.key: row for row in baseline}
    for other, rows in others:
        pairs = [(a, b) for b in rows if (a := before.get(b.key)) is not None and a.same_text(b)]
        if not pairs:
            continue
        metric = pairs[0][1].metric
        # A RULER grid of 13 tasks and 6 lengths would be 78 lines, and Holm's correction would hide most of them.
        if len(pairs) <= FEW:
            for a, b in pairs:
                if (found := difference(a, b)) is not None:
                    yield Compared(metric, _what(b), other, a, b, found)
        whole = over_cells([(a.value, b.value) for a, b in pairs])
        if whole is not None:
            yield Compared(metric, f"mean of {len(pairs)} cells", other, None, None, whole)


def _what(result: Result) -> str:
    """Which number it is: niah_single_1, score, length 4,096."""
    # Names first, so that lines of one task have the same beginning.
    entries = sorted(result.where.items(), key=lambda entry: isinstance(entry[1], int | float))
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int | float) else str(value)
        for name, value in entries
    )


def _row(line: Compared, adjusted: float) -> list[Cell]:
    found = line.found
    form = "×{:.3f}" if found.is_ratio else "{:+.3f}"
    ends = f"{form} ({form} to {form})".format(found.value, found.low, found.high)
    measure = line.metric.replace("_", " ") + (f", {line.what}" if line.what else "")
    return [
        text_cell(measure),
        text_cell(line.other),
        measured(line.before),
        measured(line.after),
        Cell(ends, found.value),
        Cell(_probability(found.p), found.p),
        Cell(_probability(adjusted), adjusted, strong=adjusted < LEVEL),
        text_cell(found.test),
    ]


def _probability(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
