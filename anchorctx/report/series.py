"""Rows to series, each of one manifest: a line or a table never mixes what different runs of an evaluation measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.results import Result
from anchorctx.report.collect import Row

Series = dict[str, list[Row]]
"""Rows by model, in order of appearance."""
OUTCOMES = ("model", "values", "loss_nats", "sentence", "recommendation", "checkpoints")
"""Context that is found rather than set: it does not tell two measurements apart."""
KEYS = ("task", "measure", "length", "context_length", "start", "stop", "depth")
"""Context that tells the numbers of one model and metric apart."""
TEXT = ("documents", "tokens")
"""How much text a row is about."""


def by_model(rows: Iterable[Row], metric: str, where: Callable[[dict[str, Any]], bool] = lambda _: True) -> Series:
    """Rows of `metric` whose context is wanted, by model.

    A cell that the same run measured twice counts once, the later one. Raises UserError when a model's rows come from
    different manifests.
    """
    found: Series = {}
    for row in rows:
        if row.result.metric == metric and where(row.result.context):
            found.setdefault(row.model, []).append(row)
    for model, mine in found.items():
        check_one_manifest(mine, f"{metric} of {model}")
        found[model] = list({cell(row): row for row in mine}.values())
    return found


def check_one_manifest(rows: Sequence[Row], name: str) -> None:
    """UserError when rows that would be one series have different manifests."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.result.manifest, row)
    if len(first) > 1:
        places = " and ".join(f"{hash or 'none'} ({row.place.path / 'results.jsonl'})" for hash, row in first.items())
        raise UserError(
            f"{name} has rows of different manifests, {places}, which must not be one series: give one evaluation "
            "another label=, evaluate again into a new folder, delete the older rows, or report only one folder"
        )


def cell(row: Row) -> str:
    """What was measured, apart from the outcome: equal where a row is the same measurement again."""
    context = {key: value for key, value in row.result.context.items() if key not in OUTCOMES}
    return json.dumps([row.result.metric, context], sort_keys=True)


def place_of(result: Result) -> tuple[Any, ...]:
    """Where in a series a row stands: equal for rows of two models that ask the same."""
    return tuple(result.context.get(key) for key in KEYS)


def comparable(a: Result, b: Result) -> bool:
    """May two models' rows of one place be compared? Not when they read other text, as with another tokenizer."""
    return all(a.context.get(key, n) == n for key in TEXT if (n := b.context.get(key)) is not None)


def sorted_by(rows: Sequence[Row], key: str) -> list[Row]:
    """In order of a number in their context."""
    return sorted(rows, key=lambda row: row.result.context[key])
