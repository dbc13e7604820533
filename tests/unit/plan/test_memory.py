"""The trace of a model without values against the same steps with values, and bytes by ZeRO stage."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from anchorctx.attention.config import RopeDtype
from anchorctx.layout import PackedLayout
from anchorctx.models import ModelConfig, build_config, checkpoint_activations, load_model
from anchorctx.models.config import ActivationStore, LossKind, MemoryConfig
from anchorctx.models.loss import CausalLMLoss
from anchorctx.models.tiled_mlp import tile_mlps
from anchorctx.parallel.config import ParallelConfig
from anchorctx.plan.memory import SUMMED, Weights, worst_moment
from anchorctx.plan.trace import LiveBytes, Traced, trace

from .planning import SMALL, planner

LAYOUT = PackedLayout((0, 1, 300, 900, 1024), 1)
SWITCHES = {
    "nothing": MemoryConfig(loss=LossKind.whole),
    "recomputed": MemoryConfig(checkpoint_every=1, loss_tile=128),
    "every second": MemoryConfig(checkpoint_every=2, loss_tile=128, mlp_tile=256),
}


def traced(memory: MemoryConfig, layout: PackedLayout = LAYOUT, sequence: int = 1) -> Traced:
    return trace(
        build_config(ModelConfig(config=SMALL)),
        (layout,),
        dtype=torch.float32,
        rope_dtype=RopeDtype.float32,
        memory=memory,
        every=memory.checkpoint_every,
        sequence=sequence,
        cuda=False,
    )


def real(memory: MemoryConfig, layout: PackedLayout = LAYOUT) -> dict[str, int]:
    """Bytes that a real forward and backward pass on the CPU holds at its moments."""
    model: PreTrainedModel = load_model(ModelConfig(config=SMALL, attention="cpu")).train()
    if memory.checkpoint_every:
        checkpoint_activations(model, every=memory.checkpoint_every)
    if memory.mlp_tile:
        tile_mlps(model, memory.mlp_tile)
    module = CausalLMLoss(model, tile_tokens=memory.loss_tile, kind=memory.loss)
    ids = torch.arange(layout.length)[None] % 500
    labels = ids.masked_fill(torch.arange(layout.length) < 1, -100)
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.ignore(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        loss = module(ids, layout.position_ids()[None], (layout,), labels)
        forward = live.peak
        live.restart()
        loss.backward()
        return {"forward": forward, "backward": live.peak}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_trace_without_values_counts_the_bytes_of_the_real_step(name: str) -> None:
    found, expected = traced(SWITCHES[name]), real(SWITCHES[name])
    assert max(found.forward, found.loss) == pytest.approx(expected["forward"], rel=0.02)
    assert found.backward == pytest.approx(expected["backward"], rel=0.02)


def test_recomputed_layers_keep_their_inputs_which_may_wait_elsewhere() -> None:
    """One (T, D) tensor a layer, the last one's output before and after the norm, positions and angles."""
    found = traced(MemoryConfig(checkpoint_every=1))
    inputs = 1024 * 64 * 4
    assert 5 * inputs <= found.kept <= 8 * inputs
    away = traced(MemoryConfig(checkpoint_every=1, offload_activations=ActivationStore.cpu))
    assert away.moved == 0  # below a megabyte nothing is moved
    four = PackedLayout((0, 1, 4096), 1)
    away, held = (
        traced(MemoryConfig(checkpoint_every=1, offload_activations=store), four)
        for store in (ActivationStore.cpu, ActivationStore.device)
    )
    assert (
        away.moved == (4 + 3) * 4096 * 64 * 4 and held.moved == 0
    )  # four layers' inputs, and what the last norm keeps
    assert held.kept - away.kept == away.moved - 4096 * 64 * 4  # one is the output, which stays until the loss


def test_bytes_of_activations_grow_with_the_row_and_shrink_with_its_sharing() -> None:
    memory = MemoryConfig(checkpoint_every=1, mlp_tile=256, loss_tile=128)
    documents = tuple(range(1, 8193, 512))
    short = traced(memory, PackedLayout((0, *documents[:9]), 1))
    long = traced(memory, PackedLayout((0, *documents, 8193), 1))
    assert long.kept / 8193 == pytest.approx(short.kept / 4097, rel=0.05)
    row = PackedLayout((0, 1, 4096), 1)
    assert traced(memory, row, sequence=2).kept == pytest.approx(traced(memory, row).kept / 2, rel=0.05)


@pytest.mark.slow
def test_a_real_steps_bytes_a_token_are_constant_from_8k_to_64k() -> None:
    """Slow: real steps of 8,192 to 65,536 tokens, recomputed and tiled; the bytes that each further token takes."""
    memory = MemoryConfig(checkpoint_every=1, mlp_tile=256, loss_tile=128)
    peaks = []
    for length in (4096, 8192, 16_384, 32_768, 65_536):
        layout = PackedLayout((0, *range(1, length - 511, 512), length), 1)
        peaks.append((length, real(memory, layout)["backward"]))
    grown = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(peaks)]
    assert max(grown) < 1.05 * min(grown), grown


WEIGHTS = Weights(count=1_000_000, largest=100_000, element=2)
NOTHING = Traced(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(1, 2.0, 2.0, 12.0), (2, 2.0, 4.0 / 8, 12.0), (3, 2.0, 4.0, 12.0)],
)
def test_states_by_stage(stage: int, parameters: float, gradients: float, optimizer: float) -> None:
    """Bytes a weight on 8 GPUs, in the backward pass: ZeRO's table (1910.02054, figure 1), gradients in float32."""
    passing = Traced(0.0, 0.0, 0.0, 0.0, 1e9)  # so that the backward pass is the worst moment
    parts = worst_moment(WEIGHTS, passing, ParallelConfig(zero_stage=stage), world=8, pieces=1, runtime=5.0, cuda=True)
    assert parts.moment == "backward" and parts.runtime == 5.0
    assert parts.parameters == parameters * 1e6 / (8 if stage == 3 else 1)
    assert parts.gradients == (gradients * 1e6 / 8 if stage == 3 else gradients * 1e6)
    assert parts.optimizer == optimizer * 1e6 / 8


def test_pieces_hold_gradients_between_them() -> None:
    def at(stage: int, pieces: int) -> float:
        passing = Traced(0.0, 0.0, 1e9, 0.0, 0.0)
        return worst_moment(
            WEIGHTS,
            passing,
            ParallelConfig(zero_stage=stage),
            world=8,
            pieces=pieces,
            runtime=0.0,
            cuda=True,
        ).gradients

    assert (at(1, 1), at(2, 1)) == (0.0, 0.0)
    assert (at(1, 2), at(2, 2), at(3, 2)) == (2e6, SUMMED * 1e6 / 8, SUMMED * 1e6 / 8)


def test_offloaded_states_are_in_cpu_memory() -> None:
    parallel = ParallelConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    parts = worst_moment(WEIGHTS, NOTHING, parallel, world=8, pieces=1, runtime=0.0, cuda=True)
    assert parts.parameters == parts.optimizer == parts.gradients == 0
    assert parts.host == (12 + 4 + SUMMED + 2) * 1e6 / 8


def test_the_parts_are_the_total_and_decide() -> None:
    memory = MemoryConfig(checkpoint_every=1)
    plan = planner().plan(ParallelConfig(zero_stage=3), memory)
    parts = plan.parts
    named = parts.parameters + parts.gradients + parts.optimizer + parts.gathered + parts.activations
    assert parts.total == named + parts.logits + parts.working + parts.runtime
    exactly = parts.total / 2**30 / (1 - planner().config.assume.fragmentation)
    assert planner(gpu_memory_gib=exactly * 1.001).plan(plan.parallel, memory).fits
    assert not planner(gpu_memory_gib=exactly * 0.999).plan(plan.parallel, memory).fits
