"""Results averaged over the checkpoints of one run, as the paper does for RULER, which swings from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchorctx.evals.config import EvaluatedModel
from anchorctx.evals.journal import Journal
from anchorctx.records.results import Result, mean_interval


def average(rows: Sequence[Result], models: Sequence[EvaluatedModel], journal: Journal) -> list[Result]:
    """A row for every number that all checkpoints of a group have, appended to `journal` unless it is there.

    Its value is the mean over the checkpoints, its interval Student's over them: of how they differ, not of how well
    each was measured. Its `n` is their number.
    """
    found: list[Result] = []
    for word in dict.fromkeys(model.average for model in models if model.average):
        labels = [str(model.label) for model in models if model.average == word]
        for same in _series([row for row in rows if row.model in labels]).values():
            if len(same) == len(labels):
                found += _average(word, labels, same, journal)
    return found


def _series(rows: Sequence[Result]) -> dict[Any, list[Result]]:
    """Rows of different models that say the same thing."""
    series: dict[Any, list[Result]] = {}
    for row in rows:
        key = (row.metric, row.unit, frozenset(row.where.items()))
        series.setdefault(key, []).append(row)
    return series


def _average(word: str, labels: list[str], rows: list[Result], journal: Journal) -> list[Result]:
    identity = {"evaluation": "average", "label": word, "of": [row.manifest for row in rows]}
    manifest = journal.open(identity, {"checkpoints": labels})
    unit = rows[0].where
    known = [row for row in journal.find(manifest, word, unit) if row.metric == rows[0].metric]
    if known:
        return known
    values = [row.value for row in rows]
    low, high = mean_interval(values) or (None, None)
    context = {"model": word, **unit, "checkpoints": labels}
    row = Result(
        metric=rows[0].metric,
        value=sum(values) / len(values),
        unit=rows[0].unit,
        n=len(values),
        low=low,
        high=high,
        manifest=manifest,
        context=context,
    )
    journal.add([row])
    return [row]
