"""What a training step costs in floating-point operations, and how many of them each kind of GPU can do.

Only the attention that the layout allows is counted.

Model FLOPs as in PaLM (2204.02311, appendix B): 2 per weight and token forward, twice that backward, nothing for
recomputation. Attention: 2 * (D + Dv) * Hq per allowed (query, key) pair and layer for q.k and p.v. MFU divides by the
device's dense peak, so that a masked row does not look faster than it is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of GPU."""

    name: str
    """Part of the name that the driver reports, such as `H100` of `NVIDIA H100 80GB HBM3`."""
    peak: float
    """Dense bfloat16 FLOP/s, without sparsity."""
    memory: float
    """Bytes that the driver shows as total."""
    bandwidth: float
    """Bytes a second that it reads or writes of its memory."""
    link: float
    """Bytes a second that a GPU sends to the others of its machine (NVLink, else PCIe), in one direction."""


def _machine(name: str, tflops: float, gib: float, memory_gb: float, link_gb: float) -> Machine:
    return Machine(name, tflops * 1e12, gib * GIB, memory_gb * 1e9, link_gb * 1e9)


MACHINES = {
    machine.name: machine
    for machine in (
        _machine("A100", 312, 80.0, 2039, 300),
        _machine("A800", 312, 80.0, 2039, 200),  # an A100 with slower links, as the H800 is an H100
        _machine("H100", 989, 79.6, 3350, 450),
        _machine("H800", 989, 79.6, 3350, 200),
        _machine("H200", 989, 140.4, 4800, 450),
        _machine("B200", 2250, 179.0, 8000, 900),
        _machine("A100 PCIe", 312, 80.0, 1935, 25),  # from here on without NVLink between all cards: PCIe
        _machine("H100 PCIe", 756, 79.6, 2000, 50),
        _machine("H100 NVL", 835, 93.6, 3900, 50),
        _machine("L40S", 362, 45.0, 864, 25),
        _machine("L40", 181, 45.0, 864, 25),
        _machine("A40", 150, 45.0, 696, 25),
        _machine("A10G", 70, 22.5, 600, 12),
        _machine("RTX 4090", 165, 24.0, 1008, 25),
        _machine("RTX 3090", 71, 24.0, 936, 25),
    )
}
"""By name: dense TFLOP/s, memory and links in GB/s from the vendors' data sheets (of links one direction, of PCIe what
cards reach), GiB as in nvidia-smi."""


def machine(name: str) -> Machine:
    """The GPU of that name; UserError suggests the nearest name."""
    if name not in MACHINES:
        near = difflib.get_close_matches(name.upper(), MACHINES, 1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"gpu={name} is not known: {hint}choose {', '.join(MACHINES)}; gpu_memory_gib= changes its memory"
        )
    return MACHINES[name]


def peak_flops(device_name: str) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where it is not known (CPUs)."""
    found = [name for name in MACHINES if name in device_name]  # "H100 PCIe" is also an "H100"
    return MACHINES[max(found, key=len)].peak if found else None


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
        # a weight is multiplied and added (2) in the forward pass, and twice in the backward pass: for the gradients of
        # its input and of itself. Likewise 2 x D for q.k and 2 x Dv for p.v of a pair in each head, three times.
        per_pair = 6.0 * sum(head_dims(config)) * config.num_attention_heads
        return cls(6.0 * _active_weights(model), per_pair, layer_windows(config))

    @property
    def token_cost(self) -> float:
        """What a token costs besides attention, in (query, key) pairs of all layers."""
        return self.per_token / (self.per_pair * len(self.windows))

    def attention(self, layout: PackedLayout) -> float:
        """FLOPs of attention for one row, forward and backward."""
        # pairs are counted once for each kind of layer: Gemma 3 has 5 of a window of 1,024 to one without
        counts = {window: self.windows.count(window) for window in set(self.windows)}
        return self.per_pair * sum(layout.attention_pairs(window) * layers for window, layers in counts.items())

    def step(self, layouts: Iterable[PackedLayout]) -> float:
        """FLOPs of one training step over these rows."""
        return sum(
            self.per_token * (layout.length - layout.padding_tokens) + self.attention(layout) for layout in layouts
        )

    def attention_saved(self, layouts: Sequence[PackedLayout]) -> float:
        """The share of full causal attention's FLOPs that these rows do not need, 0..1."""
        done = sum(self.attention(layout) for layout in layouts)
        full = sum(self.attention(PackedLayout((0, layout.length))) for layout in layouts)
        return 1 - done / full


def layer_configs(config: Any) -> list[Any]:
    """The configurations of a model's layers where these differ (Gemma 4's head dimensions), else the model's alone.

    transformers refuses to read a value that differs off the model's configuration.
    """
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def head_dims(config: Any) -> tuple[int, int]:
    """Head dimensions of a text configuration: of queries and keys, and of values; of the widest layers.

    They differ in multi-head latent attention, whose queries and keys have a part that is rotated and one that is not.
    """
    if len(layers := layer_configs(config)) > 1:
        return max(head_dims(layer) for layer in layers)
    parts = [getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    own = sum(part or 0 for part in parts) if all(parts) else getattr(config, "head_dim", None)
    dim = own or config.hidden_size // config.num_attention_heads
    return dim, getattr(config, "v_head_dim", None) or dim


def layer_windows(config: object) -> tuple[int | None, ...]:
    """Each layer's sliding window as transformers applies it, None where a layer sees everything."""
    layers = int(getattr(config, "num_hidden_layers"))  # noqa: B009
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has left this process a flat share of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _active_weights(model: PreTrainedModel) -> float:
    """Weights that multiply each token: the output head counts, the embedding table does not, experts by their use."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    # Mixtral has 8 experts, of which each token uses 2: a quarter of their weights multiply it
    used = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    weights = 0.0
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) >= 2 and parameter is not embedding:
            weights += math.prod(shape) * (used if ".experts." in name else 1.0)
    head = model.get_output_embeddings()
    # a tied head is the embedding table, left out above, but as the head it does multiply
    if head is not None and head.weight is embedding:
        weights += math.prod(whole_shape(embedding))
    return weights
