"""What the seeds say about a claim: mean, Student's interval, and one of three answers (see HYPOTHESES.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.results import Result, mean_interval, read_results

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
        if len(self.values) < LEAST or self.interval is None:
            return "undecided"
        low, high = self.interval
        if low > 0 and self.mean >= margin:
            return "supported"
        return "not supported" if high < margin or high < 0 else "undecided"


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

    def row(self, seed: int, metric: str, **context: Any) -> Result:
        """The one row whose context has all of `context`; KeyError when it was not measured."""
        wanted = context.items()
        found = [r for r in self._by_seed[seed] if r.metric == metric and wanted <= plain(r.context).items()]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows of {metric} with {context} for seed {seed}")
        return found[0]

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


def plain(context: dict[str, Any]) -> dict[str, Any]:
    """The part of a context that can be compared by value."""
    return {key: value for key, value in context.items() if not isinstance(value, list | dict)}
