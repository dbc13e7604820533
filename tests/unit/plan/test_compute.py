"""Operations against what torch counts, shares against sums of squares, bytes sent against the formulas."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models import build_config
from anchorctx.models.config import MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.ulysses import bytes_sent
from anchorctx.plan.compute import _seconds, attention_of
from anchorctx.plan.config import Assumptions
from anchorctx.plan.planner import weights_of
from anchorctx.plan.rows import typical_rows
from anchorctx.plan.search import simulate
from anchorctx.plan.trace import meta_model
from anchorctx.testing.tiny import ARCHITECTURES

from .planning import planner

TOKENS = 24
DENSE = ["llama", "qwen3", "olmo2", "gemma3", "phi3", "gpt_neox"]
LONG = MemoryConfig(checkpoint_every=1, mlp_tile=512)


@pytest.mark.parametrize("name", DENSE)
def test_weights_and_operations_are_those_of_the_real_model(name: str) -> None:
    """Matrices and every (query, key) pair, which eager attention computes; the embedding table is not multiplied."""
    config = build_config(ARCHITECTURES[name].config(attention="reference"))
    model = ARCHITECTURES[name].build()
    assert weights_of(meta_model(config, config.num_hidden_layers, torch.float32)) == weights_of(model)
    model.set_attn_implementation("eager")
    ids = torch.arange(TOKENS)[None] % 90
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden, position_ids=torch.arange(TOKENS)[None], use_cache=False).logits.sum().backward()
    rotary = 2 * TOKENS * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    flops = ModelFlops.of(model)
    expected = flops.per_token * TOKENS + flops.per_pair * TOKENS**2 * config.num_hidden_layers
    extra = counter.get_total_flops() - expected
    assert 0 <= extra <= 4 * rotary, (extra, expected)  # transformers multiplies out the angles, once or twice


def test_the_saved_share_is_that_of_the_sums_of_squares() -> None:
    found = planner(tokens_per_step=8 * 4096)
    rows = typical_rows(found.config.corpus, 4096)
    plan = found.plan(ParallelConfig(zero_stage=3), LONG)
    pairs = 0
    for row in rows:
        lengths = [b - a for a, b in pairwise(row.doc_offsets[1:])]
        pairs += 1 + sum(n * (n + 1) // 2 + n for n in lengths)  # the anchor sees itself, and all see it
    assert plan.cost.saved == pytest.approx(1 - pairs / (len(rows) * 4096 * 4097 / 2), rel=1e-12)
    assert plan.cost.attention == pytest.approx(found.shape.flops.per_pair * 4 * pairs / len(rows) * 8)
    full = planner(pattern=Pattern.full).plan(ParallelConfig(zero_stage=3), LONG)
    assert full.cost.saved == 0 and full.cost.linear == plan.cost.linear


def test_a_layers_recomputation_costs_a_third_of_it_and_no_operations() -> None:
    found = planner()
    plain, again = (
        found.plan(ParallelConfig(zero_stage=3), MemoryConfig(checkpoint_every=every)).cost for every in (0, 1)
    )
    assert (again.linear, again.attention) == (plain.linear, plain.attention)
    assert again.compute_seconds == pytest.approx(4 / 3 * plain.compute_seconds)


def test_what_an_h200_took() -> None:
    """Milliseconds of attention alone, seconds of training steps: benchmarks/gpu/attention_h200.json, kit_h200.json."""
    found = planner(gpu="H200")
    job = replace(found.job(ParallelConfig(zero_stage=2), MemoryConfig()), every=0)
    rate = functools.partial(_seconds, machine=found.config.machine, assume=Assumptions(linear=1.0))
    heads = replace(found.shape, layers=1, flops=ModelFlops(0.0, 12.0 * 128 * 32, (None,)), hidden=0, vocabulary=0)
    token, pair = rate(heads, job)
    for length, copies, milliseconds in ((1025, 64, 10.65), (2049, 32, 16.03), (8192, 8, 50.48), (65_536, 1, 374.3)):
        operations = attention_of(heads.flops, np.full(copies, length)).sum()
        assert 1000 * (length * copies * token + operations * pair) == pytest.approx(milliseconds, rel=0.05)
    # Llama-3.2-1B's shape, 65,536 tokens: full attention, then with copies, 95.3 % of it left out, every layer
    # recomputed; then every second, with 95.9 % left out
    weights, flops = 1.2358e9, ModelFlops(6 * 1.2358e9, 12.0 * 64 * 32, (None,) * 16)
    shape = replace(found.shape, weights=weights, flops=flops, layers=16, hidden=2048, vocabulary=128_256)
    operations = attention_of(flops, np.array([65_536])).sum()
    for every, left, seconds in ((1, 1.0, 5.771), (1, 0.0466, 1.739), (2, 0.041, 1.651)):
        token, pair = _seconds(shape, replace(job, every=every), found.config.machine, Assumptions())
        assert 65_584 * token + left * operations * pair == pytest.approx(seconds, rel=0.05)


def test_bytes_sent_in_a_step() -> None:
    """A full row is one document, which is shared where it fits no piece; ZeRO communicates in every pass."""
    found = planner(tokens_per_step=4 * 4096, pattern=Pattern.full)
    plans = {
        (stage, sequence): found.plan(ParallelConfig(zero_stage=stage, sequence_parallel=sequence), LONG, 1024)
        for stage, sequence in ((1, 4), (2, 4), (3, 4), (3, 8))
    }
    assert [plan.cost.pieces for plan in plans.values()] == [2, 2, 2, 4]
    once = 2 * found.weights.count * 7 // 8
    assert [plan.cost.zero_bytes for plan in plans.values()] == pytest.approx([2 * once, 3 * once, 6 * once, 12 * once])
    shape = {"tokens": 4096, "heads": 8, "kv_heads": 2, "head_dim": 8, "element": 2}
    for (_, sequence), plan in plans.items():  # forward, recomputed, backward
        assert plan.cost.sequence_bytes == 3 * 4 * plan.cost.pieces * bytes_sent(**shape, sequence=sequence)


@pytest.mark.parametrize("micro_tokens", [None, 1024])
def test_scaling_on_paper(micro_tokens: int | None) -> None:
    found = planner()
    points = simulate(found, found.plan(ParallelConfig(zero_stage=3), LONG, micro_tokens))
    assert {point["sequence"] for point in points} == {1, 2, 4, 8}
    assert max(point["gpus"] for point in points) == 1024
    one = points[0]
    assert (one["gpus"], one["efficiency"], one["zero_bytes"], one["sequence_bytes"]) == (1, 1.0, 0.0, 0.0)
    for point in points:
        assert point["gpus"] == point["sequence"] * point["data"]
        # nothing is exchanged where a row is a piece; of 1,024 tokens there are longer documents
        assert (point["sequence_bytes"] > 0) == (point["sequence"] > 1 and micro_tokens is not None)
        per_gpu = point["tokens_per_second"] / point["gpus"]
        assert 0 < point["efficiency"] <= 1
        assert per_gpu == pytest.approx(point["efficiency"] * 4096 / point["compute_seconds"])
        if micro_tokens is None:
            assert point["zero_bytes"] == pytest.approx(6 * found.weights.count * (1 - 1 / point["gpus"]))


def test_slower_links_make_slower_steps() -> None:
    fast = planner()
    slow = planner(assume=replace(fast.config.assume, gpus_per_machine=4, network_gb=1.0))
    parallel = ParallelConfig(zero_stage=3, sequence_parallel=8)
    assert slow.plan(parallel, LONG, 512).cost.seconds > 2 * fast.plan(parallel, LONG, 512).cost.seconds


def test_layouts_of_all_rows_count() -> None:
    """Attention's operations are the mean over the corpus' rows, not those of one."""
    found = planner()
    each = [found.shape.flops.attention(row) for row in typical_rows(found.config.corpus, 4096)]
    plan = found.plan(ParallelConfig(zero_stage=3), LONG)
    assert np.ptp(each) > 0
    assert plan.cost.attention == pytest.approx(np.mean(each) * plan.job.rows)
    assert found.shape.flops.attention_saved([PackedLayout((0, 8))]) == 0
