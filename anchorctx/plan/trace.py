"""Bytes that a forward and backward pass over one piece holds, counted on a model without values.

Formulas for activations would be needed for every architecture, and would go out of date. Instead the real model, loss
and memory switches run on torch's meta device, where tensors have shapes and no data, and every storage is counted from
its creation until it is freed. That takes seconds for any row length. Two depths are traced; the bytes are linear in
the number of layers.

Parameters are not counted, nor are gradients once they have been handed to ZeRO; see `plan.memory`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.models.config import ActivationStore, LossKind, MemoryConfig
from anchorctx.models.head import Parts
from anchorctx.models.loss import CausalLMLoss
from anchorctx.models.offload import Offload
from anchorctx.models.tiled_mlp import tile_mlps
from anchorctx.parallel.sharder import padded
from anchorctx.plan import meta_attention


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators create inside the context, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()  # addresses of storages, counted or ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        out = func(*args, **(kwargs or {}))
        # views share their base's storage, and so count nothing; an operator's own temporaries are not seen
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def restart(self) -> None:
        """Start a new peak from what exists now."""
        self.peak = self.now

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage."""
        self._seen.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # called when the last tensor on it is gone, whether Python or the autograd graph held it
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)  # the address may be used again
        self.now -= size


@dataclass(frozen=True, slots=True)
class Traced:
    """Bytes of one pass in one process."""

    kept: float
    """What the model keeps for the backward pass when its forward pass is done."""
    moved: float
    """Inputs of recomputed layers that were offloaded, not in `kept`."""
    forward: float
    """The most that exists at once during the forward pass."""
    loss: float
    """The same during the loss: `kept`, a tile's logits and the head's gradient."""
    backward: float
    """The same during the backward pass; a parameter's gradient counts until it is handed to ZeRO."""

    @property
    def peak(self) -> float:
        """The most that exists at any time."""
        return max(self.forward, self.loss, self.backward)

    def extended(self, deeper: Traced, layers: int, deep: int, wanted: int) -> Traced:
        """The line through this trace of `layers` and a `deeper` one of `deep`, at `wanted` layers."""
        # kept = 10 at 2 layers and 16 at 4: 3 for each further layer, so 10 + 30 * 3 = 100 at 32
        step = (wanted - layers) / (deep - layers)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Traced(**{name: v + step * (getattr(deeper, name) - v) for name, v in values.items()})


def trace(
    config: PretrainedConfig,
    layouts: tuple[PackedLayout, ...],
    *,
    dtype: torch.dtype,
    rope_dtype: RopeDtype,
    memory: MemoryConfig,
    every: int,
    sequence: int,
    cuda: bool,
) -> Traced:
    """Trace a pass over these layouts: a piece, or a long document that processes share.

    Args:
        config: the model's transformers configuration.
        layouts: one for each row of the batch, all of the same length.
        dtype, rope_dtype: as `ModelConfig` has them.
        memory: the switches.
        every: every n-th layer is recomputed, 0 none.
        sequence: processes that share the tokens, 1 for a piece.
        cuda: allocate as the kernels of a GPU do, else as those of a CPU.
    """
    layouts = tuple(padded(layout, sequence) for layout in layouts)
    layers = config.get_text_config().num_hidden_layers
    # multiples of `every`, so that the same share of the layers is recomputed at both depths, which differ by whole
    # inner layers: the first and the last are in both
    few, more = (2 * max(every, 1), 4 * max(every, 1))

    def at(depth: int) -> Traced:
        model = meta_model(config, depth, dtype, rope_dtype, cuda=cuda)
        return _run(model, layouts, memory, every, sequence)

    return at(layers) if layers <= more else at(few).extended(at(more), few, more, layers)


def meta_model(
    config: PretrainedConfig,
    layers: int,
    dtype: torch.dtype,
    rope_dtype: RopeDtype = RopeDtype.float32,
    *,
    cuda: bool = True,
) -> PreTrainedModel:
    """The model with so many layers, on the meta device, attending through `plan.meta_attention`.

    Args:
        config: the model's transformers configuration, which is left as it is.
        layers: instead of the configuration's.
        dtype, rope_dtype: as `ModelConfig` has them.
        cuda: attention allocates as a GPU's kernels do, else as the CPU's.
    """
    meta_attention.register(cuda)
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=meta_attention.NAME)
    set_rope_dtype(model, rope_dtype)
    return model.train()


def _run(
    model: PreTrainedModel, layouts: tuple[PackedLayout, ...], memory: MemoryConfig, every: int, sequence: int
) -> Traced:
    """Apply the memory switches as `train` does, and run one pass."""
    store = _CountingStore()
    if every:
        checkpoint_activations(model, every=every)
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    offload: dict[str, Any] = {} if memory.offload_activations is ActivationStore.device else {"saving": Offload(store)}
    # Liger's kernel cannot run without values: our tiled loss, in tiles as large as its chunks, stands for it
    tile = _liger_tile(model, layouts, sequence) if memory.loss is LossKind.liger else memory.loss_tile
    kind = LossKind.tiled if memory.loss is LossKind.liger else memory.loss
    module = CausalLMLoss(model, tile_tokens=tile, kind=kind, **offload)
    with LiveBytes() as live:
        store.live = live
        for parameter in model.parameters():
            live.ignore(parameter)
            # ZeRO's hooks reduce a gradient as soon as it is whole; where it then lies is `plan.memory`'s matter
            parameter.register_post_accumulate_grad_hook(_hand_over)
        return _passes(module, layouts, sequence, live, store)


def _passes(
    module: CausalLMLoss, layouts: tuple[PackedLayout, ...], sequence: int, live: LiveBytes, store: _CountingStore
) -> Traced:
    """`CausalLMLoss.forward` in its two halves, so that the peak of each is seen, then the backward pass."""
    rows, tokens = len(layouts), layouts[0].length // sequence
    ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
    ready = torch.empty(1, 1, 1, 1, device="meta")  # transformers looks at the values of positions unless it has a mask
    with module.saving():
        hidden = (
            Parts.of(module.model)
            .base(input_ids=ids, position_ids=ids, attention_mask=ready, layouts=layouts, use_cache=False)
            .last_hidden_state
        )
    kept, forward = live.now, live.peak
    live.restart()
    hidden = hidden.flatten(0, 1).clone()  # what picking the trained tokens copies: at most all
    weights = torch.empty(rows * tokens, dtype=torch.float32, device="meta")
    loss = module.token_loss(hidden, ids.flatten(), weights)
    peak_loss = live.peak
    live.restart()
    del hidden  # as in a real step, only the graph holds it by now
    loss.backward()
    return Traced(kept, store.moved, forward, peak_loss, live.peak)


def _hand_over(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _CountingStore:
    """An offload's store that keeps nothing but counts the bytes; what comes back is a new tensor.

    Implements `models.offload.Store`.
    """

    def __init__(self) -> None:
        self.moved = 0
        self.live: LiveBytes | None = None

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Count the tensor."""
        self.moved += tensor.nbytes
        shape, dtype = tensor.shape, tensor.dtype
        return lambda: torch.empty(shape, dtype=dtype, device="meta")

    def get(self, kept: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a tensor of the same shape on the device."""
        return kept()


def _liger_tile(model: PreTrainedModel, layouts: tuple[PackedLayout, ...], sequence: int) -> int:
    """Tokens of a chunk in Liger's fused loss: its logits take about as much as the hidden states (2410.10989)."""
    config = model.config.get_text_config()
    tokens = len(layouts) * layouts[0].length // sequence
    # Llama 3 8B, 65,536 tokens: 128,256 / 4,096 = 32 chunks of 2,048 tokens, rounded up to a power of two
    chunks = -(-config.vocab_size // config.hidden_size)
    return 1 << (max(-(-tokens // chunks), 1) - 1).bit_length()
