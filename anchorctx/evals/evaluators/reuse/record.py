"""What one arm did on some problems, problem by problem and turn by turn; as JSON too, to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anchorctx.evals.evaluators.reuse.measures import Closeness, KvError


@dataclass(slots=True)
class Record:
    """What one arm did on some of a team's problems."""

    arm: str
    kind: str
    by_construction: bool
    closeness: list[list[Closeness]] = field(default_factory=list)
    """By problem and turn."""
    errors: list[KvError] = field(default_factory=list)
    """By turn with placeholders."""
    correct: list[bool] = field(default_factory=list)
    """By problem."""
    judged: dict[bool, list[bool]] = field(default_factory=lambda: {False: [], True: []})
    """By problem, in the agents' order (False) and in another (True): did the decision agent say what dense says?"""
    reused: list[bool] = field(default_factory=list)
    """By turn: all its contents."""
    tokens: list[tuple[int, int, int]] = field(default_factory=list)
    """By turn: prompt tokens, those computed with it, and those computed beside it."""
    contents: list[tuple[int, int, int]] = field(default_factory=list)
    """By turn: tokens of the fixed text in front, tokens of the contents, and how many of these were computed."""
    flops: list[tuple[float, float]] = field(default_factory=list)
    """By turn: dense, and spent with all hidden work."""
    ttft: list[dict[str, float]] = field(default_factory=list)
    """By problem: seconds by agent."""
    forecasts: list[list[Any]] = field(default_factory=list)
    """By turn, of an arm that predicts: [stage, expected and limit in nats, the greatest that is wanted]."""
    calibration: list[list[float]] = field(default_factory=list)
    """[expected, true] of what its predictions were fitted to, each left out in turn."""
    kept_bytes: int = 0
    """The most that the arm kept from one request to the next, in bytes."""


def to_json(record: Record) -> dict[str, Any]:
    """A record as plain JSON; `from_json` gives back the same to the bit."""
    found = {one.name: getattr(record, one.name) for one in dataclasses.fields(record)}
    found["closeness"] = [[[c.kl.tolist(), c.agree.tolist()] for c in turns] for turns in record.closeness]
    found["errors"] = [[error.relative.tolist(), error.cosine.tolist()] for error in record.errors]
    found["judged"] = [record.judged[shuffled] for shuffled in (False, True)]  # JSON's keys are words
    return found


def from_json(found: dict[str, Any]) -> Record:
    """The record that `to_json` was given."""
    closeness = [[Closeness(np.array(kl), np.array(agree, dtype=bool)) for kl, agree in p] for p in found["closeness"]]
    errors = [KvError(np.array(relative), np.array(cosine)) for relative, cosine in found["errors"]]
    judged = dict(zip((False, True), found["judged"], strict=True))
    return Record(**found | {"closeness": closeness, "errors": errors, "judged": judged})


def joined(records: Sequence[Record]) -> Record:
    """One record of all problems, from those of some each; new lists."""
    first, *rest = records
    whole = dataclasses.replace(first, judged={k: list(v) for k, v in first.judged.items()})
    for name in (one.name for one in dataclasses.fields(Record)):
        if isinstance(getattr(first, name), list):
            setattr(whole, name, [x for record in records for x in getattr(record, name)])
    for record in rest:
        for shuffled, said in record.judged.items():
            whole.judged[shuffled] += said
        whole.kept_bytes = max(whole.kept_bytes, record.kept_bytes)
    return whole
