"""The passes of a step: the same pieces as the training's loader deals out, and what they cost."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from anchorctx.data.pieces import AnchorVisible, Cutting, deal_pieces
from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models.config import MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.ulysses import exchanged_bytes
from anchorctx.plan.compute import attention_of
from anchorctx.plan.config import Assumptions, CorpusConfig
from anchorctx.plan.passes import Documents, deal_steps

from .planning import planner

FLOPS = ModelFlops(per_token=6e6, per_pair=12.0 * 64, windows=(None, 96, 96))
ROWS = (
    PackedLayout((0, 2, 100, 101, 400, 1000), 2),
    PackedLayout((0, 2, 300, 350, 700, 1000), 2, doc_ids=(0, 1, 2, 1, 3)),  # a document in two segments
    PackedLayout((0, 2, *range(3, 1000, 37), 1000), 2),
    PackedLayout((0, 2, 998, 1000), 2),
)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("gpus", "sequence"), [(1, 1), (4, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize("micro_tokens", [64, 300, 1100, 5000])
def test_the_plans_pieces_are_the_loaders(shared: bool, gpus: int, sequence: int, micro_tokens: int) -> None:
    documents = Documents.of(ROWS, shared)
    attention = partial(attention_of, FLOPS)
    spread = {"rows": 4, "micro_tokens": micro_tokens, "gpus": gpus, "sequence": sequence}
    dealt = deal_steps(documents, attention, FLOPS.token_cost, **spread)
    for rank in range(gpus):
        cutting = Cutting(micro_tokens, rank, gpus, sequence, FLOPS.token_cost, shared)
        found = deal_pieces(ROWS, cutting)
        assert found.long_documents == dealt.long_documents and len(found.pieces) == dealt.pieces[0]
        planned = [
            (int(tokens), passes.spread)
            for passes in dealt.steps[0]
            for tokens in passes.tokens[:, rank // (sequence if passes.spread else 1)]
        ]
        expected = [(piece.layout(2, cutting) if piece.documents else None, piece.spread) for piece in found.pieces]
        anchor = 2 if shared else 0
        assert planned == [(layout.length - anchor if layout else 0, share) for layout, share in expected]
    if not shared:  # the merge is not counted
        layouts = [piece.layout(2, Cutting(64)) for piece in deal_pieces(ROWS, Cutting(10**6)).pieces]
        whole = sum(passes.attention.sum() for passes in dealt.steps[0])
        assert whole == pytest.approx(sum(FLOPS.attention(layout) for layout in layouts), rel=1e-12)


def test_steps_take_the_rows_one_after_the_other_and_again() -> None:
    documents = Documents.of(ROWS, shared_anchor=False)
    assert documents.longest == 996 + 2
    assert [len(step) for step in documents.steps(2)] == [
        len(documents.rows[0]) + len(documents.rows[1]),
        len(documents.rows[2]) + len(documents.rows[3]),
    ]
    (step,) = documents.steps(6)
    assert step.tolist() == np.concatenate([documents.rows[i] for i in (0, 1, 2, 3, 0, 1)]).tolist()


def test_documents_that_fit_a_piece_exchange_nothing_and_longer_ones_what_ulysses_sends() -> None:
    memory = MemoryConfig(checkpoint_every=2)
    parallel = ParallelConfig(zero_stage=3, sequence_parallel=8)
    found = planner(corpus=CorpusConfig(rows=8, longest=1500), tokens_per_step=8 * 4096)
    assert found.plan(parallel, memory, 1501).cost.sequence_bytes == 0
    plan = found.plan(parallel, memory, 1000)
    lengths = [n for row in found.documents.rows for n in row.tolist() if n > 1000]
    assert plan.cost.long_documents == len(lengths) > 0
    config = found.hf_config
    assert plan.cost.sequence_bytes == sum(exchanged_bytes(config, n, 2, 8, 0.5) for n in lengths)
    assert plan.cost.exchange_seconds > 0
    alone = found.plan(ParallelConfig(zero_stage=3), memory, 1000)  # a long document is a piece of one GPU
    assert (alone.cost.sequence_bytes, alone.cost.long_documents) == (0, plan.cost.long_documents)


def test_memory_does_not_grow_with_the_row() -> None:
    memory = MemoryConfig(checkpoint_every=1)
    parts = [
        planner(row_length=length, micro_tokens=2048, corpus=CorpusConfig(rows=2, longest=1500), tokens_per_step=2**20)
        .plan(ParallelConfig(zero_stage=3), memory)
        .parts
        for length in (16_384, 131_072, 1_048_576)
    ]
    assert parts[0] == parts[1] == parts[2]


def test_memory_is_that_of_the_longest_document_or_of_a_piece() -> None:
    memory = MemoryConfig(checkpoint_every=1, mlp_tile=1024, loss_tile=1024)
    found = planner(row_length=16_384, corpus=CorpusConfig(rows=2, longest=8192))
    alone = found.plan(ParallelConfig(zero_stage=3), memory, 512)
    assert (alone.held.tokens, alone.held.each, alone.held.document) == (8193, 8193, True)
    shared = found.plan(ParallelConfig(zero_stage=3, sequence_parallel=8), memory, 512)
    assert (shared.held.tokens, shared.held.each, shared.held.document) == (8193, 1025, True)
    piece = found.plan(ParallelConfig(zero_stage=3, sequence_parallel=8), memory, 4096)
    assert (piece.held.tokens, piece.held.each, piece.held.document) == (4096, 4096, False)
    assert shared.parts.total < piece.parts.total < alone.parts.total
    full = planner(pattern=Pattern.full, row_length=16_384, corpus=CorpusConfig(rows=2, longest=8192))
    assert full.plan(ParallelConfig(zero_stage=3, sequence_parallel=8), memory, 2048).held.tokens == 16_384


def test_the_merge_is_planned_in_memory() -> None:
    """One anchor in front of a piece: scores of the anchor and the merge's temporaries come on top."""
    corpus = CorpusConfig(rows=2, longest=1500)
    window, always = (
        planner(corpus=corpus, micro_tokens=2048, anchor_visible=visible).plan(
            ParallelConfig(zero_stage=3), MemoryConfig()
        )
        for visible in AnchorVisible
    )
    assert window.held.tokens == always.held.tokens and window.parts.activations < always.parts.activations
    assert window.cost.computed > always.cost.computed  # no copies


def test_a_pass_lasts_as_long_as_its_costliest_piece_and_as_the_cpu_takes_to_issue_it() -> None:
    memory = MemoryConfig(checkpoint_every=1)
    quick = planner().plan(ParallelConfig(zero_stage=3), memory).cost
    dealt = planner().dealt(planner().job(ParallelConfig(zero_stage=3), memory))
    (passes,) = dealt.steps[0]
    uneven = (passes.tokens.max(1) / passes.tokens.mean(1)).mean()
    assert 0 < quick.waiting_seconds < uneven * quick.compute_seconds
    slow = planner(assume=Assumptions(layer_ms=2.0)).plan(ParallelConfig(zero_stage=3), memory).cost
    assert slow.compute_seconds + slow.waiting_seconds == pytest.approx(0.002 * 4 * 3 * slow.pieces)
    assert math.isclose(slow.pieces, np.mean(dealt.pieces))
