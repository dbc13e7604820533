"""Everything that a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from anchorctx.errors import UserError
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig
from anchorctx.models.config import MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.train.callbacks import LoggingConfig
from anchorctx.train.checkpoint import CheckpointConfig
from anchorctx.train.optim import OptimConfig


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
