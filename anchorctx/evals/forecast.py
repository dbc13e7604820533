"""How long an evaluation will take, by its first pieces of work: said while it runs, or by a dry run instead of it.

The first piece has loading and warming up in it, many times its own length in a small model or a slow start. So the
second is what is timed, where there is one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from anchorctx.evals.base import Unit
from anchorctx.evals.distribute import rank_and_size

logger = logging.getLogger(__name__)

WORTH_SAYING = 20.0
"""Seconds: what is over sooner is not announced."""


class MeasuredError(Exception):
    """Ends a unit of a dry run after its first pieces."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the first pieces of an evaluation of a model say about all of it."""

    what: str
    """Evaluation and model."""
    seconds: float
    """For all units that are still to be measured, from the beginning of the first."""
    first: str
    """What was done by then: `8,192 of 240,000 tok`."""

    def __str__(self) -> str:
        return f"{self.what}: about {duration(self.seconds)}, by the first {self.first}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Bar:
    """Tokens (or requests) done of one model under one evaluation, with rate and time left, on the first process only.

    A unit's total is known once it runs; those of later units are estimated from their lengths. The second progress
    makes the forecast, which is logged; a dry run ends there with `MeasuredError`.
    """

    def __init__(
        self,
        what: str,
        counts: str,
        units: Sequence[Unit],
        *,
        sizes: Sequence[int] | None = None,
        dry_run: bool = False,
    ) -> None:
        """`sizes` are the units' totals where they are known beforehand."""
        self._later = None if sizes is None else list(sizes)
        self.forecast: Forecast | None = None
        self._what, self._counts, self._dry_run = what, counts, dry_run
        self._lengths = sum(map(_length, units))
        self._tokens = self._done = self._current = self._total = 0
        self._begun = time.monotonic()
        self._first: tuple[float, int] | None = None  # seconds of the first piece, and what it did
        hidden = dry_run or rank_and_size()[0] > 0
        self._bar = tqdm(unit=counts, unit_scale=True, desc=what, dynamic_ncols=True, disable=hidden)

    def start(self, unit: Unit) -> None:
        """Begin a unit; the one before, if any, is done."""
        self._tokens, self._done = self._tokens + self._total, self._done + self._current
        self._current, self._total = _length(unit), 0
        if self._later is not None:
            self._later.pop(0)
        if self.forecast is None and self._first is None:
            self._begun = time.monotonic()

    def advance(self, done: int, total: int) -> None:
        """Progress of the evaluator within the unit."""
        self._total = total
        # Units of 512 and 2,048 tokens: when the first turns out to have 10,000 tokens to do, the whole is put at
        # 10,000 * 2,560 / 512 = 50,000.
        whole = round((self._tokens + total) * self._lengths / (self._done + self._current))
        if self._later is not None:
            whole = self._tokens + total + sum(self._later)
        self._bar.total = whole
        self._bar.update(done)
        if self.forecast is None:
            self._forecast(done, whole)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()

    def settle(self) -> Forecast | None:
        """The forecast, by the first piece alone where there was no second; None where nothing was done."""
        if self.forecast is None and self._first is not None:
            seconds, done = self._first
            self.forecast = Forecast(self._what, seconds, f"{done:,} of {done:,} {self._counts}")
        return self.forecast

    def _forecast(self, done: int, whole: int) -> None:
        now = time.monotonic()
        # Several processes end a dry run together: lm-eval may give one of them a single piece.
        at_once = self._dry_run and rank_and_size()[1] > 1
        if self._first is None and done < whole and not at_once:
            self._first, self._begun = (now - self._begun, done), now
            return
        before, earlier = self._first or (0.0, 0)
        # of 50 tokens the first 10 took 9 s, the next 20 took 4: 9 + 4 * 40 / 20
        seconds = before + (now - self._begun) * (whole - earlier) / max(done, 1)
        self.forecast = Forecast(self._what, seconds, f"{earlier + done:,} of {whole:,} {self._counts}")
        if self._dry_run:
            raise MeasuredError
        if seconds >= WORTH_SAYING:
            self._bar.clear()
            logger.info("%s", self.forecast)


def _length(unit: Unit) -> int:
    return int(unit.get("length") or unit.get("context_length") or 1)
