"""The table of `anchorctx eval`; also `-m anchorctx.cli.eval`, which goes on working until 0.2."""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.cli.main import former_entry
from anchorctx.records.results import Result
from anchorctx.records.table import text_table


def table(rows: Sequence[Result]) -> list[str]:
    """A line for every number, a column for every model; each with half its 95 % interval."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(_what(row), {})[row.model] = _cell(row)
    lines = ([what, *(line.get(model, "") for model in models)] for what, line in cells.items())
    return text_table([["", *models], *lines], "<>")


def _what(row: Result) -> str:
    return " ".join([row.metric, *map(str, row.where.values())]) + ("" if row.unit == "1" else f" ({row.unit})")


def _cell(row: Result) -> str:
    if row.low is None or row.high is None:
        return f"{row.value:.4g}"
    return f"{row.value:.4g} ± {(row.high - row.low) / 2:.2g}"


if __name__ == "__main__":
    former_entry("eval")
