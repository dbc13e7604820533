"""The three identities that a packed row obeys exactly, in float64, outputs and gradients, over random layouts.

1. A packed row equals every document run alone behind the anchor at the same positions.
2. `intra_doc` equals `intra_doc_reset`: rotary positions are relative.
3. One shared anchor equals a private copy of the anchor in front of every document.

Each holds for `attend` alone and through a whole Llama. The runs to compare with use torch's and transformers' own
causal attention, nothing of this package.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from anchorctx.attention import attend, register
from anchorctx.layout import PackedLayout, Positions
from anchorctx.testing.numerics import max_error
from anchorctx.testing.tiny import true_float64

from .strategies import layouts, tensors

# Absolute, for outputs and gradients of order 1 to 10, summed over up to 100 tokens in another order. Largest seen over
# 200 random layouts for attention and 60 for the model: 1.4e-14 and 5.0e-13.
ATTENTION, MODEL = 1e-13, 5e-12
HEADS, KV_HEADS, DIM = 4, 2, 8
BACKENDS = ["reference", "cpu"]
many = settings(max_examples=40, deadline=None, derandomize=True)
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def document_indices(row: PackedLayout) -> list[np.ndarray]:
    """Token indices of every document, the anchor not counted."""
    docs = row.token_docs()[row.anchor_len :]
    return [np.flatnonzero(docs == doc) + row.anchor_len for doc in dict.fromkeys(docs.tolist())]


def runs_alone(row: PackedLayout) -> list[torch.Tensor]:
    """Token indices of anchor + document, one a document."""
    anchor = np.arange(row.anchor_len)
    return [torch.from_numpy(np.concatenate([anchor, index])) for index in document_indices(row)]


# -- attention alone --------------------------------------------------------------------------------------------------


def gradients(
    outputs: list[torch.Tensor], weights: list[torch.Tensor], leaves: list[torch.Tensor]
) -> list[torch.Tensor]:
    return list(torch.autograd.grad(outputs, leaves, weights))


@many
@given(row=layouts(max_tokens=100), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_packed_equals_documents_alone(backend: str, row: PackedLayout, seed: int) -> None:
    q, k, v, do = tensors(1, HEADS, KV_HEADS, row.length, DIM, seed=seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed = attend(q, k, v, (row,), backend=backend)
    alone, weights, expected = [], [], torch.zeros_like(packed)
    for number, index in enumerate(runs_alone(row) or [torch.arange(row.length)]):
        own = slice(0 if number == 0 else row.anchor_len, None)  # the anchor's own output counts once
        out = scaled_dot_product_attention(*(x[:, :, index] for x in leaves), is_causal=True, enable_gqa=True)
        expected[:, :, index[own]] = out[:, :, own].detach()
        alone.append(out[:, :, own])
        weights.append(do[:, :, index[own]])
    assert max_error(packed, expected) < ATTENTION
    for a, b in zip(gradients([packed], [do], leaves), gradients(alone, weights, leaves), strict=True):
        assert max_error(a, b) < ATTENTION


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in complex float64: (B, H, T, D), positions (T,) or (B, 1, T)."""
    frequencies = 1e4 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = positions[..., None] * frequencies
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@many
@given(row=layouts(max_tokens=100, anchor_len=0), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_the_same_for_continuous_and_reset_positions(backend: str, row: PackedLayout, seed: int) -> None:
    # An interleaved document's continuous positions have gaps, so only whole documents are only shifted.
    row = replace(row, doc_ids=None)
    q, k, v, do = tensors(1, HEADS, KV_HEADS, row.length, DIM, seed=seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for positions in Positions:
        layout = replace(row, positions=positions)
        ids = layout.position_ids()
        out = attend(rotate(q, ids), rotate(k, ids), v, (layout,), backend=backend)
        results.append([out, *gradients([out], [do], leaves)])
    for a, b in zip(*results, strict=True):
        assert max_error(a, b) < ATTENTION


def with_private_anchors(row: PackedLayout) -> tuple[torch.Tensor, PackedLayout]:
    """Token indices of a row in which every document has its own copy of the anchor, and its layout (no anchor)."""
    runs = runs_alone(row)
    return torch.cat(runs), PackedLayout((0, *np.cumsum([len(run) for run in runs]).tolist()))


def own_tokens(row: PackedLayout, copied: PackedLayout) -> torch.Tensor:
    """Indices in the copied row of the tokens that count: the first anchor copy and every document."""
    return torch.from_numpy(
        np.concatenate([np.arange(row.anchor_len), np.flatnonzero(copied.token_ranks() >= row.anchor_len)])
    )


@many
@given(row=layouts(max_tokens=100), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_shared_anchor_equals_private_copies(backend: str, row: PackedLayout, seed: int) -> None:
    if not document_indices(row):
        return  # the anchor alone: nothing to put a copy in front of
    q, k, v, do = tensors(1, HEADS, KV_HEADS, row.length, DIM, seed=seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    index, copied = with_private_anchors(row)
    own = own_tokens(row, copied)
    shared = attend(q, k, v, (row,), backend=backend)[:, :, index[own]]
    private = attend(*(x[:, :, index] for x in leaves), (copied,), backend=backend)[:, :, own]
    weights = do[:, :, index[own]]
    assert max_error(shared, private) < ATTENTION
    pairs = zip(gradients([shared], [weights], leaves), gradients([private], [weights], leaves), strict=True)
    for a, b in pairs:
        assert max_error(a, b) < ATTENTION


# -- through a whole model --------------------------------------------------------------------------------------------


@cache
def llama(implementation: str) -> PreTrainedModel:
    """A two-layer Llama in float64 with random weights of order one, so that attention is far from uniform."""
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).double()


def logits(implementation: str, ids: torch.Tensor, positions: torch.Tensor, row: PackedLayout | None) -> torch.Tensor:
    """(T, V) of one row; without a layout it is plain causal attention.

    That needs its mask spelled out: without one, transformers takes a gap in the positions for a new document.
    """
    if row is None:
        mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)
        extra = {"attention_mask": mask[None, None]}
    else:
        extra = {"layouts": (row,)}
    with true_float64():
        out = llama(implementation)(ids[None], position_ids=positions[None], use_cache=False, **extra)
    return out.logits[0]


def parameter_gradients(implementation: str, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(llama(implementation).parameters())))


def batch(row: PackedLayout, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) token ids and (T, V) weights of the logits in the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (row.length,), generator=generator)
    return ids, torch.randn(row.length, 64, generator=generator, dtype=torch.float64) / row.length**0.5


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert max(max_error(x, y) for x, y in zip(a, b, strict=True)) < MODEL


@few
@given(row=layouts(max_tokens=60), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_model_packed_equals_documents_alone(backend: str, row: PackedLayout, seed: int) -> None:
    ids, weights = batch(row, seed)
    positions = row.position_ids()
    packed = logits(f"anchor_{backend}", ids, positions, row)
    expected, loss = torch.zeros_like(packed), torch.zeros((), dtype=torch.float64)
    for number, index in enumerate(runs_alone(row) or [torch.arange(row.length)]):
        own = slice(0 if number == 0 else row.anchor_len, None)
        alone = logits("eager", ids[index], positions[index], None)
        expected[index[own]] = alone[own].detach()
        loss = loss + (alone * weights[index])[own].sum()
    assert max_error(packed, expected) < MODEL
    mine = parameter_gradients(f"anchor_{backend}", (packed * weights).sum())
    assert_same(mine, parameter_gradients("eager", loss))


@few
@given(row=layouts(max_tokens=60, anchor_len=0, interleaved=False), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_model_is_the_same_for_continuous_and_reset_positions(backend: str, row: PackedLayout, seed: int) -> None:
    ids, weights = batch(row, seed)
    results = []
    for positions in Positions:
        layout = replace(row, positions=positions)
        out = logits(f"anchor_{backend}", ids, layout.position_ids(), layout)
        results.append([out, *parameter_gradients(f"anchor_{backend}", (out * weights).sum())])
    assert_same(*results)


@few
@given(row=layouts(max_tokens=60), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_model_shared_anchor_equals_private_copies(backend: str, row: PackedLayout, seed: int) -> None:
    if not document_indices(row):
        return  # the anchor alone: nothing to put a copy in front of
    ids, weights = batch(row, seed)
    positions = row.position_ids()
    index, copied = with_private_anchors(row)
    own = own_tokens(row, copied)
    shared = logits(f"anchor_{backend}", ids, positions, row)[index[own]]
    private = logits(f"anchor_{backend}", ids[index], positions[index], copied)[own]
    results = [
        [out, *parameter_gradients(f"anchor_{backend}", (out * weights[index[own]]).sum())] for out in (shared, private)
    ]
    assert_same(*results)


def test_the_model_tells_layouts_apart() -> None:
    """The identities would also hold for a model that ignored its layout: here the documents must matter."""
    row = PackedLayout((0, 1, 20, 40), 1)
    ids, _ = batch(row, 0)
    packed = logits("anchor_cpu", ids, row.position_ids(), row)
    full = logits("anchor_cpu", ids, row.position_ids(), PackedLayout((0, 40)))
    assert max_error(packed[:20], full[:20]) < MODEL
    assert max_error(packed[20:], full[20:]) > 0.1
