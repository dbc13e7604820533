"""A row with one shared anchor, with a copy of it in front of each document, and in pieces: the same, in float64.

The loss and every gradient, over random layouts: interleaved documents, batches of rows, anchors of one to three
tokens, continuous and reset positions; for `attend` alone, with rotated queries and keys, and through a whole Llama.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout, lay_out
from anchorctx.testing.numerics import max_error
from anchorctx.testing.tiny import true_float64

from .strategies import layouts, tensors
from .test_identities import DIM, HEADS, KV_HEADS, llama, rotate

ATTENTION, MODEL = 1e-12, 1e-11
"""Absolute. Largest deviations seen: 3.6e-14 over 300 random batches for attention, 2.2e-13 over 60 for the model."""
BACKENDS = ["reference", "cpu"]
seeds = st.integers(0, 2**31)

Part = tuple[PackedLayout, torch.Tensor]
"""A layout, and (T',) the tokens to gather for it from the batch's rows laid end to end."""


@st.composite
def batches(draw: st.DrawFn, max_tokens: int) -> tuple[PackedLayout, ...]:
    """One to three rows of one length and one anchor length, each with a document at least."""
    anchor = draw(st.integers(1, 3))
    length = draw(st.integers(anchor + 1, max_tokens))
    return tuple(draw(st.lists(layouts(anchor_len=anchor, length=length), min_size=1, max_size=3)))


def as_copies(rows: tuple[PackedLayout, ...]) -> list[Part]:
    """All documents of all rows in one layout, each with its copy of its row's anchor."""
    documents = [document for row in rows for document in row.documents()]
    index = [row.with_copies()[1] + number * row.length for number, row in enumerate(rows)]
    return [(lay_out(documents, rows[0].anchor_len), torch.from_numpy(np.concatenate(index)))]


def as_pieces(rows: tuple[PackedLayout, ...], max_tokens: int) -> list[Part]:
    """The rows one after the other, each in pieces of so many tokens."""
    return [
        (layout, torch.from_numpy(index + number * row.length))
        for number, row in enumerate(rows)
        for layout, index in row.pieces(max_tokens)
    ]


def gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) -> (1, H, T', D): the batch's rows laid end to end, and of them the tokens of `index`."""
    return x.transpose(1, 2).flatten(0, 1)[index].transpose(0, 1)[None]


# -- attention alone --------------------------------------------------------------------------------------------------


def attention_loss(
    qkv: list[torch.Tensor], weights: torch.Tensor, rows: tuple[PackedLayout, ...], backend: str
) -> torch.Tensor:
    """Sum of the weighted outputs, queries and keys rotated by their positions."""
    positions = torch.stack([row.position_ids() for row in rows])[:, None]
    q, k = (rotate(x, positions) for x in qkv[:2])
    return (attend(q, k, qkv[2], rows, backend=backend) * weights).sum()


def attention_deviation(rows: tuple[PackedLayout, ...], max_tokens: int, seed: int, backend: str) -> float:
    """The largest difference to the shared anchor, in the loss and in the gradients of the rows' own q, k and v."""
    q, k, v, weights = tensors(len(rows), HEADS, KV_HEADS, rows[0].length, DIM, seed=seed)
    weights[:, :, : rows[0].anchor_len] = 0  # neither the anchor nor a copy of it has a label
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def results(parts: list[tuple[list[torch.Tensor], torch.Tensor, tuple[PackedLayout, ...]]]) -> list[torch.Tensor]:
        losses = [attention_loss(*part, backend) for part in parts]
        gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
        return [torch.stack(losses).sum(), *(torch.stack(x).sum(0) for x in zip(*gradients, strict=True))]

    def gather(parts: list[Part]) -> list[tuple[list[torch.Tensor], torch.Tensor, tuple[PackedLayout, ...]]]:
        return [([gathered(x, index) for x in leaves], gathered(weights, index), (layout,)) for layout, index in parts]

    shared = results([(leaves, weights, rows)])
    others = results(gather(as_copies(rows))), results(gather(as_pieces(rows, max_tokens)))
    return max(max_error(a, b) for other in others for a, b in zip(shared, other, strict=True))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=batches(max_tokens=80), max_tokens=st.integers(4, 90), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend: str, rows: tuple[PackedLayout, ...], max_tokens: int, seed: int) -> None:
    assert attention_deviation(rows, max_tokens, seed, backend) < ATTENTION


def test_a_window_hides_a_copy_and_not_a_shared_anchor() -> None:
    """The difference that is left between the two: a copy is the first token of its document."""
    row = PackedLayout((0, 1, 30, 60), 1)
    copied, index = row.with_copies()
    q, k, v, _ = tensors(1, 2, 2, row.length, DIM)
    shared = attend(q, k, v, (row,), window=5)
    private = attend(*(x[:, :, index] for x in (q, k, v)), (copied,), window=5)
    # the copies stand at 0 and 30; of each document, the four tokens behind its copy see it
    near = [*range(1, 5), *range(31, 35)]
    far = [*range(5, 30), *range(35, 61)]
    assert max_error(private[:, :, near], shared[:, :, index[near]]) < 1e-14
    assert (private[:, :, far] - shared[:, :, index[far]]).abs().amax(dim=(0, 1, 3)).min() > 1e-3
    alone = attend(*(x[:, :, index[30:]] for x in (q, k, v)), (PackedLayout((0, 31)),), window=5)
    assert max_error(private[:, :, 30:], alone) < 1e-14


# -- through a whole model --------------------------------------------------------------------------------------------


def labels_of(row: PackedLayout, ids: torch.Tensor) -> torch.Tensor:
    """(T,) unshifted: none on the anchor, nor on a segment's first token, whose predecessor is another document's."""
    labels = ids.clone()
    labels[: row.anchor_len] = -100
    labels[list(row.doc_offsets[:-1])] = -100
    return labels


def model_results(
    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[PackedLayout, ...]]], backend: str
) -> list[torch.Tensor]:
    """The sum of the parts' losses and its gradient in every parameter; ids and labels are (B, T)."""
    model = llama(f"anchor_{backend}")
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    with true_float64():
        for ids, labels, rows in parts:
            positions = torch.stack([row.position_ids() for row in rows])
            logits = model(ids, position_ids=positions, layouts=rows, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            loss.backward()
            total += loss.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def model_deviation(rows: tuple[PackedLayout, ...], max_tokens: int, seed: int, backend: str) -> float:
    """The largest difference to the shared anchor, in the loss and in every parameter's gradient."""
    ids = torch.randint(64, (len(rows), rows[0].length), generator=torch.Generator().manual_seed(seed))
    labels = torch.stack([labels_of(row, x) for row, x in zip(rows, ids, strict=True)])
    flat = ids.flatten(), labels.flatten()
    shared = model_results([(ids, labels, rows)], backend)
    assert len(shared) == 1 + len(list(llama(f"anchor_{backend}").parameters()))
    others = (
        model_results([(flat[0][index][None], flat[1][index][None], (layout,)) for layout, index in parts], backend)
        for parts in (as_copies(rows), as_pieces(rows, max_tokens))
    )
    return max(max_error(a, b) for other in others for a, b in zip(shared, other, strict=True))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=batches(max_tokens=50), max_tokens=st.integers(4, 60), seed=seeds)
@pytest.mark.parametrize("backend", BACKENDS)
def test_model(backend: str, rows: tuple[PackedLayout, ...], max_tokens: int, seed: int) -> None:
    assert model_deviation(rows, max_tokens, seed, backend) < MODEL


def test_the_loss_depends_on_the_copies() -> None:
    """Without them it is another one: the equalities above do not hold for just any layout."""
    rows = (PackedLayout((0, 1, 20, 40), 1),)
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = labels_of(rows[0], ids[0])[None]
    ((layout, index),) = as_copies(rows)
    shared, copied, apart = (
        model_results([part], "cpu")[0]
        for part in (
            (ids, labels, rows),
            (ids[:, index], labels[:, index], (layout,)),
            (ids, labels, (PackedLayout((0, 1, 20, 40)),)),
        )
    )
    assert abs(shared - copied) < MODEL and abs(shared - apart) > 0.1
