"""What `anchorctx plan` can be told: a run's settings, the machine, the corpus, and assumptions about both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from anchorctx.data.pieces import AnchorVisible
from anchorctx.errors import UserError
from anchorctx.flops import Machine, machine
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig
from anchorctx.models.config import MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.settings import Length, NonNegativeFloat, Positive, PositiveFloat, Seed, Share, Spread, check_ranges

Rate = Annotated[float, Gt(0), Le(1)]
"""Share of a peak rate."""


@dataclass(kw_only=True, slots=True)
class CorpusConfig:
    """Lengths of documents: those of a packed set, a list, or a log-normal law."""

    packed: str | None = None
    """Folder of a packed set: its rows are taken as they are."""
    lengths: str | None = None
    """Text file with the tokens of one document a line."""
    median: PositiveFloat = 800.0
    """Median tokens of a document, where neither is given."""
    sigma: Spread = 1.2
    """Standard deviation of the logarithm of the length."""
    longest: Length | None = None
    """Tokens of the longest document: drawn ones are cut there, and memory is planned for one. null is the longest of
    the rows that are looked at."""
    rows: Annotated[int, Ge(1), Le(10**6)] = 64
    """Rows to draw, or to look at in a packed set."""
    seed: Seed = 0
    """Seed of the draw."""


@dataclass(kw_only=True, slots=True)
class Assumptions:
    """Shares of peak rates that are reached; the plan's times are no better than these."""

    linear: Rate = 0.70
    """Of the dense bfloat16 peak, in matrix products. Large products alone reached 0.78 on an H200."""
    attention: Rate = 0.45
    """Of the same, in attention of long documents, forward and backward, as far as `attention_tflops` allows."""
    attention_tflops: PositiveFloat = 280.0
    """TFLOP/s of the same at most. 280 is torch's FlashAttention-2 on an H200, which knows no newer card than an A100;
    cuDNN's kernel reached 470 there. FlashAttention-3 was not measured."""
    attention_keys: NonNegativeFloat = 400.0
    """Keys that each token costs attention in addition to those that it sees: why short documents reach less. With 400
    and 280 TFLOP/s documents of 1,024, 2,049, 8,192 and 65,536 tokens come within 5 % of what was measured."""
    layer_bytes: NonNegativeFloat = 300.0
    """Memory traffic of a layer for each token and hidden unit, forward and backward, besides matrix products and
    attention: norms, rotation by the fused kernel, activations, sums. So fitted that three steps of a model of 1.24
    billion weights on an H200 come within 5 % (benchmarks/gpu)."""
    logit_bytes: NonNegativeFloat = 260.0
    """The same of the loss, for each token and entry of the vocabulary."""
    layer_ms: NonNegativeFloat = 0.8
    """Milliseconds that a layer takes at least, forward, and again backward and where recomputed, however few its
    tokens: the CPU issues its kernels. 24.3 ms for the 32 layers of one token on an H200 (benchmarks/gpu)."""
    link: Rate = 0.70
    """Of a link's rate, in large exchanges."""
    overlap: Share = 0.80
    """Of ZeRO's communication that is hidden behind computation."""
    network_gb: PositiveFloat = 50.0
    """Gigabytes a second that a GPU sends to other machines (400 Gbit/s each)."""
    gpus_per_machine: Positive = 8
    """GPUs that a fast link joins."""
    runtime_gib: NonNegativeFloat = 2.0
    """CUDA context, cuBLAS and NCCL buffers, in GiB."""
    fragmentation: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Of a GPU's memory that the allocator cannot use."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """A run before it is run; `anchorctx plan --recipe llama3_8b_128k` takes the run's settings from it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model: `path` may also be a name that the planner knows."""
    row_length: Length | None = None
    """Tokens of a row; null takes model.max_length, else the packed set's."""
    pattern: Pattern = Pattern.anchor
    """What a token may see: anchor, anchor_reset, full, intra_doc or intra_doc_reset."""
    micro_tokens: Annotated[int, Ge(1), "null takes a row and a sixteenth"] | None = None
    """Tokens that a process runs at once, copies of the anchor included; null is a row and a sixteenth."""
    anchor_visible: AnchorVisible = AnchorVisible.window
    """In models with sliding windows: window or always, whose merge is counted in memory, not in time."""
    tokens_per_step: Positive | None = None
    """Batch size in tokens, a multiple of the row length; null is a row for each GPU."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """ZeRO stage, sequence parallelism, offloading, activation checkpointing."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Recomputation, tiles and offloading of activations."""
    gpu: str = "H100"
    """Kind of GPU."""
    gpus: Annotated[int, Ge(1), Le(2**20)] = 8
    """How many."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one, in GiB, where it differs from the kind's."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What the rows are packed from."""
    assume: Assumptions = field(default_factory=Assumptions)
    """Rates and overheads."""
    search: bool = False
    """Look for the fastest configuration that fits, `micro_tokens` included, instead of planning the given one."""
    simulate: bool = False
    """Also scale to 1,024 GPUs on paper, and draw it; needs out_dir."""
    out_dir: str | None = None
    """Folder for plan.json and the picture; null writes nothing."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        check_ranges(self)
        if self.simulate and self.out_dir is None:
            raise UserError("simulate=true draws a picture: give out_dir=..., the folder for it")
        machine(self.gpu)
        if not self.search:  # a search replaces both
            self.parallel.validate()
            self.memory.validate()

    @property
    def machine(self) -> Machine:
        """The GPU."""
        return machine(self.gpu)

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors can have, the runtime included."""
        total = self.machine.memory if self.gpu_memory_gib is None else self.gpu_memory_gib * 2**30
        return total * (1 - self.assume.fragmentation)
