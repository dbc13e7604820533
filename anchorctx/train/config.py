"""Everything that a training run, and its export, can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from anchorctx.data.pieces import AnchorVisible, piece_tokens
from anchorctx.errors import UserError
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig
from anchorctx.models.config import LossKind, MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.records.wandb_run import WandbMode
from anchorctx.settings import Count, NonNegativeFloat, Positive, PositiveFloat, Seed, check_ranges


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: Count = 100
    """Steps between checkpoints; the last step always writes one. 0 is only the last."""
    keep_last: Positive = 2
    """The newest checkpoints to keep."""
    keep_every: Count = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 is none."""
    resume: str = "auto"
    """`auto` continues from the newest complete checkpoint in `out_dir`, `never` refuses a used `out_dir`, and a
    folder names one checkpoint."""
    trust: bool = False
    """Also resume from a checkpoint that another run wrote, which is refused otherwise, since it is likely a mistake.
    No file of a checkpoint can run code, trusted or not, and a damaged one is always refused."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is reported, and how often."""

    every: Positive = 1
    """Steps between rows of metrics."""
    wandb: WandbMode = WandbMode.disabled
    """Weights & Biases: disabled, offline or online."""
    project: str = "anchorctx"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; None is the account's own."""
    name: str | None = None
    """W&B run name; None is the name of `out_dir`."""
    group: str | None = None
    """W&B group, which draws runs together, such as the seeds of one experiment."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    notes: str | None = None
    """A text beside the W&B run."""
    tensorboard: bool = False
    """Write TensorBoard's files to `out_dir/tensorboard`."""


class OnNonfinite(StrEnum):
    """What becomes of a step whose loss or gradient is not finite. Its update is never made."""

    fail = "fail"
    """The run ends."""
    skip = "skip"
    """The run goes on with the next step, `max_skipped` times."""


class OnSpike(StrEnum):
    """What becomes of a step whose loss is far above those before it."""

    ignore = "ignore"
    """Nothing."""
    log = "log"
    """It is trained as any other, and written down."""
    skip = "skip"
    """Its update is not made, `max_skipped` times."""


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    """What is done about bad numbers. Steps that have some are written to `out_dir/suspicious.jsonl` with their rows
    and documents."""

    on_nonfinite: OnNonfinite = OnNonfinite.fail
    """A loss or gradient that is not finite: fail, or skip the step's update."""
    on_spike: OnSpike = OnSpike.log
    """A loss far above those before it: ignore, log, or skip the step's update."""
    spike_deviations: PositiveFloat = 6.0
    """How far, in standard deviations of the window's losses."""
    spike_window: Annotated[int, Ge(8)] = 64
    """Steps that a loss is compared with; the first ones of a run are compared with none."""
    max_skipped: Count = 10
    """Updates that are left out before the run ends."""
    weights_every: Count = 100
    """Steps between checks of the weights, which are also checked before each checkpoint: all finite, and the same on
    all processes to the bit (with ZeRO 3, which gives each process a share, finite). 0 is only before checkpoints."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        check_ranges(self, "health")


class Schedule(StrEnum):
    """The shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW; the defaults are the paper's (2411.13476, section 5.1)."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate."""
    betas: list[Annotated[float, Ge(0), Lt(1)]] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: NonNegativeFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of the matrices; vectors (norms, biases) are not decayed."""
    schedule: Schedule = Schedule.cosine
    """`constant`, or `cosine` down to `min_lr_ratio`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: NonNegativeFloat = 0.1
    """The cosine's end as a share of `lr`."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 is no clipping."""

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        check_ranges(self, "optim")
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1), such as [0.9, 0.95]")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of the update that completes step `step` (from 0) out of `steps`."""
        # warmup_steps=3: lr/4, lr/2, 3/4 lr, and lr from step 3 on, which is where the cosine begins
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.schedule is Schedule.constant:
            return self.lr
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


class TokenizerOf(StrEnum):
    """Whose tokenizer made the rows."""

    model = "model"
    """The model's own: a checkpoint of another tokenizer is refused."""
    other = "other"
    """Another, and that is meant: the model learns its ids, and the export holds it."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The packed sets that `anchorctx prepare` made."""

    train: str = "???"
    """Folder of the packed training set."""
    validation: str | None = None
    """Folder of the packed validation set; None is no validation."""
    verify: bool = True
    """Compare the shards' checksums before the run."""
    tokenizer: TokenizerOf = TokenizerOf.model
    """Whose tokenizer made the rows: model (a checkpoint with another one is refused) or other (it is meant)."""
    shuffle: bool = True
    """Draw rows in an order that depends only on (seed, epoch, packed set); false takes them as packed."""
    balance: bool = True
    """Let rows of like attention cost share a step, so that their documents can be dealt out evenly and no process
    waits for another; false leaves the rows as they were shuffled."""


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
    steps: Positive = 2000
    """Optimizer updates."""
    max_hours: Annotated[float, Gt(0), "null is no limit"] | None = None
    """Hours after which this start of the run finishes its step, writes a checkpoint and ends with exit code 124, as a
    queue's limit needs it; a resumed run counts from its own start. null is no limit."""
    tokens_per_step: Positive = 524288
    """Batch size in tokens, over all processes: a multiple of the row length."""
    micro_tokens: Annotated[int, Ge(1), "null takes a row and a sixteenth"] | None = None
    """Tokens that a process runs forward and backward at once, copies of the anchor included: a step's documents are
    cut into pieces of at most so many. A longer document is a piece by itself, which `parallel.sequence_parallel`
    processes share. null is a row and a sixteenth: a row with its copies, where documents have 16 tokens or more."""
    anchor_visible: AnchorVisible = AnchorVisible.window
    """In models with sliding windows: window (the anchor is a document's first token) or always."""
    validate_every: Count = 100
    """Steps between validations, which also run before the first step and after the last; 0 is none between."""
    validation_rows: Positive = 64
    """Rows of the validation set to use, from its start."""
    seed: Seed = 0
    """Seed of the data order and of every random state."""
    deterministic: bool = False
    """Compute the same bits each time, on the same cards with the same software (a CPU does so anyway). Slower, and
    FlashAttention-2 then holds several float32 sums of the queries' gradients where documents times heads are fewer
    than the card's multiprocessors. What both cost: measure on your card."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """ZeRO stage, sequence parallelism, offloading of states."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Recomputation, tiles and offloading of activations."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Writing, keeping and resuming checkpoints."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Losses, gradients and weights that are not finite, and losses that jump."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where metrics go."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        check_ranges(self)
        for part in (self.health, self.optim, self.parallel, self.memory):
            part.validate()
        if self.deterministic and self.memory.loss is LossKind.liger:
            raise UserError(
                "deterministic=true cannot vouch for memory.loss=liger, whose kernels do not know torch's switch: use "
                "memory.loss=tiled"
            )

    def rows_per_step(self, row_length: int) -> int:
        """Rows of one global step; UserError when the batch is not a whole number of them."""
        if self.tokens_per_step % row_length:
            near = max(round(self.tokens_per_step / row_length), 1) * row_length
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of the row length, {row_length}: use {near}"
            )
        return self.tokens_per_step // row_length

    def piece_tokens(self, row_length: int, anchor_len: int = 1) -> int:
        """Tokens that a piece of such rows holds at most; UserError where that cannot be (`data.pieces`)."""
        return piece_tokens(self.micro_tokens, row_length, self.pattern, self.parallel.sequence_parallel, anchor_len)


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
    step: Count | None = None
    """Which checkpoint; None is the newest that is intact."""
    trust: bool = False
    """Also export a checkpoint that another run wrote into the folder."""
    dtype: ExportDtype = ExportDtype.float32
    """Data type of the exported weights; the checkpoint's own are float32."""
    push_to: str | None = None
    """Repository on the Hugging Face hub (`USER/NAME`) to push the folder to as well; a new one is made private. None
    pushes nowhere."""
