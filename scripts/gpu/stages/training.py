"""Steps of the package's own `Trainer`, one setting after the other in one process.

`anchorctx train` would do the same steps, and take a minute more for each setting: it starts a process, draws a new
model's weights on the CPU, and writes a checkpoint (14 bytes a weight, 17 GB here) after the last step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from anchorctx.config import resolve
from anchorctx.parallel import dist
from anchorctx.train.loop import Trainer
from stages.stage import free_memory

Metrics = dict[str, float]
Enough = Callable[[Sequence[Metrics]], bool]
"""Says of the steps so far whether they are all."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What some steps of one setting took."""

    steps: list[Metrics]
    """Each step's metrics, as in `metrics.jsonl`."""
    before: Metrics
    """Of the validation set; empty without one."""
    after: Metrics
    setup_seconds: float
    """Until the first step: reading the weights, building the engine."""
    left_over: int
    """Bytes on the card before it began, which the peak is not to have in it."""

    def figures(self) -> dict[str, float]:
        """Medians over the steps after the first, which loads kernels and grows the allocator."""
        seconds = [row["perf/step_seconds"] for row in self.steps]
        settled = statistics.median(seconds[1:] or seconds)
        last = self.steps[-1]
        tokens = last["perf/tokens_per_second"] * last["perf/step_seconds"]
        found: dict[str, float] = {"steps": len(seconds), "step, s": settled, "tokens/s": tokens / settled}
        if "perf/mfu" in last:
            per_step = [row["perf/mfu"] * row["perf/step_seconds"] for row in self.steps]
            found["MFU"] = statistics.median(per_step) / settled
        found["peak, GiB"] = max(row["memory/peak_gib"] for row in self.steps) - self.left_over / 2**30
        saved = last["perf/attention_flops_saved"]
        return found | {"first step, s": seconds[0], "set-up, s": self.setup_seconds, "attention saved": saved}


def train(settings: dict[str, object], enough: Enough) -> Trained:
    """Train with the settings of `anchorctx train` until `enough` says so of the steps so far; validate around it.

    What earlier settings left is freed before, so that the peak is this setting's own.
    """
    free_memory()
    left_over = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    began = time.perf_counter()
    config = resolve("train", [f"{key}={value}" for key, value in settings.items()])
    config.validate()
    trainer = Trainer(config, dist.start(config.parallel.timeout_s))
    setup = time.perf_counter() - began
    steps: list[Metrics] = []
    try:
        before = trainer.validate()
        trainer.meter.go()
        while trainer.step < config.steps and not enough(steps):
            steps.append(trainer.train_step())
        return Trained(steps, before, trainer.validate(), setup, left_over)
    finally:
        for callback in trainer.callbacks:
            callback.close()
        trainer.engine.destroy()  # its hooks would keep the weights
