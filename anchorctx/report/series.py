"""Result rows by model, each series of one manifest: a line or a table never mixes different runs of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from anchorctx.errors import UserError
from anchorctx.records.results import FILE, Result, Rows
from anchorctx.report.collect import Row

Series = dict[str, Rows]
"""Rows by model, in order of appearance."""


def by_model(rows: Iterable[Row], metric: str, wanted: Callable[[Result], bool] = lambda _: True) -> Series:
    """The wanted rows of `metric`, by model; of a number that was measured twice, the later row.

    Raises UserError when a model's rows come from different manifests.
    """
    chosen = [row for row in rows if row.result.metric == metric and wanted(row.result)]
    return _series(chosen, f"{metric} of")


def whole_evaluation(rows: Iterable[Row], prefix: str, name: str) -> Series:
    """Every row whose metric begins with `prefix`, by model, for sections about one evaluation.

    `name` says what it is in the UserError that is raised when a model's rows come from different manifests.
    """
    return _series([row for row in rows if row.result.metric.startswith(prefix)], f"{name} of")


def _series(rows: Sequence[Row], what: str) -> Series:
    # By the report's names of models, which differ from the rows' where two folders use one label.
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    # Before `latest`, which would drop the older of two manifests' rows and hide that they were mixed.
    for model, mine in found.items():
        _check_one_manifest(mine, f"{what} {model}")
    return {model: Rows(row.result for row in mine).latest() for model, mine in found.items()}


def _check_one_manifest(rows: Sequence[Row], name: str) -> None:
    first: dict[str, Row] = {}  # of each manifest, a row to name its file by
    for row in rows:
        first.setdefault(row.result.manifest, row)
    if len(first) > 1:
        places = " and ".join(f"{hash or 'none'} ({row.place.path / FILE})" for hash, row in first.items())
        raise UserError(
            f"{name} has rows of different manifests, {places}, which must not be one series: give one evaluation "
            "another label=, evaluate again into a new folder, delete the older rows, or report only one folder"
        )
