"""What a user says about the model: where it comes from, its length, RoPE, dtypes and attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Le

from anchorctx.attention.config import RopeDtype
from anchorctx.errors import UserError
from anchorctx.settings import LONGEST, Count, Seed, check_ranges

SMALLEST_TILE = 128
"""Tokens of a tile of an MLP, at least: below, the calls cost more than the matrices."""
KEEPS = "leave it out to keep the checkpoint's"
"""What to do about a change of the model that is out of range."""


class ModelDtype(StrEnum):
    """Data type of the weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class RopeType(StrEnum):
    """transformers' scalings of rotary frequencies."""

    default = "default"
    """No scaling: frequencies from `theta` alone."""
    linear = "linear"
    """Positions divided by `factor` (arXiv 2306.15595)."""
    dynamic = "dynamic"
    """NTK: theta grows with the row's length beyond the original one."""
    yarn = "yarn"
    """High frequencies kept, low ones divided by `factor` (arXiv 2309.00071)."""
    llama3 = "llama3"
    """As Llama 3.1: like yarn, with another ramp and no temperature."""


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Changes to the checkpoint's rotary embeddings; None keeps what the checkpoint has.

    Models with one set per layer type (Gemma 3, OLMo 3) change that of their full-attention layers; `extra` reaches the
    others.
    """

    type: RopeType | None = None
    """default, linear, dynamic, yarn or llama3."""
    theta: Annotated[float, Ge(1), KEEPS] | None = None
    """Base of the frequencies, dimensionless; the paper uses 1e6 at 16K tokens, 5e6 at 64K, 1e7 at 128K."""
    factor: Annotated[float, Ge(1), KEEPS] | None = None
    """New length over original length, at least 1; needed by every scaling type."""
    original_max_position_embeddings: Annotated[int, Ge(1), Le(LONGEST), KEEPS] | None = None
    """Tokens that the model was trained for before scaling; None takes the checkpoint's."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More of transformers' parameters (`beta_fast`, `low_freq_factor`, ...); a layer type's name (`sliding_attention`)
    takes a dictionary of parameters for those layers."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model: exactly one of `path` (weights) and `config` (from scratch)."""

    path: str | None = None
    """Folder of a Hugging Face checkpoint, or its name on the hub; or a GGUF file, on the hub OWNER/NAME/FILE.gguf."""
    gguf_file: str | None = None
    """A GGUF file in the folder or hub repository `path`, the same as path=PATH/FILE.gguf."""
    config: dict[str, Any] = field(default_factory=dict)
    """A new, randomly initialised model: `model_type` and fields of its transformers configuration."""
    dtype: ModelDtype = ModelDtype.float32
    """float32 or bfloat16."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Changes to the rotary position embeddings."""
    rope_dtype: RopeDtype = RopeDtype.float32
    """Rotate queries and keys in float32, or in the activations' dtype as transformers does (bfloat16)."""
    max_length: Annotated[int, Ge(1), Le(LONGEST), KEEPS] | None = None
    """New maximum length in tokens, written into the exported configuration; None keeps the checkpoint's."""
    no_dropout: bool = False
    """Train without dropout, whatever the checkpoint says; needed where it has some in attention, which no backend
    computes."""
    attention: str = "auto"
    """Attention backend: auto, flash_attn, torch_varlen, cpu, flex or reference."""
    seed: Seed = 0
    """Seed of a new model's weights."""

    def __post_init__(self) -> None:
        if self.path is not None and self.gguf_file is not None:
            self.path, self.gguf_file = f"{self.path}/{self.gguf_file}", None


class LossKind(StrEnum):
    """How the loss is computed."""

    tiled = "tiled"
    """Plain torch in tiles, any device."""
    liger = "liger"
    """Liger's fused kernel on CUDA; needs the extra `liger` and one weight for all trained tokens."""
    whole = "whole"
    """torch's own cross-entropy on all logits at once: what the others are compared with, and its memory."""


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

    checkpoint_every: Count = 0
    """Recompute every n-th layer in the backward pass: 1 is all of them, 2 every other one, 0 none."""
    mlp_tile: Count = 0
    """Tokens that go through an MLP at once; 0 is the whole row. The hidden size is a good choice."""
    offload_activations: ActivationStore = ActivationStore.device
    """Where the inputs of recomputed layers are kept: device, cpu or folder."""
    offload_folder: str | None = None
    """Folder for offload_activations=folder, on a local disk."""
    loss: LossKind = LossKind.tiled
    """How the loss is computed: tiled, liger (CUDA) or whole (all logits at once, to compare with)."""
    loss_tile: Annotated[int, Ge(1), "null chooses it"] | None = None
    """Tokens whose logits exist at once; null chooses it."""
    sharded_loading: bool = True
    """Under ZeRO 3, keep only this process's share of each weight while a checkpoint is loaded."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be meant."""
        check_ranges(self, "memory")
        if self.mlp_tile and self.mlp_tile < SMALLEST_TILE:
            raise UserError(f"memory.mlp_tile={self.mlp_tile} must be 0 or at least {SMALLEST_TILE} tokens")
        if (self.offload_activations is ActivationStore.folder) != (self.offload_folder is not None):
            given = f"memory.offload_folder={self.offload_folder}"
            raise UserError(
                f"memory.offload_activations={self.offload_activations.value} does not go with {given}: give "
                "offload_activations=folder and an offload_folder, or neither"
            )
        if self.offload_activations is not ActivationStore.device and not self.checkpoint_every:
            raise UserError(
                f"memory.offload_activations={self.offload_activations.value} moves the inputs of recomputed layers, "
                "but none is recomputed: set memory.checkpoint_every=1"
            )
