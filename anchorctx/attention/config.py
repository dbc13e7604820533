"""Settings of attention that are read without torch."""

from __future__ import annotations

from enum import StrEnum


class RopeDtype(StrEnum):
    """The dtype in which queries and keys are rotated."""

    bfloat16 = "bfloat16"
    """The activations' own dtype, as transformers does: with a bfloat16 model, the defect that the paper studies."""
    float32 = "float32"
    """Rotate in float32 and cast once, afterwards."""
    bfloat16_emulated = "bfloat16_emulated"
    """Rotate in bfloat16 whatever the activations' dtype, which stay as they are: the defect alone, on machines that
    are quick in float32 only."""
