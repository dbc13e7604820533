"""Tables, verdicts and pictures of a miniature's folder, from the rows that its stages wrote.

    python recipes/miniature/summary.py RECIPE.yaml OUT

Writes OUT/summary/tables.md, results.jsonl (means over seeds, one row a claim), *.png, and prints the tables. Whatever
was not measured yet is left out, so it can be run at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chain.claims_figure import claims_figure
from claims import CLAIMS
from figures import reuse_figure, trained_figure
from recipe import read_recipe, seeds_of
from tables import by_length, depth, precision, reuse, ruler, shown, speed, table, training, variation
from verdicts import Estimate, Rows

from anchorctx.errors import UserError
from anchorctx.records.manifest import build_manifest, read_json, write_manifest
from anchorctx.records.results import FILE, Result, append_results, read_results

FIGURES = {"mean_retrieval_accuracy": trained_figure, "mean_kvcomm_kl": reuse_figure, "claim": claims_figure}
"""What is drawn where rows of a metric are there."""
SAVED = 0.2
"""S1: part of a step's time."""


class Summary:
    """What one folder holds."""

    def __init__(self, recipe: dict[str, Any], out: Path) -> None:
        self.recipe, self.rows, self.out = recipe, Rows.of(out, seeds_of(recipe)), out
        self.results: list[Result] = []

    def mean(self, metric: str, **context: Any) -> Estimate:
        """Over seeds, and remembered as a result row."""
        found = self.rows.estimate(metric, **context)
        if found.values:
            low, high = found.interval or (None, None)
            options: dict[str, Any] = {"low": low, "high": high, "context": context | {"values": list(found.values)}}
            self.results.append(
                Result(metric=f"mean_{metric}", value=found.mean, unit="1", n=len(found.values), **options)
            )
        return found

    def tables(self) -> Iterator[str]:
        """One after the other."""
        yield self._claims()
        for make in (speed, training, by_length, depth, precision, reuse, variation, ruler):
            yield make(self)
        yield self._time()

    def _claims(self) -> str:
        lines = []
        for claim in CLAIMS:
            found = claim.estimate(self.rows)
            low, high = found.interval or (None, None)
            answer = found.answer(claim.margin)
            if found.values:
                context = {"claim": claim.name, "answer": answer, "margin": claim.margin, "values": list(found.values)}
                options: dict[str, Any] = {"low": low, "high": high, "context": context}
                self.results.append(Result(metric="claim", value=found.mean, unit="1", n=len(found.values), **options))
            cell = shown(found) or "not measured"
            lines.append([claim.name, claim.says, cell, f"{claim.margin:.3f}", str(len(found.values)), answer])
        return table("Claims", ["", "claim", "effect (95 %)", "margin", "seeds", "answer"], lines)

    def timed(self, metric: str) -> list[Result]:
        """Rows of speed.py."""
        path = self.out / "speed" / FILE
        return [row for row in read_results(path) if row.metric == metric] if path.is_file() else []

    def judge_saving(self, row: Result) -> None:
        """S1 of HYPOTHESES.md: supported where the interval is above a fifth, not supported where it is below."""
        low, high = row.low, row.high
        answer = "undecided"  # also for a single turn, which has no interval
        if low is not None and high is not None:
            answer = "supported" if low > SAVED else "not supported" if high < SAVED else answer
        context = {"claim": f"S1 at {row.context['length']:,}", "answer": answer, "margin": SAVED}
        context["values"] = [row.value]
        self.results.append(dataclasses.replace(row, metric="claim", context=context))

    def _time(self) -> str:
        kinds: dict[str, list[float]] = {}
        for path in sorted((self.out / "done").glob("*.json")):
            kinds.setdefault(path.name.split(".")[0], []).append(read_json(path)["seconds"])
        lines = [
            [kind, str(len(s)), f"{min(s):.0f} to {max(s):.0f}", f"{sum(s) / 60:.1f}"] for kind, s in kinds.items()
        ]
        return table("Time", ["stage", "number", "seconds each, on one core", "minutes in all"], lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file of the recipe")
    parser.add_argument("out", type=Path, help="folder of the run")
    options = parser.parse_args(arguments)
    try:
        if not options.out.is_dir():
            raise UserError(f"{options.out} is no folder: give one that run.py has filled")
        recipe = read_recipe(options.recipe)
        summary, folder = Summary(recipe, options.out), options.out / "summary"
        text = "".join(summary.tables()).lstrip()
    except UserError as error:
        parser.error(str(error))
    stamp = write_manifest(folder, build_manifest("miniature", recipe))
    (folder / FILE).unlink(missing_ok=True)
    append_results(folder / FILE, [dataclasses.replace(row, manifest=stamp) for row in summary.results])
    (folder / "tables.md").write_text(text)
    measured = {row.metric for row in summary.results}
    for metric, draw in FIGURES.items():
        if metric in measured:
            draw(summary.results, folder)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
