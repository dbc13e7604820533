"""What the optimizer updates, with decay and without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anchorctx.flops import whole_shape


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
