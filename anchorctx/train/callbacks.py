"""Where a run's numbers go: `metrics.jsonl` and a progress bar; dashboards, when asked, are in `train.dashboards`.

Names are grouped the way dashboards draw them: train/, val/, eval/, perf/, memory/, data/.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.records.disk import Writing
from anchorctx.records.files import append_bytes, write_bytes

METRICS = "metrics.jsonl"


class Callback(Protocol):
    """Receives every row of metrics, on the main process only."""

    def log(self, row: dict[str, float]) -> None:
        """Take one row; it always has `step` and `tokens`."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class Probe(Protocol):
    """Measures the live model every so many steps; unlike a `Callback`, on every process."""

    every: int
    """Steps between measurements, which are also made before the first step and after the last; 0 is never."""

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError when the model cannot be measured so; called before anything is written."""
        ...

    def measure(self, root: torch.nn.Module, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
        """Metrics of `model`, in evaluation mode, the same on every process.

        `root` is the engine's module, of which `model` is a part. The engine gathers parameters around its call.
        """
        ...


class JsonlMetrics:
    """Appends rows to `metrics.jsonl`; on a resume first drops the rows that are to be computed again."""

    def __init__(self, out_dir: Path, resumed_step: int) -> None:
        self._path = out_dir / METRICS
        self._writing = Writing("metrics", out_dir, intact="the complete checkpoints are intact")
        # A run killed after step 7, whose checkpoint is of step 5, computes 6 and 7 again: their rows go.
        kept = [line for line in _lines(self._path) if resumed_step and _step(line) <= resumed_step]
        with self._writing:
            write_bytes(self._path, b"".join(kept))

    def log(self, row: dict[str, float]) -> None:
        """Write the row at once, so that a killed run keeps it; DiskError where it does not fit, and nothing of it."""
        with self._writing:
            append_bytes(self._path, f"{json.dumps(row)}\n".encode(), sync=False)  # a checkpoint has what must last

    def close(self) -> None:
        """Nothing is left to write."""


class ProgressBar:
    """Steps done, rate and time left, with the loss beside."""

    def __init__(self, steps: int, start: int) -> None:
        self._bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True)

    def log(self, row: dict[str, float]) -> None:
        """Move to the row's step."""
        # rows may come every n-th step only
        self._bar.update(int(row["step"]) - self._bar.n)
        shown = {"loss": row.get("train/loss"), "val": row.get("val/loss"), "tok/s": row.get("perf/tokens_per_second")}
        known = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
        if known:
            self._bar.set_postfix(known)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()


def _lines(path: Path) -> list[bytes]:
    """Whole lines of a file that may be missing or end in half a line."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


def _step(line: bytes) -> float:
    """The step of a row; infinite for a line that damage made none of, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
