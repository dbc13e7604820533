"""The table of `anchorctx eval`; also `-m anchorctx.cli.eval`, which goes on working until 0.2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anchorctx.cli.main import former_entry
from anchorctx.records.results import Result


def table(rows: Sequence[Result]) -> Iterator[str]:
    """A line for every number, a column for every model; each with half its 95 % interval."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(_what(row), {})[row.model] = _cell(row)
    first = max(map(len, cells), default=0)
    widths = [max([len(model), *(len(line.get(model, "")) for line in cells.values())]) for model in models]
    yield "  ".join([" " * first, *(f"{model:>{width}}" for model, width in zip(models, widths, strict=True))])
    for what, line in cells.items():
        yield "  ".join([f"{what:<{first}}", *(f"{line.get(m, ''):>{w}}" for m, w in zip(models, widths, strict=True))])


def _what(row: Result) -> str:
    return " ".join([row.metric, *map(str, row.where.values())]) + ("" if row.unit == "1" else f" ({row.unit})")


def _cell(row: Result) -> str:
    if row.low is None or row.high is None:
        return f"{row.value:.4g}"
    return f"{row.value:.4g} ± {(row.high - row.low) / 2:.2g}"


if __name__ == "__main__":
    former_entry("eval")
