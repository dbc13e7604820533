"""What a DeepSpeed engine holds, as fragments of weights: read out for a checkpoint, filled from one.

The fragments are views of the engine's own tensors, so that one description of where a weight lies in them serves both
ways. What else an engine has is made anew by the configuration: learning rate, betas, eps, decay and clipping are those
of the run that continues. Tried with DeepSpeed 0.19.8, ZeRO 1, 2 and 3, with and without offloading.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as torch_dist

from anchorctx.flops import whole_shape
from anchorctx.train.checkpoints.tensors import WEIGHT, Fragment, Shards

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each number of a weight."""
Flat = tuple[list[torch.Tensor], torch.Tensor]
"""Parameters of a group, and this rank's part of all their float32 weights, one behind the other."""


def read_out(engine: Any, is_main: bool) -> tuple[list[Fragment], int]:
    """This rank's fragments, views of what it trains with, and the number of updates that Adam made."""
    optimizer, flats = engine.optimizer.optimizer, _flats(engine)
    return [*_trained(engine), *_kept(engine, whole=is_main)], int(optimizer.state[flats[0][1]]["step"])


@torch.no_grad()
def fill(engine: Any, shards: Shards) -> None:
    """Make the engine's states those of a checkpoint, which `Shards.check` found whole."""
    zero = engine.optimizer
    for _, flat in _flats(engine):
        _begin(zero.optimizer, flat, shards.updates)
    if _is_stage_3(engine):
        zero.checkpoint_event_prologue()  # gives up the parameters that are gathered now
    for fragment in [*_trained(engine), *_kept(engine, whole=True)]:
        for kind, tensor in fragment.states.items():
            shards.copy(kind, fragment.name, fragment.start, tensor)
    if not _is_stage_3(engine):
        zero.update_lp_params()  # the weights that the model computes with, of all ranks
        return
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)  # the same, as after an update
    zero.checkpoint_event_epilogue()


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Shapes of all that a checkpoint holds of the model: its weights, and buffers that belong to its state."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(_buffers(model))
    return {name: list(whole_shape(tensor)) for name, tensor in found.items()}


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Other names of weights, such as a head's that is the embedding, and the name under which each is stored."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _trained(engine: Any) -> Iterator[Fragment]:
    """Of the parameters that the optimizer updates: their float32 weights, and their moments where there are any."""
    names = {id(parameter): name for name, parameter in engine.module.model.named_parameters()}
    states = engine.optimizer.optimizer.state
    for parameters, flat in _flats(engine):
        held = {WEIGHT: flat, **{kind: states[flat][kind] for kind in MOMENTS if kind in states[flat]}}
        offset = 0
        for parameter in parameters:
            start, where, numbers = _stretch(engine, parameter, offset)
            if numbers:
                parts = {kind: tensor.detach().narrow(0, where, numbers) for kind, tensor in held.items()}
                yield Fragment(names[id(parameter)], start, parts)
            offset += parameter.partition_numel() if hasattr(parameter, "ds_numel") else 0  # type: ignore[attr-defined]


def _stretch(engine: Any, parameter: Any, offset: int) -> tuple[int, int, int]:
    """Where this rank's stretch of a parameter begins in it, where in the rank's flat tensor, and how long it is.

    `offset` is where the parameter's part begins in the flat tensor under ZeRO 3.
    """
    if _is_stage_3(engine):
        # 10 numbers on 4 ranks: shares of 3, the last with 2 of padding; rank 3 has number 9 alone
        share = parameter.partition_numel()
        start = torch_dist.get_rank(engine.optimizer.dp_process_group) * share
        return start, offset, max(min(share, parameter.ds_numel - start), 0)
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is with other ranks
        return 0, 0, 0
    place = mapping.get_hp_fragment_address()
    return mapping.lp_fragment_address.start, place.start, place.numel


def _kept(engine: Any, *, whole: bool) -> Iterator[Fragment]:
    """What is not trained: frozen parameters and buffers; those that every rank holds, only where `whole` asks."""
    model = engine.module.model
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, tensor in [*frozen, *_buffers(model)]:
        if hasattr(tensor, "ds_tensor"):
            share: Any = tensor.ds_tensor  # type: ignore[attr-defined]
            start = torch_dist.get_rank() * share.numel()
            numbers = max(min(share.numel(), tensor.ds_numel - start), 0)  # type: ignore[attr-defined]
            if numbers:
                yield Fragment(name, start, {WEIGHT: share.detach().view(-1).narrow(0, 0, numbers)})
        elif whole:
            yield Fragment(name, 0, {WEIGHT: tensor.detach().view(-1)})


def _flats(engine: Any) -> list[Flat]:
    zero = engine.optimizer
    if _is_stage_3(engine):
        return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
    return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))


def _begin(adam: torch.optim.Optimizer, flat: torch.Tensor, updates: int) -> None:
    """Give Adam the states that it would make at its first update, with so many updates made."""
    state = adam.state[flat]
    for kind in MOMENTS:
        state[kind] = torch.zeros_like(flat, requires_grad=False)
    # torch's AdamW counts in a tensor, on the weights' device where it is fused; DeepSpeed's CPU Adam in an int
    is_torchs = isinstance(adam, torch.optim.AdamW)
    device = flat.device if adam.defaults.get("fused") else torch.device("cpu")
    state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=device) if is_torchs else updates


def _buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    stored = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def _is_stage_3(engine: Any) -> bool:
    return engine.zero_optimization_stage() == 3
