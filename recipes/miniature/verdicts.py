"""What the seeds say about a claim: mean, Student's interval, and one of three answers (see HYPOTHESES.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain.verdict import answer

from anchorctx.errors import UserError
from anchorctx.records.results import Result, mean_interval, read_results

LEAST = 3
"""Seeds without which nothing is decided."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        """Of the seeds; nan without any."""
        return statistics.fmean(self.values) if self.values else float("nan")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % (Student's t); None for fewer than two seeds."""
        return mean_interval(self.values)

    def answer(self, margin: float) -> str:
        """Whether an effect of at least `margin` in the direction claimed is there.

        `supported`: the interval is above 0 and the mean at least `margin`. `not supported`: the interval is below
        `margin`, or below 0. `undecided`: anything else, and fewer than three seeds.
        """
        known = len(self.values) >= LEAST and self.interval is not None
        return answer(self.mean, self.interval if known else None, margin)


class Rows:
    """The result rows of all seeds."""

    def __init__(self, by_seed: dict[int, list[Result]]) -> None:
        self._by_seed = by_seed

    @classmethod
    def of(cls, out: Path, seeds: Iterable[int]) -> Rows:
        """Read every results.jsonl below the seeds' folders."""
        return cls({s: [r for f in sorted((out / f"seed_{s}").rglob("results.jsonl")) for r in read_results(f)]
                    for s in seeds})  # fmt: skip

    @property
    def seeds(self) -> list[int]:
        """All seeds, those without rows too."""
        return list(self._by_seed)

    def all(self, metric: str) -> list[Result]:
        """Of every seed."""
        return [row for rows in self._by_seed.values() for row in rows if row.metric == metric]

    def row(self, seed: int, metric: str, **context: Any) -> Result:
        """The one row whose context has all of `context` (None: has no such key).

        Raises KeyError when it was not measured, UserError when several rows fit.
        """
        found = self._fitting(seed, metric, context)
        if not found:
            raise KeyError(f"no row of {metric} with {context} for seed {seed}")
        if len(found) > 1:
            raise UserError(
                f"seed {seed} has {len(found)} rows of {metric} with {context}, where there should be one: move "
                "what no stage of this recipe wrote out of the folder"
            )
        return found[0]

    def longest(self, seed: int, metric: str, **context: Any) -> float:
        """The value of the one row of the greatest `length` among those that fit; see `row`."""
        lengths = [row.context["length"] for row in self._fitting(seed, metric, context)]
        return self.value(seed, metric, length=max(lengths, default=None), **context)

    def _fitting(self, seed: int, metric: str, context: Mapping[str, Any]) -> list[Result]:
        rows = (row for row in self._by_seed[seed] if row.metric == metric)
        return [row for row in rows if all(row.context.get(key) == value for key, value in context.items())]

    def value(self, seed: int, metric: str, **context: Any) -> float:
        """See `row`."""
        return self.row(seed, metric, **context).value

    def estimate(self, metric: str, **context: Any) -> Estimate:
        """Over the seeds that have it."""
        return estimate(self.seeds, lambda seed: self.value(seed, metric, **context))


def estimate(seeds: Sequence[int], measure: Any) -> Estimate:
    """`measure(seed)` over the seeds for which everything that it needs was measured."""
    values = []
    for seed in seeds:
        try:
            values.append(float(measure(seed)))
        except KeyError:
            continue
    return Estimate(tuple(values))
