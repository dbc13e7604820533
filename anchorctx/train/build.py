"""From a run's configuration to the module that DeepSpeed trains: model, memory switches, Ulysses, loss."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedModel

from anchorctx.models import build_config, checkpoint_activations, load_model
from anchorctx.models.load import check_weights, local_folder
from anchorctx.models.loss import CausalLMLoss
from anchorctx.models.memory import check_offload, saving
from anchorctx.models.tiled_mlp import tile_mlps
from anchorctx.parallel import ulysses
from anchorctx.parallel.loading import sharded_loading
from anchorctx.parallel.mesh import Mesh
from anchorctx.train.config import TrainConfig
from anchorctx.train.engine import deepspeed_config


def build_model(config: TrainConfig, mesh: Mesh) -> PreTrainedModel:
    """The model, whole in every process, or under ZeRO 3 each process's share of it.

    A new model is always built whole: under ZeRO 3 transformers would draw other random weights.
    """
    hf_config = build_config(config.model)
    ulysses.check_sizes(hf_config, config.parallel.sequence_parallel, mesh.ranks.world)
    if config.model.path:
        local_folder(config.model.path, weights=True)  # a GGUF file is dequantised whole, before anything is sharded
    with contextlib.ExitStack() as stack:
        # Headers first: under sharded loading transformers fills missing weights in silence.
        if config.parallel.zero_stage == 3 and config.memory.sharded_loading and config.model.path:
            check_weights(config.model.path, hf_config)
            stack.enter_context(sharded_loading(engine_config(config, mesh)))
        return load_model(config.model)


def build_module(config: TrainConfig, model: PreTrainedModel, mesh: Mesh, tokens: int, row_length: int) -> CausalLMLoss:
    """The model with its memory switches and attention, and the loss around it.

    A forward pass holds about `tokens` tokens, of rows of `row_length`.
    """
    memory = config.memory
    if every := memory.checkpoint_every:
        checkpoint_activations(model, every=every)
        check_offload(memory, model, tokens, every, mesh.ranks.world)
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    ulysses.enable(model, mesh)
    return CausalLMLoss(
        model,
        tile_tokens=memory.loss_tile,
        kind=memory.loss,
        row_length=row_length,
        saving=saving(memory, mesh.ranks.device),
    )


def engine_config(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """The whole DeepSpeed configuration of the run."""
    import torch

    return deepspeed_config(
        config.parallel,
        config.optim,
        dtype=getattr(torch, config.model.dtype.value),
        world=mesh.ranks.world,
        cuda=mesh.ranks.device.type == "cuda",
    )
