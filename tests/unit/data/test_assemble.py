from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.data.accounting import Accounting
from anchorctx.data.assemble import Piece, RowShape, assemble, scatter
from anchorctx.layout import Pattern, Positions

SHAPE = RowShape(row_length=16, anchor_len=2, anchor_id=1, pad_id=0)
NO_TAG = np.empty(0, np.uint32)


def piece(number: int, ids: list[int], weights: list[float] | None = None, tag: list[int] | None = None) -> Piece:
    own = None if weights is None else np.array(weights, np.float32)
    return Piece(number, np.array(ids, np.uint32), own, NO_TAG if tag is None else np.array(tag, np.uint32))


def build(pieces: list[Piece], chunks: int = 1, shape: RowShape = SHAPE, seed: int = 0):
    accounting = Accounting()
    return assemble(pieces, shape, chunks, np.random.default_rng(seed), accounting), accounting


def test_one_row_by_hand() -> None:
    row, accounting = build([piece(0, [11, 12, 13], tag=[7, 8]), piece(1, [21, 22, 23, 24], [1, 0.5, 0, 1])])
    assert row.input_ids.tolist() == [1, 1, 7, 8, 11, 12, 13, 21, 22, 23, 24, 0, 0, 0, 0, 0]
    assert row.loss_weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0.5, 0, 1, 0, 0, 0, 0, 0]
    assert row.layout.doc_offsets == (0, 2, 7, 11, 16)
    assert row.layout.anchor_len == 2 and row.layout.doc_ids is None
    assert row.layout.positions is Positions.continuous
    counted = accounting.to_dict()
    assert counted["trained"] == 5 and counted["first_tokens"] == 1 and counted["zero_weight"] == 1
    assert counted["tags"] == 2 and counted["anchor"] == 2 and counted["padding"] == 5


def test_a_full_row_has_no_padding_segment() -> None:
    row, accounting = build([piece(0, list(range(10, 24)))])
    assert row.layout.doc_offsets == (0, 2, 16) and accounting.padding == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces of 15 tokens do not fit into a row's 14"):
        build([piece(0, list(range(15)))])


def test_a_row_holds_its_weights_as_they_are_stored() -> None:
    """float16 has no 0.1: what is summed, stored and read is the same number."""
    row, _ = build([piece(0, [10, 11, 12], [0.1, 0.1, 0.1])])
    assert row.loss_weights[3] == np.float32(np.float16(0.1)) != np.float32(0.1)


@pytest.mark.parametrize("weight", [1e-9, 1e6, -0.5, np.nan])
def test_weights_that_float16_cannot_hold_are_refused(weight: float) -> None:
    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match="loss weights must be 0 or within 1e-7 to 65504"),
    ):
        build([piece(0, [10, 11], [1.0, weight])])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 2**16))
def test_scattered_chunks_cover_each_piece_in_order(lengths: list[int], chunks: int, seed: int) -> None:
    segments = scatter(np.array(lengths), chunks, np.random.default_rng(seed))
    assert (segments.length >= 1).all()
    assert (np.diff(segments.piece) != 0).all()  # neighbours of one piece are one segment
    for i, length in enumerate(lengths):
        own = segments.piece == i
        starts, sizes = segments.start[own], segments.length[own]
        assert starts[0] == 0 and (starts[1:] == (starts + sizes)[:-1]).all() and (starts + sizes)[-1] == length
        assert own.sum() <= min(chunks, length)


def test_nearly_equal_chunks_and_every_order_occurs() -> None:
    seen = set()
    for seed in range(200):
        segments = scatter(np.array([5, 4]), 2, np.random.default_rng(seed))
        seen.add(tuple(segments.piece.tolist()))
        if len(segments.piece) == 4:
            assert sorted(segments.length.tolist()) == [2, 2, 2, 3]
    assert seen == {(0, 1), (1, 0), (0, 1, 0), (1, 0, 1), (0, 1, 0, 1), (1, 0, 1, 0)}


def test_interleaved_chunks_are_one_document_for_every_pattern() -> None:
    pieces = [piece(0, [11, 12, 13, 14]), piece(1, [21, 22, 23, 24])]
    rows = [build(pieces, chunks=2, seed=seed)[0] for seed in range(20)]
    row = next(row for row in rows if row.layout.doc_ids is not None and len(row.layout.doc_ids) == 6)
    assert row.layout.doc_ids is not None and row.layout.doc_ids[0] not in row.layout.doc_ids[1:]
    middle = row.input_ids[2:10]
    assert middle[middle < 20].tolist() == [11, 12, 13, 14] and middle[middle > 20].tolist() == [21, 22, 23, 24]
    # no chunk's first token is trained: its predecessor in the row is another document's
    assert row.loss_weights[2:10].tolist() == [0, 1] * 4
    allowed = Pattern.anchor.apply(row.layout).allowed_array()
    for q in range(2, 10):
        visible = {int(t) for t in row.input_ids[2:10][allowed[q, 2:10]]}
        own = int(row.input_ids[q]) // 10
        assert visible == {t for t in middle.tolist() if t // 10 == own and t <= row.input_ids[q]}
        assert allowed[q, :2].all()
