"""Numbers that a result may hold: JSON has neither NaN nor infinity, and no reader of results expects them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.results import Result


def checked(rows: Iterable[Result], label: str) -> Iterator[Result]:
    """The rows of model `label`; an interval that is not finite is left out, since None is one that is not known.

    Raises:
        UserError: a value is not finite. The weights are, so that its activations overflowed. It ends the evaluation,
            which goes on from there, because the other pieces of the same model would mostly come out alike.
    """
    for row in rows:
        wrong = next((number for number in _numbers([row.value, row.context]) if not math.isfinite(number)), None)
        if wrong is not None:
            where = f" at {json.dumps(row.where)}" if row.where else ""
            raise UserError(
                f"{row.metric} of {label}{where} came out as {wrong}, though the model's weights are finite: compute "
                "with dtype=float32, or name a model that reads such texts; what was measured before is kept"
            )
        known = all(end is None or math.isfinite(end) for end in (row.low, row.high))
        yield row if known else dataclasses.replace(row, low=None, high=None)


def exp(value: float) -> float:
    """e to the `value`; infinity, which `checked` refuses, instead of an OverflowError."""
    return math.exp(value) if value < 700 else math.inf


def _numbers(value: Any) -> Iterator[float]:
    """All floating-point numbers of a value of JSON."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
