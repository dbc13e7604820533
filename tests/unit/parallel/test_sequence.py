"""Meshes, slices of rows and refusals of sequence parallelism, in one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern, Positions
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.dist import Ranks
from anchorctx.parallel.mesh import Mesh, check_heads, nearest, sequence_sizes
from anchorctx.parallel.sharder import padded, shard_batch
from anchorctx.testing import decoders
from anchorctx.testing.tiny import ARCHITECTURES

CPU = torch.device("cpu")


@dataclass
class Rows:
    input_ids: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor
    layouts: tuple[PackedLayout, ...]


def rows(length: int = 11, count: int = 2) -> Rows:
    ids = torch.arange(count * length).view(count, length) + 1
    weights = torch.rand(count, length, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    layouts = (PackedLayout((0, 1, 4, length), 1), PackedLayout((0, 1, 3, 6, length), 1, doc_ids=(0, 1, 2, 1)))
    return Rows(ids, ids.masked_fill(weights == 0, -100), weights, layouts[:count])


def test_ranks_that_are_neighbours_share_rows() -> None:
    meshes = [Mesh.of(Ranks(rank, 6, CPU), 3) for rank in range(6)]
    assert [mesh.sequence_rank for mesh in meshes] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("sequence", [1, 2, 3, 4])
def test_slices_put_together_are_the_rows_with_their_targets(sequence: int) -> None:
    batch = rows()
    slices = [
        shard_batch(*vars(batch).values(), Mesh(Ranks(rank, sequence, CPU), sequence)) for rank in range(sequence)
    ]
    joined = {
        name: torch.cat([getattr(s, name) for s in slices], dim=1) for name in ("input_ids", "targets", "loss_weights")
    }
    length = slices[0].layouts[0].length
    assert length == -(-11 // sequence) * sequence and joined["input_ids"].shape == (2, length)
    assert joined["input_ids"][:, :11].equal(batch.input_ids)
    assert joined["targets"][:, :11].equal(batch.targets)  # also across slices
    assert (joined["targets"][:, 11:] == -100).all() and (joined["loss_weights"][:, 11:] == 0).all()
    assert joined["loss_weights"][:, :11].equal(batch.loss_weights)
    assert all(s.targets.flatten()[s.trained].equal(s.targets[s.targets != -100]) for s in slices)
    positions = torch.cat([s.position_ids for s in slices], dim=1)
    assert positions[:, :11].equal(torch.stack([layout.position_ids() for layout in batch.layouts]))


@pytest.mark.parametrize("pattern", list(Pattern))
def test_padding_changes_nothing_that_the_rows_tokens_see(pattern: Pattern) -> None:
    for row in rows().layouts:
        before = pattern.apply(row)
        after = padded(before, 8)
        assert after.length == 16 and (after.allowed_array()[:11, :11] == before.allowed_array()).all()
        assert not after.allowed_array()[:11, 11:].any()
        assert (after.position_array()[:11] == before.position_array()).all()
        assert padded(before, 11) is before
    assert padded(PackedLayout((0, 5), positions=Positions.reset), 2).position_array()[-1] == 0


def test_sizes_that_can_share_heads() -> None:
    assert sequence_sizes(32, 8) == [1, 2, 4, 8, 16, 32]  # above 8 the key heads are replicated
    assert sequence_sizes(12, 2) == [1, 2, 4, 6, 12]
    assert sequence_sizes(28, 4) == [1, 2, 4, 28]
    assert nearest(3, [1, 2, 4]) == 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: Mesh.of(Ranks(0, 2, CPU), 4),
            "=4 needs at least as many processes, but .* 2: start 4, or use 2",
        ),
        (lambda: Mesh.of(Ranks(0, 6, CPU), 4), "6 processes do not divide into groups of .*=4: use 3, or start 8"),
        (
            lambda: check_heads(28, 4, 8),
            "cannot share 28 attention heads and 4 .*use 4 .possible: 1, 2, 4, 28",
        ),
        (lambda: ulysses.check_core("sdpa"), "'sdpa' cannot run .*ignores the layouts, so that documents of a row"),
        (lambda: ulysses.check_core("flex_attention"), "'flex_attention' .*plain causal one"),
        (
            lambda: ParallelConfig(zero_stage=0, sequence_parallel=2).validate(),
            "parallel.zero_stage=0 must be between 1 and 3",
        ),
        (lambda: ParallelConfig(sequence_parallel=0).validate(), "sequence_parallel=0 must be at least 1"),
    ],
)
def test_what_is_refused_and_why(call, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call()


def test_rope_that_depends_on_the_length_in_sight_is_refused() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=4, rope_parameters=scaling)
    ulysses.check_sizes(config, 1)
    with pytest.raises(UserError, match="rope.type=dynamic cannot run under sequence parallelism.*use yarn"):
        ulysses.check_sizes(config, 2)


@pytest.mark.parametrize("name", ["mimo_v2_flash", "gemma4_text"])
def test_layers_of_several_shapes_are_refused(name: str) -> None:
    model = decoders.build(decoders.tiny(name), "eager")
    with pytest.raises(UserError, match=r"layers with .* query heads a key head.* set it to 1"):
        ulysses.check_alike(model)


def test_layers_of_one_shape_pass() -> None:
    ulysses.check_alike(ARCHITECTURES["llama"].build())
    config = decoders.tiny("llama4")  # what reads images takes no part
    config.vision_config.hidden_size *= 2
    ulysses.check_alike(decoders.build(config, "eager"))


def test_the_registration_is_told_what_some_architectures_leave_out() -> None:
    model = ARCHITECTURES["gpt_neox"].build()
    facts = ulysses._facts(model.config, "anchor").config
    assert (facts.num_key_value_heads, facts.head_dim) == (4, 8)


def test_the_formula_of_bytes() -> None:
    """Query and output with 32 heads, keys and values with 8: 80 head slices of T/SP tokens, 7 of 8 to others."""
    sent = ulysses.bytes_sent(tokens=65_536, heads=32, kv_heads=8, head_dim=128, element=2, sequence=8)
    assert sent == 8192 * 128 * 2 * 80 * 7 // 8
    assert ulysses.bytes_sent(tokens=8, heads=4, kv_heads=4, head_dim=8, element=4, sequence=1) == 0
    replicated = ulysses.bytes_sent(tokens=64, heads=8, kv_heads=2, head_dim=8, element=4, sequence=4)
    assert replicated == 16 * 8 * 4 * (16 + 8) * 3 // 4
