"""Each policy by hand, on corpora small enough to see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.assemble import RowShape, assemble, scatter
from anchorctx.data.packing.best_fit import BestFit, best_fit_decreasing
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.packer import Packer
from anchorctx.data.packing.pieces import ArrayText, Rows, Tags, make_pieces
from anchorctx.data.packing.shard import Shard
from anchorctx.data.tokens.store import stored_weights
from anchorctx.errors import UserError
from anchorctx.layout import Pattern, Positions

ANCHOR, PAD = 2001, 2002
SHAPE = RowShape(9, 1, ANCHOR, PAD)


def pack(
    *lengths: int,
    shape: RowShape = SHAPE,
    tags: Tags | None = None,
    tag: int = 0,
    weights: np.ndarray | None = None,
    **options,
) -> tuple[Shard, Accounting]:
    """Documents of these lengths, ids 1, 2, 3, ... over all of them."""
    tags = tags or Tags()
    sizes = np.array(lengths)
    accounting = Accounting(["corpus"])
    accounting.add("document_tokens", np.zeros(len(sizes), int), sizes)
    documents = make_pieces(
        sizes,
        size=sizes + tags.lengths[tag],
        document=np.arange(len(sizes)),
        start=np.cumsum(sizes) - sizes,
        tag=tag,
    )
    packer = Packer(PackConfig(**options), shape.capacity, tags.longest, accounting)
    rows = Rows.joined([*packer.add(documents), *packer.finish()])
    ids = np.arange(1, sizes.sum() + 1, dtype=np.uint16)
    shard = assemble(rows, shape, tags, {0: ArrayText(ids, weights)}, accounting)
    accounting.check(shape.row_length)
    return shard, accounting


def content(shard: Shard) -> list[list[int]]:
    return [row[row < 2000].tolist() for row in shard.tokens]


def test_concat_split_loses_no_token_and_the_tail_of_the_corpus_is_a_row() -> None:
    shard, _ = pack(20, 5, policy=Policy.concat_split)
    assert content(shard) == [list(range(1, 9)), list(range(9, 17)), list(range(17, 25)), [25]]


def test_the_last_token_of_a_document_is_not_trained_to_predict_the_next() -> None:
    shard, _ = pack(3, 5, policy=Policy.concat_split)
    row = shard.row(0, 1)
    assert row.layout.doc_offsets == (0, 1, 4, 9)
    assert row.loss_weights.tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 1]


def test_a_row_is_exactly_row_length_long() -> None:
    for policy in Policy:
        for lengths in ((8,), (9,), (7, 1), (7, 2), (1,)):
            shard, _ = pack(*lengths, policy=policy)
            assert shard.tokens.shape[1] == 9
            assert {shard.row(i, 1).layout.length for i in range(len(shard))} == {9}


def test_policies_on_one_corpus() -> None:
    assert content(pack(6, 5, 3, 2, policy=Policy.concat_split)[0]) == [[*range(1, 9)], [*range(9, 17)]]
    assert content(pack(6, 5, 3, 2, policy=Policy.best_fit)[0]) == [[1, 2, 3, 4, 5, 6, 15, 16], [*range(7, 15)]]
    assert list(map(len, content(pack(6, 5, 3, 2, policy=Policy.one_per_row)[0]))) == [6, 5, 3, 2]


def test_long_documents() -> None:
    for policy in Policy:
        split, _ = pack(19, policy=policy, long_documents=LongDocuments.split)
        assert content(split) == [list(range(1, 9)), list(range(9, 17)), [17, 18, 19]]
        kept, account = pack(19, 3, policy=policy, long_documents=LongDocuments.truncate)
        assert content(kept)[0] == list(range(1, 9)) and account.total_dropped == {"truncated": 11}
        kept, account = pack(19, 3, policy=policy, long_documents=LongDocuments.drop)
        assert content(kept) == [[20, 21, 22]] and account.total_dropped == {"longer than a row": 19}


def test_min_length_drops_documents_and_remainders() -> None:
    shard, account = pack(2, 10, 3, policy=Policy.one_per_row, min_length=3)
    assert content(shard) == [list(range(3, 11)), [13, 14, 15]]
    assert account.total_dropped == {"shorter than min_length": 4}


def test_min_length_pads_a_row_rather_than_fill_it_with_what_is_dropped() -> None:
    shard, account = pack(6, 5, policy=Policy.concat_split, min_length=3)
    assert content(shard) == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]] and not account.dropped


def test_a_tag_stands_before_every_piece_and_is_not_trained() -> None:
    tags = Tags()
    number = tags.add(np.array([501, 502], np.uint32))
    shard, account = pack(10, tags=tags, tag=number, policy=Policy.one_per_row)
    assert content(shard) == [[501, 502, 1, 2, 3, 4, 5, 6], [501, 502, 7, 8, 9, 10]]
    assert shard.row(0, 1).loss_weights.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert account.total("trained") == 10 and account.cells["tags"] == 4 and account.total("first_tokens") == 0


def test_one_row_with_weights_by_hand() -> None:
    shape = RowShape(14, 2, ANCHOR, PAD)
    weights = np.array([1, 1, 1, 1, 0.5, 0, 1], np.float16)
    shard, account = pack(3, 4, shape=shape, weights=weights)
    row = shard.row(0, 2)
    assert row.input_ids.tolist() == [ANCHOR] * 2 + [1, 2, 3, 4, 5, 6, 7] + [PAD] * 5
    assert row.loss_weights.tolist() == [0, 0, 0, 1, 1, 0, 0.5, 0, 1, 0, 0, 0, 0, 0]
    assert row.layout.doc_offsets == (0, 2, 5, 9, 14) and row.layout.doc_ids is None
    assert row.layout.positions is Positions.continuous
    counted = account.to_dict()
    assert (counted["trained"], counted["first_tokens"], counted["zero_weight"]) == (4, 2, 1)
    assert (counted["anchor"], counted["padding"], counted["pieces"]) == (2, 5, 2)
    assert shard.index()["cost"].tolist() == [2**2 + 3**2 + 4**2]  # padding costs nothing


@pytest.mark.parametrize("weight", [1e-9, 1e6, -0.5, np.nan])
def test_weights_that_float16_cannot_hold_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="loss weights must be 0 or within 1e-7 to 65504"):
        stored_weights(np.array([1.0, weight], np.float32))


def test_what_does_not_fit_is_refused() -> None:
    rows = Rows(make_pieces(np.array([9])), np.array([1]))
    with pytest.raises(ValueError, match="pieces of 9 tokens do not fit into a row's 8"):
        assemble(rows, SHAPE, Tags(), {0: ArrayText(np.arange(9, dtype=np.uint16))}, Accounting(["a"]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_length": 0}, "pack.min_length=0 must be 1 to 8, what a row holds: change it"),
        ({"min_length": 9}, "pack.min_length=9 must be 1 to 8, what a row holds: change it"),
        ({"interleave": 0}, "pack.interleave=0 must be at least 1: use 1 for whole documents, or 2 or 3"),
        ({"buffer_tokens": 0}, "pack.buffer_tokens=0 must be at least 1: leave it at its default"),
    ],
)
def test_bad_settings(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        pack(3, **options)
    assert str(error.value) == sentence


def test_a_tag_that_fills_the_row() -> None:
    tags = Tags()
    number = tags.add(np.arange(8, dtype=np.uint32))
    with pytest.raises(UserError, match="a domain tag of 8 tokens leaves no room in rows of 8 tokens"):
        pack(3, tags=tags, tag=number)


# -- best fit -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 70))
def test_best_fit_decreasing_against_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):  # the textbook: the fullest row that has room, else a new one
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity - length)
        else:
            best = min(fits, key=lambda i: rooms[i])
            rooms[best] -= length
    filled = np.bincount(rows, lengths) if lengths else np.empty(0)
    assert sorted(capacity - filled) == sorted(rooms)


def test_best_fit_decreasing_refuses_what_no_row_holds() -> None:
    with pytest.raises(ValueError, match="1..5, got 3..6"):
        best_fit_decreasing(np.array([3, 6]), 5)


def test_best_fit_cuts_no_document_that_fits() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 300)
    shard, _ = pack(*lengths.tolist(), policy=Policy.best_fit, buffer_tokens=100)
    where = {token: number for number, row in enumerate(content(shard)) for token in row}
    starts = np.cumsum(lengths) - lengths
    for start, length in zip((starts + 1).tolist(), lengths.tolist(), strict=True):
        assert len({where[token] for token in range(start, start + length)}) == 1


def test_a_buffer_of_less_than_a_few_rows_does_not_pad_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tiny documents in long rows meet the limit on pieces long before the one on tokens."""
    monkeypatch.setattr("anchorctx.data.packing.best_fit.BUFFER_PIECES", 30)
    packer = BestFit(100, 2**20)
    rows = Rows.joined([*packer.add(make_pieces(np.full(1000, 2), document=np.arange(1000))), *packer.finish()])
    assert len(rows) == 20 and (rows.counts == 50).all()


# -- interleaving -------------------------------------------------------------------------------------------------


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
    shapes = (RowShape(10, 2, ANCHOR, PAD, chunks=2, seed=seed) for seed in range(20))
    rows = (pack(4, 4, shape=shape, interleave=2)[0].row(0, 2) for shape in shapes)
    row = next(row for row in rows if row.layout.doc_ids is not None and len(row.layout.doc_ids) == 5)
    assert row.layout.doc_ids is not None and row.layout.doc_ids[0] not in row.layout.doc_ids[1:]
    middle = row.input_ids[2:]
    assert middle[middle <= 4].tolist() == [1, 2, 3, 4] and middle[middle > 4].tolist() == [5, 6, 7, 8]
    # no chunk's first token is trained: its predecessor in the row is another document's
    assert row.loss_weights[2:].tolist() == [0, 1] * 4
    allowed = Pattern.anchor.apply(row.layout).allowed_array()
    for q in range(2, 10):
        visible = {int(t) for t in row.input_ids[2:10][allowed[q, 2:10]]}
        own = (int(row.input_ids[q]) - 1) // 4
        assert visible == {t for t in middle.tolist() if (t - 1) // 4 == own and t <= row.input_ids[q]}
        assert allowed[q, :2].all()
