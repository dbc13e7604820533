"""What `anchorctx precision` does, and the arithmetics that it compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Gt

from anchorctx.data.sources.source import SourceConfig
from anchorctx.evals.corpus import embedded
from anchorctx.settings import Count, Length, Positive, Seed

Shift = Annotated[int, Ge(1), "leave 0 out"]


class Arithmetic(StrEnum):
    """In what the model computes, and in what it rotates."""

    bfloat16 = "bfloat16"
    """Everything in bfloat16, the rotation too: what transformers does, and what the paper studies."""
    float32_rotation = "float32_rotation"
    """bfloat16, but rotated in float32 and cast once, afterwards: `rope_dtype=float32`."""
    float32 = "float32"
    """Everything in float32: what is left is the rounding of the angles themselves."""


class Emulate(StrEnum):
    """Whether bfloat16 matrix products are computed in float32 and rounded."""

    auto = "auto"
    """On CPUs without bfloat16 instructions."""
    always = "always"
    """Everywhere."""
    never = "never"
    """Nowhere: the device's own kernels."""


@dataclass(kw_only=True, slots=True)
class StudyConfig:
    """What is studied, of any model."""

    lengths: list[Length] = field(default_factory=list)
    """Row lengths in tokens; empty takes the model's limit (32,768 at most) and its half, quarter and eighth, or as
    much less as budget_minutes asks for."""
    shifts: list[Shift] = field(default_factory=lambda: [1, 16, 256, 4096, 32768, 131072])
    """Constants, in tokens, that are added to all positions. They may exceed the model's limit."""
    shift: Shift = 16
    """The shift, in tokens, that growth with length, single tokens and the verdict are about (the paper's is 16)."""
    layers: list[Count] = field(default_factory=list)
    """Layers measured, from 0; empty takes eight at most, spread evenly."""
    arithmetics: list[Arithmetic] = field(default_factory=lambda: list(Arithmetic))
    """bfloat16, float32_rotation and float32."""
    texts: Positive | None = None
    """Different rows of text of each length, which the confidence intervals are over; null takes 4, or 3 where
    budget_minutes asks for less."""
    queries: Positive = 64
    """Tokens of a row whose attention is compared, spread evenly over its second half."""
    control: bool = True
    """Also study the same architecture with weights drawn anew, as the control."""
    packed: bool = True
    """Also compare the training rows of `intra_doc` and `intra_doc_reset`."""
    end_to_end: bool = True
    """Also measure what a shift does to the next token's log-probability through all layers."""
    cost: bool = True
    """Also time the rotation and the forward pass with either `rope_dtype`."""
    rows_per_pass: Positive = 8
    """Shifted copies of a row in one forward pass: fewer take less memory."""
    emulate: Emulate = Emulate.auto
    """Compute bfloat16 matrix products in float32 and round: auto, always or never."""
    budget_minutes: Annotated[float, Gt(0)] = 10.0
    """Time for the study, by a measurement of the model at its start: what `lengths`, `texts` and the cost's row leave
    open is chosen to fit. A study that was stopped keeps to its choice."""


@dataclass(kw_only=True)  # without slots: it is one of two bases
class PrecisionModel:
    """What `anchorctx precision` studies, and where its results go."""

    model: str
    """Hugging Face folder (or hub name) with weights and tokenizer."""
    out_dir: str
    """Folder for results.jsonl, manifest.json and precision.png; a study that was stopped goes on where it was."""
    label: str | None = None
    """Name of the model in the results; null takes the folder's name."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to change, such as {max_position_embeddings: 4096} to read past its limit."""
    corpus: SourceConfig = field(default_factory=embedded)
    """Texts: any source that `prepare` takes; the embedded corpus' validation files by default."""


@dataclass(kw_only=True, slots=True)
class PrecisionConfig(StudyConfig, PrecisionModel):
    """What `anchorctx precision` does."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""
    seed: Seed = 0
    """Seed of the control's weights and of the random queries and keys."""
