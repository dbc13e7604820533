"""Floating-point operations that a training step really does, counting only the attention that the layout allows.

Model FLOPs as in PaLM (2204.02311, appendix B): 2 per weight and token forward, twice that backward, nothing for
recomputation. Attention: 2 * 2 * D * Hq per allowed (query, key) pair and layer for q.k and p.v. MFU divides by the
device's dense peak, so that a masked row does not look faster than it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anchorctx.layout import PackedLayout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
    "L40S": 362,
    "A40": 150,
    "A10G": 70,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bfloat16 peak, in TFLOP/s, by a part of the device's name (vendors' data sheets, without sparsity)."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model costs: `per_token` for its matrices, `per_pair` for one attention score in one layer."""

    per_token: float
    """Forward and backward FLOPs of all matrices for one token."""
    per_pair: float
    """Forward and backward FLOPs of one allowed (query, key) pair in one layer, all heads."""
    windows: tuple[int | None, ...]
    """Each layer's sliding window in tokens, None for none."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops:
        """Count a model's weights, which may be spread over processes (ZeRO 3) or have no values (meta device)."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(6.0 * _active_weights(model), 12.0 * head_dim * heads, layer_windows(config))

    def attention(self, layout: PackedLayout) -> float:
        """FLOPs of attention for one row, forward and backward."""
        counts = {window: self.windows.count(window) for window in set(self.windows)}
        return self.per_pair * sum(layout.attention_pairs(window) * layers for window, layers in counts.items())

    def step(self, layouts: Iterable[PackedLayout]) -> float:
        """FLOPs of one training step over these rows."""
        return sum(self.per_token * layout.length + self.attention(layout) for layout in layouts)

    def attention_saved(self, layouts: Sequence[PackedLayout]) -> float:
        """The share of full causal attention's FLOPs that these rows do not need, 0..1."""
        done = sum(self.attention(layout) for layout in layouts)
        full = sum(self.attention(PackedLayout((0, layout.length))) for layout in layouts)
        return 1 - done / full


def layer_windows(config: object) -> tuple[int | None, ...]:
    """Each layer's sliding window as transformers applies it, None where a layer sees everything."""
    layers = int(getattr(config, "num_hidden_layers"))  # noqa: B009
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def peak_flops(device_name: str) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where it is not known (CPUs)."""
    for part, tflops in PEAK_TFLOPS.items():
        if part in device_name:
            return tflops * 1e12
    return None


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has left this process a flat share of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _active_weights(model: PreTrainedModel) -> float:
    """Weights that multiply each token: the output head counts, the embedding table does not, experts by their use."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    weights = 0.0
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) >= 2 and parameter is not embedding:
            weights += math.prod(shape) * (used if ".experts." in name else 1.0)
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding:
        weights += math.prod(whole_shape(embedding))
    return weights
