"""Compare a fresh run's figures with a recipe's expected.json; exit status 1 when one is outside its tolerance.

    python scripts/check_recipe.py recipes/quickstart/expected.json runs/quickstart/eval
    python scripts/check_recipe.py recipes/miniature/expected.json runs/miniature/summary

A figure names its `metric` and as much of a result row's context as tells it apart (null: the row does not have that
key), and either `value` and `tolerance`, or `at_least`, or `at_most`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.results import FILE, Result, read_results

BOUNDS = ("value", "tolerance", "at_least", "at_most")


def verdict(figure: dict[str, Any], rows: Sequence[Result]) -> tuple[bool, str]:
    """Does the one row that the figure names keep it, and a sentence that says so."""
    wanted = {key: value for key, value in figure.items() if key not in ("metric", *BOUNDS)}
    found = [r for r in rows if r.metric == figure["metric"] and all(r.context.get(k) == v for k, v in wanted.items())]
    name = " ".join([figure["metric"], *(f"{k}={v}" for k, v in wanted.items() if v is not None)])
    if len(found) != 1:
        return False, f"{name}: {len(found)} rows, where there should be one"
    low, high = bounds(figure)
    value = found[0].value
    right = low <= value <= high  # nan is neither
    return right, f"{name}: {value:.4g}, {'within' if right else 'OUTSIDE'} {low:.4g} to {high:.4g}"


def bounds(figure: dict[str, Any]) -> tuple[float, float]:
    """The least and the greatest value that are right; UserError when the figure says none, or no numbers."""
    given = {key: figure[key] for key in BOUNDS if key in figure}
    if not {"value", "at_least", "at_most"} & set(given) or ("value" in given) != ("tolerance" in given):
        raise UserError(f"the figure {figure} has no bounds: give value and tolerance, at_least, or at_most")
    for key, number in given.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise UserError(f"the figure {figure} has {key}={number}, which is no number: give one that a row can miss")
    middle, width = given.get("value"), given.get("tolerance", 0.0)
    low, high = (-math.inf, math.inf) if middle is None else (middle - width, middle + width)
    return max(low, given.get("at_least", -math.inf)), min(high, given.get("at_most", math.inf))


def read(expected: Path, results: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Result]]:
    """The figures, and the rows of all result files or folders that hold one."""
    try:
        figures = json.loads(expected.read_text())["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{expected} cannot be read ({error!r}): name a recipe's expected.json") from None
    if not figures:
        raise UserError(f"{expected} has no figures, so nothing would be compared: add some")
    for figure in figures:
        if not isinstance(figure, dict) or "metric" not in figure:
            raise UserError(
                f"{expected} has the figure {figure}, which names no metric: see the recipes' expected.json"
            )
    return figures, [row for p in results for row in read_results(p / FILE if p.is_dir() else p)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("expected", type=Path, help="a recipe's expected.json")
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl files, or folders that hold one")
    options = parser.parse_args(arguments)
    try:
        figures, rows = read(options.expected, options.results)
        found = [verdict(figure, rows) for figure in figures]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(sentence for _, sentence in found))
    wrong = sum(not right for right, _ in found)
    print(f"{len(found) - wrong} of {len(found)} figures are as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
