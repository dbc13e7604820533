"""What `rope_dtype=float32` costs: whole training steps with either rotation, timed in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.interface import implementation, register
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.evals.evaluators.precision.rows import interval_half
from anchorctx.evals.evaluators.precision.texts import TextRow
from anchorctx.layout import Pattern
from anchorctx.records.results import Result

PAIRS = 8
"""Pairs of steps that are timed, after one of each that is not."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each timed step, paired."""

    bfloat16: list[float]
    float32: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """float32's time over bfloat16's, with its 95 % interval, from the pairs' logarithms."""
        logs = [math.log(b / a) for a, b in zip(self.bfloat16, self.float32, strict=True)]
        mean, half = statistics.fmean(logs), interval_half(logs) or 0.0
        return math.exp(mean), math.exp(mean - half), math.exp(mean + half)

    def rows(self, context: dict[str, object]) -> Iterator[Result]:
        """Median seconds with either rotation, and the ratio."""
        for name, seconds in (("bfloat16", self.bfloat16), ("float32", self.float32)):
            at = context | {"rope_dtype": name}
            yield Result(
                metric="precision_step_seconds", value=statistics.median(seconds), unit="s", n=len(seconds), context=at
            )
        value, low, high = self.ratio()
        yield Result(
            metric="precision_cost", value=value, unit="1", n=len(self.float32), low=low, high=high, context=context
        )


def time_steps(model: PreTrainedModel, row: TextRow, pairs: int = PAIRS) -> Timings:
    """Forward and backward of one packed row of a bfloat16 `model` under AnchorAttention, with either rotation."""
    register()
    model.set_attn_implementation(implementation())
    step = _step(model, row)
    seconds: dict[RopeDtype, list[float]] = {RopeDtype.bfloat16: [], RopeDtype.float32: []}
    for pair in range(pairs + 1):
        for dtype in sorted(seconds, reverse=bool(pair % 2)):  # who goes first changes, so that no order is favoured
            set_rope_dtype(model, dtype)
            seconds[dtype].append(step())
    return Timings(seconds[RopeDtype.bfloat16][1:], seconds[RopeDtype.float32][1:])


def _step(model: PreTrainedModel, row: TextRow) -> Callable[[], float]:
    layout = Pattern.anchor.apply(row.layout)
    ids = torch.from_numpy(row.ids)[None].to(model.device)
    cuda = model.device.type == "cuda"

    def step() -> float:
        if cuda:
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        hidden = model.base_model(
            input_ids=ids,
            position_ids=layout.position_ids(model.device)[None],
            layouts=(layout,),
            use_cache=False,
        ).last_hidden_state
        hidden.float().square().mean().backward()
        if cuda:
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    return step
