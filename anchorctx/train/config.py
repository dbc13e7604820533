"""Everything that a training run, and its export, can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from anchorctx.errors import UserError
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig
from anchorctx.models.config import MemoryConfig
from anchorctx.parallel.config import ParallelConfig


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 100
    """Steps between checkpoints; the last step always writes one. 0 is only the last."""
    keep_last: int = 2
    """The newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 is none."""
    resume: str = "auto"
    """`auto` continues from the newest complete checkpoint in `out_dir`, `never` refuses a used `out_dir`, and a
    folder names one checkpoint."""

    def validate(self) -> None:
        """Raise UserError for values that would lose a checkpoint."""
        if self.every < 0 or self.keep_every < 0 or self.keep_last < 1:
            raise UserError(
                f"checkpoint.every={self.every} and keep_every={self.keep_every} must be at least 0 and "
                f"keep_last={self.keep_last} at least 1"
            )


class WandbMode(StrEnum):
    """Whether metrics also go to Weights & Biases."""

    disabled = "disabled"
    offline = "offline"
    """Into `out_dir/wandb`, without an account; `wandb sync` uploads it later. A resumed run writes a second folder
    with the same id: sync them in the order of their dates."""
    online = "online"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and how often."""

    every: int = 1
    """Steps between rows of metrics."""
    wandb: WandbMode = WandbMode.disabled
    """Weights & Biases: disabled, offline or online."""
    project: str = "anchorctx"
    """W&B project."""
    name: str | None = None
    """W&B run name; None is the name of `out_dir`."""


class Schedule(StrEnum):
    """The shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW; the defaults are the paper's (2411.13476, section 5.1)."""

    lr: float = 2e-5
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; vectors (norms, biases) are not decayed."""
    schedule: Schedule = Schedule.cosine
    """`constant`, or `cosine` down to `min_lr_ratio`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.1
    """The cosine's end as a share of `lr`."""
    clip: float = 1.0
    """Largest global gradient norm; 0 is no clipping."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        if self.lr <= 0 or self.weight_decay < 0 or self.clip < 0 or self.warmup_steps < 0:
            raise UserError(
                f"optim.lr={self.lr} must be positive, and weight_decay={self.weight_decay}, clip={self.clip} and "
                f"warmup_steps={self.warmup_steps} at least 0"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1), such as [0.9, 0.95]")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of the update that completes step `step` (from 0) out of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.schedule is Schedule.constant:
            return self.lr
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The packed sets that `anchorctx prepare` made."""

    train: str = "???"
    """Folder of the packed training set."""
    validation: str | None = None
    """Folder of the packed validation set; None is no validation."""
    verify: bool = True
    """Compare the shards' checksums before the run."""
    shuffle: bool = True
    """Draw rows in an order that depends only on (seed, epoch, packed set); false takes them as packed."""
    balance: bool = True
    """Let rows of like attention cost share a step, and deal them out evenly, so that no process waits for another;
    false leaves the rows as they were shuffled."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run. `???` marks what must be given."""

    out_dir: str = "???"
    """Folder of the run: manifest, metrics, checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What to train."""
    pattern: Pattern = Pattern.anchor
    """What a token may see: anchor, anchor_reset, full, intra_doc or intra_doc_reset."""
    steps: int = 2000
    """Optimizer updates."""
    tokens_per_step: int = 524288
    """Batch size in tokens, over all processes: a multiple of row length x micro_rows x processes."""
    micro_rows: int = 1
    """Rows that a process runs forward and backward at once."""
    validate_every: int = 100
    """Steps between validations, which also run before the first step and after the last; 0 is none between."""
    validation_rows: int = 64
    """Rows of the validation set to use, from its start."""
    seed: int = 0
    """Seed of the data order and of every random state."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """ZeRO stage, sequence parallelism, offloading of states."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Recomputation, tiles and offloading of activations."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Writing, keeping and resuming checkpoints."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where metrics go."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        for name in ("steps", "tokens_per_step", "micro_rows", "validation_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.validate_every < 0 or self.logging.every < 1:
            raise UserError(
                f"validate_every={self.validate_every} must be at least 0, and "
                f"logging.every={self.logging.every} at least 1"
            )
        for part in (self.optim, self.parallel, self.memory, self.checkpoint):
            part.validate()

    def rows_per_step(self, row_length: int, world: int) -> int:
        """Rows of one global step; UserError when the batch does not divide."""
        unit = row_length * self.micro_rows * world
        if self.tokens_per_step % unit:
            near = max(round(self.tokens_per_step / unit), 1) * unit
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of {unit} (row length {row_length} x "
                f"micro_rows {self.micro_rows} x {world} processes): use {near}"
            )
        return self.tokens_per_step // row_length


class ExportDtype(StrEnum):
    """Data type of the exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """From a run to a Hugging Face folder. `???` marks what must be given."""

    run: str = "???"
    """`out_dir` of a training run."""
    out_dir: str = "???"
    """Folder to write; must not exist."""
    step: int | None = None
    """Which checkpoint; None is the newest complete one."""
    dtype: ExportDtype = ExportDtype.float32
    """Data type of the exported weights; the checkpoint's own are float32."""
