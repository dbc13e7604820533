"""What a user says about processes and memory: ZeRO, sequence parallelism, recomputation, tiling, offloading."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from anchorctx.errors import UserError
from anchorctx.parallel.loss import LossKind

BUCKET = 50_000_000
"""Weights whose gradients are reduced, or that are gathered, in one call: 100 MB in bfloat16. DeepSpeed's own 5e8 holds
1 GB twice."""
LIVE = 500_000_000
"""Weights that ZeRO 3 keeps gathered at once, at most, beside the module that runs; DeepSpeed's own is 1e9."""
SUBGROUP = 250_000_000
"""Weights that the optimizer updates at once under ZeRO 3."""
SMALLEST_TILE = 128
"""Tokens of a tile of an MLP, at least: below, the calls cost more than the matrices."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the model's states are spread over processes (ZeRO, arXiv 1910.02054) and memory."""

    zero_stage: int = 2
    """1 shards the optimizer's states over the processes, 2 also the gradients, 3 also the parameters. 2 and 3 sum the
    gradients of micro-batches in float32, 1 in the weights' dtype."""
    sequence_parallel: int = 1
    """Processes that share each row (DeepSpeed-Ulysses, 2309.14509): a divisor of the number of processes and of the
    attention heads. 1 is none; the remaining factor is data-parallel."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in CPU memory."""
    offload_parameters: bool = False
    """Keep the parameters in CPU memory between uses; needs zero_stage=3."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    timeout_s: float = 1800.0
    """Longest time, in seconds, that a process waits for another before the job ends."""

    def validate(self) -> None:
        """Raise UserError for combinations that do not exist."""
        if self.sequence_parallel < 1:
            raise UserError(f"parallel.sequence_parallel={self.sequence_parallel} must be at least 1: 1 is none")
        if self.zero_stage == 0 and self.sequence_parallel > 1:
            raise UserError(
                f"parallel.zero_stage=0 cannot be combined with parallel.sequence_parallel={self.sequence_parallel}: "
                "DeepSpeed's plain data parallelism has no sequence-parallel gradients; use parallel.zero_stage=1"
            )
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"parallel.zero_stage={self.zero_stage} must be 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError(
                f"parallel.offload_parameters=true needs parallel.zero_stage=3, not {self.zero_stage}: "
                "only ZeRO 3 shards parameters"
            )


class ActivationStore(StrEnum):
    """Where the inputs of recomputed layers wait for the backward pass."""

    device = "device"
    """Where they are."""
    cpu = "cpu"
    """In pinned memory of the CPU, copied while the next layer computes."""
    folder = "folder"
    """In files under `offload_folder`, on a fast local disk."""


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """What is recomputed, cut into tiles or moved away so that longer rows fit; loss and gradients stay the same."""

    checkpoint_every: int = 0
    """Recompute every n-th layer in the backward pass: 1 is all of them, 2 every other one, 0 leaves it to
    parallel.activation_checkpointing (all or none)."""
    mlp_tile: int = 0
    """Tokens that go through an MLP at once; 0 is the whole row. The hidden size is a good choice."""
    offload_activations: ActivationStore = ActivationStore.device
    """Where the inputs of recomputed layers are kept: device, cpu or folder."""
    offload_folder: str | None = None
    """Folder for offload_activations=folder, on a local disk."""
    loss: LossKind = LossKind.tiled
    """How the loss is computed: tiled, liger (CUDA) or whole (all logits at once, to compare with)."""
    loss_tile: int | None = None
    """Tokens whose logits exist at once; null chooses it."""
    sharded_loading: bool = True
    """Under ZeRO 3, keep only this process's share of each weight while a checkpoint is loaded."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        if self.checkpoint_every < 0:
            raise UserError(f"memory.checkpoint_every={self.checkpoint_every} must be at least 0")
        if self.mlp_tile and self.mlp_tile < SMALLEST_TILE:
            raise UserError(f"memory.mlp_tile={self.mlp_tile} must be 0 or at least {SMALLEST_TILE} tokens")
        if self.loss_tile is not None and self.loss_tile < 1:
            raise UserError(f"memory.loss_tile={self.loss_tile} must be at least 1: null chooses it")
        if (self.offload_activations is ActivationStore.folder) != (self.offload_folder is not None):
            given = f"memory.offload_folder={self.offload_folder}"
            raise UserError(
                f"memory.offload_activations={self.offload_activations.value} does not go with {given}: give "
                "offload_activations=folder and an offload_folder, or neither"
            )

    def recomputed(self, parallel: ParallelConfig) -> int:
        """Recompute every n-th layer, 0 for none; UserError for an offload that nothing feeds."""
        every = self.checkpoint_every or int(parallel.activation_checkpointing)
        if not every and self.offload_activations is not ActivationStore.device:
            raise UserError(
                f"memory.offload_activations={self.offload_activations.value} moves the inputs of recomputed layers, "
                "but none is recomputed: set memory.checkpoint_every=1"
            )
        return every
