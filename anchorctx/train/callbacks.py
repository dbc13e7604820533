"""Where a run's numbers go: `metrics.jsonl` always, a progress bar, and Weights & Biases when asked.

Names are grouped the way W&B draws them (train/, val/, eval/, perf/, memory/, data/), with `tokens`, the tokens trained
so far, as the x axis of all.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.records.files import write_bytes
from anchorctx.train.config import LoggingConfig

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
        path = out_dir / METRICS
        # A run killed after step 7, whose checkpoint is of step 5, computes 6 and 7 again: their rows go.
        kept = [line for line in _lines(path) if resumed_step and json.loads(line)["step"] <= resumed_step]
        write_bytes(path, "".join(kept).encode())
        self._file = path.open("a")

    def log(self, row: dict[str, float]) -> None:
        """Write the row at once, so that a killed run keeps it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


class Wandb:
    """Sends rows to Weights & Biases; a resumed run continues the same W&B run."""

    def __init__(self, out_dir: Path, config: LoggingConfig, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb={config.wandb.value} needs wandb: pip install 'anchorctx[wandb]'"
            ) from error
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or out_dir.name,
                id=_run_id(out_dir, lambda: secrets.token_hex(4)),
                resume="allow",
                mode=config.wandb.value,
                dir=str(out_dir),
                config=settings,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise UserError(
                f"logging.wandb={config.wandb.value} cannot start ({reason}): run `wandb login`, or set "
                "logging.wandb=offline and upload later with `wandb sync`"
            ) from error
        self._run.define_metric("tokens")
        for group in ("train", "val", "eval", "perf", "memory", "data"):
            self._run.define_metric(f"{group}/*", step_metric="tokens")

    def log(self, row: dict[str, float]) -> None:
        """Send one row. W&B's own step is left alone: it would drop the rows that a resumed run computes again."""
        self._run.log(row)

    def close(self) -> None:
        """Flush and mark the W&B run finished."""
        self._run.finish()


def _run_id(out_dir: Path, generate: Any) -> str:
    """The W&B run's id, kept in the run's folder for the next start."""
    path = out_dir / "wandb_run_id"
    if not path.exists():
        write_bytes(path, generate().encode())
    return path.read_text().strip()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may be missing or end in half a line."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
