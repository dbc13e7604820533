"""The memory switches, applied to a model: what is recomputed, tiled and moved away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from anchorctx.models.config import ActivationStore, MemoryConfig
from anchorctx.models.offload import FolderStore, Offload, PinnedStore, check_space

logger = logging.getLogger(__name__)

Saving = Callable[[], AbstractContextManager[object]]


def saving(memory: MemoryConfig, device: torch.device) -> Saving:
    """The context in which the model runs forward: it moves the inputs of recomputed layers, or does nothing."""
    if memory.offload_activations is ActivationStore.folder:
        assert memory.offload_folder is not None
        return Offload(FolderStore(Path(memory.offload_folder)))
    if memory.offload_activations is ActivationStore.cpu and device.type == "cpu":
        logger.warning("memory.offload_activations=cpu is left out: the activations are in CPU memory already")
        return nullcontext
    if memory.offload_activations is ActivationStore.cpu:
        return Offload(PinnedStore(device))
    return nullcontext


def offloaded_bytes(model: PreTrainedModel, tokens: int, every: int) -> int:
    """Bytes of the inputs of all recomputed layers for `tokens` tokens of this process."""
    config = model.config.get_text_config()
    # one (tokens, hidden) input for each recomputed layer: every=2 of 5 layers keeps 3
    layers = -(-config.num_hidden_layers // every)
    return layers * tokens * config.hidden_size * model.dtype.itemsize


def check_offload(memory: MemoryConfig, model: PreTrainedModel, tokens: int, every: int, processes: int) -> None:
    """UserError when the offload folder cannot hold a step's activations of so many processes on this machine."""
    if memory.offload_activations is ActivationStore.folder:
        assert memory.offload_folder is not None
        check_space(Path(memory.offload_folder), processes * offloaded_bytes(model, tokens, every))
