"""How large a study may be so that it takes the time it is given: the model is timed, and lengths and texts are chosen.

Texts of two lengths are timed, and others are taken to need what is the same for all, and time in proportion to the
model's work on them. In a small model most of it is the same for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anchorctx.evals.distribute import rank_and_size
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision.config import Arithmetic, StudyConfig
from anchorctx.evals.evaluators.precision.measure import Instrument, Texts, shares_states
from anchorctx.evals.evaluators.precision.units import Setting, read_text
from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout

LONGEST = 32_768
"""Tokens: the longest row unless `lengths` says otherwise."""
SHORTEST = 16
"""Tokens of a row, at least."""
SMALLEST = 512
"""Tokens of the longest row, at least: what a shift does in shorter ones says little."""
TEXTS = (4, 3)
"""Texts unless `texts` says otherwise; 3 where 4 take too long. An interval over 2 would be four times as wide."""
TIMED, ENOUGH = 256, 2.0
"""Tokens of the first text that is timed, and seconds: doubled once, and on until one takes as long."""
COST_SHARE = 0.2
"""Part of the time that may go to timing training steps."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is chosen."""

    lengths: tuple[int, ...]
    """Tokens, rising."""
    texts: int

    def __str__(self) -> str:
        lengths = ", ".join(f"{length:,}" for length in self.lengths)
        return f"rows of {lengths} tokens, {self.texts} texts"


@dataclass(frozen=True, slots=True)
class Speed:
    """How long reading one text takes, under all shifts."""

    flops: ModelFlops
    """What the model costs by length."""
    bfloat16: tuple[float, float]
    """Seconds for any text, and for each FLOP that a training step over it would take, with either rotation."""
    float32: tuple[float, float]

    def text(self, arithmetic: Arithmetic, length: int) -> float:
        """Seconds for one text of `length` tokens."""
        fixed, second = self.float32 if arithmetic is Arithmetic.float32 else self.bfloat16
        return fixed + second * self.flops.step([PackedLayout((0, length))])

    def study(self, config: StudyConfig, size: Size) -> float:
        """Seconds for a whole study, loading left out."""
        # Of the longest, dropped (a third of the passes) and packed (all).
        again = 1 / 3 + config.packed
        once = sum(
            sum(self.text(arithmetic, length) for length in size.lengths)
            + again * self.text(arithmetic, size.lengths[-1])
            for arithmetic in config.arithmetics
        )
        texts = math.ceil(size.texts / rank_and_size()[1])
        return once * texts * (1 + config.control) / (1 - COST_SHARE * config.cost)


def choose(config: StudyConfig, reach: int, speed: Speed) -> Size:
    """The largest study of at most `budget_minutes`, or the smallest there is, for a model that reaches `reach`."""
    size = None
    for size in sizes(config, reach):
        if speed.study(config, size) <= 60 * config.budget_minutes:
            break
    assert size is not None
    return size


def sizes(config: StudyConfig, reach: int) -> Iterator[Size]:
    """What `lengths` and `texts` leave open, the largest first: four lengths, of which the longest is halved."""
    longest = min(reach, LONGEST)
    lengths = [tuple(sorted(set(config.lengths)))] if config.lengths else []
    while not lengths or (not config.lengths and longest // 2 >= SMALLEST):
        # 8,192: 1024 2048 4096 8192, then 512 1024 2048 4096 ...
        longest = longest // 2 if lengths else longest
        lengths.append(tuple(longest // part for part in (8, 4, 2, 1)))
    for some in lengths:
        for texts in TEXTS if config.texts is None else (config.texts,):
            yield Size(some, texts)


def measure(checkpoint: models.Checkpoint, config: StudyConfig, setting: Setting, texts: Texts, seed: int) -> Speed:
    """Time the checkpoint on single texts, in bfloat16 and in float32."""
    model = models.load(checkpoint, models.Weights.trained, Arithmetic.bfloat16, seed)
    flops, shared = ModelFlops.of(model), shares_states(model)
    emulated = models.emulates(config.emulate, checkpoint.device)

    def seconds(tool: Instrument) -> tuple[float, float]:
        longest, length = setting.lengths[-1], min(TIMED, setting.lengths[-1])
        read_text(tool, setting, texts.rows(SHORTEST, 1)[0])  # warms up
        timed: list[tuple[float, float]] = []
        while not timed or (length <= longest and (len(timed) == 1 or timed[-1][1] < ENOUGH)):
            row, start = texts.rows(length, 1)[0], time.perf_counter()
            read_text(tool, setting, row)
            timed.append((flops.step([PackedLayout((0, length))]), time.perf_counter() - start))
            length *= 2
        return line(timed)

    bfloat16 = seconds(Instrument(model, setting.layers, config.rows_per_pass, emulated, shared))
    float32 = seconds(Instrument(model.float(), setting.layers, config.rows_per_pass, False, shared))
    return Speed(flops, bfloat16, float32)


def line(timed: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds that are the same for all, and seconds for a FLOP, through the first and the last of (FLOPs, seconds)."""
    (work, first), (more, last) = timed[0], timed[-1]
    slope = (last - first) / (more - work) if more > work else last / more
    # Timings are noisy: neither part is negative, and the last, the longest, is met in any case.
    slope = min(max(slope, 0.0), last / more)
    return last - slope * more, slope
