"""Weights & Biases and TensorBoard: a run's rows of metrics, with the tokens trained so far as the x axis of all.

`metrics.jsonl` is the record. A dashboard is a view of it, and is told all of it whenever it does not have it: a
resumed run is one curve there, without the rows that were computed again.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.files import write_bytes
from anchorctx.records.wandb_run import WandbMode, check_wandb, start_wandb
from anchorctx.train.callbacks import METRICS, Callback
from anchorctx.train.config import LoggingConfig

GROUPS = ("train", "val", "eval", "perf", "memory", "data")
"""What names of metrics begin with."""
LEAST = ("train/loss", "val/loss", "val/perplexity")
"""Metrics of which the run's least value is shown beside its last."""


def check_dashboards(config: LoggingConfig) -> None:
    """UserError when a package of those that `config` asks for is missing."""
    check_wandb(config.wandb, "logging.wandb")
    try:
        if config.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("logging.tensorboard=true needs it: pip install 'anchorctx[tensorboard]'") from error


def dashboards(out_dir: Path, config: LoggingConfig, settings: dict[str, Any], facts: dict[str, Any]) -> list[Callback]:
    """Those that `config` asks for, with the rows that `metrics.jsonl` already has.

    Args:
        out_dir: the run's folder.
        config: which, and what they are told about the run.
        settings: its configuration.
        facts: what else is known of it beforehand, such as the number of parameters.

    Raises:
        UserError: W&B does not start.
    """
    found: list[Callback] = []
    if config.wandb is not WandbMode.disabled:
        found.append(Wandb(out_dir, config, settings, facts))
    if config.tensorboard:
        found.append(TensorBoard(out_dir, settings, facts))
    return found


class Wandb:
    """Sends rows to Weights & Biases; a resumed run continues the same W&B run."""

    def __init__(self, out_dir: Path, config: LoggingConfig, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        self._run = start_wandb(
            config.wandb,
            "logging.wandb",
            entity=config.entity,
            project=config.project,
            name=config.name or out_dir.name,
            group=config.group,
            tags=list(config.tags),
            notes=config.notes,
            id=_run_id(out_dir),
            resume="allow",
            dir=str(out_dir),
            config=settings | {"run": facts},
        )
        self._run.define_metric("tokens")
        for group in GROUPS:
            self._run.define_metric(f"{group}/*", step_metric="tokens")
        for name in LEAST:
            self._run.define_metric(name, step_metric="tokens", summary="min,last")
        # Not if the server has the run: `resumed`. Offline that is never so, and an upload of this folder replaces what
        # an earlier one's has brought.
        if not self._run.resumed:
            for row in _rows(out_dir):
                self.log(row)

    def log(self, row: dict[str, float]) -> None:
        """Send one row. W&B's own step is left alone: it would drop the rows that a resumed run computes again."""
        self._run.log(row)

    def close(self) -> None:
        """Flush and mark the W&B run finished."""
        self._run.finish()


class TensorBoard:
    """Writes rows as TensorBoard's scalars to `out_dir/tensorboard`."""

    def __init__(self, out_dir: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)  # an earlier start's: `metrics.jsonl` has all that still holds
        self._writer = SummaryWriter(folder)
        for name, value in (("settings", settings), ("run", facts)):
            # four spaces make it a block of code
            self._writer.add_text(name, "    " + json.dumps(value, indent=1, default=str).replace("\n", "\n    "))
        for row in _rows(out_dir):
            self.log(row)

    def log(self, row: dict[str, float]) -> None:
        """Write one row, and flush it, so that a killed run keeps it."""
        for name, value in row.items():
            if name != "tokens":
                self._writer.add_scalar(name, value, int(row["tokens"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _run_id(out_dir: Path) -> str:
    """The W&B run's id, kept in the run's folder for the next start."""
    path = out_dir / "wandb_run_id"
    if not path.exists():
        write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def _rows(out_dir: Path) -> list[dict[str, float]]:
    """What `metrics.jsonl` has, which `JsonlMetrics` has put in order."""
    path = out_dir / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
