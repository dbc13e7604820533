"""The optimizer's settings and the learning-rate schedule, a pure function of the step: there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from anchorctx.errors import UserError
from anchorctx.flops import whole_shape


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


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with decay, vectors without. Empty groups are left out."""
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if len(whole_shape(parameter)) > 1]
    vectors = [parameter for parameter in trainable if len(whole_shape(parameter)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
