"""PackedLayout against plain loops over tokens, written from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.layout import Document, PackedLayout, Pattern, Positions, lay_out


def test_padding_is_no_document_and_in_no_piece() -> None:
    row = PackedLayout((0, 1, 3, 5, 12), 1, padding=True)
    assert (row.num_documents, row.padding_tokens, row.length) == (2, 7, 12)
    assert [document.spans for document in row.documents()] == [((1, 3),), ((3, 5),)]
    copied, index = row.with_copies()
    assert copied.doc_offsets == (0, 3, 6) and not copied.padding and index.tolist() == [0, 1, 2, 0, 3, 4]
    assert max(layout.length for layout, _ in row.pieces(3)) == 3
    assert row.attention_pairs() == PackedLayout((0, 1, 3, 5), 1).attention_pairs()
    scattered = PackedLayout((0, 1, 3, 5, 6, 9), 1, doc_ids=(0, 1, 2, 1, 3), padding=True)
    assert [document.length for document in scattered.documents()] == [3, 2] and scattered.by_document().padding
    assert Pattern.full.apply(row) == PackedLayout((0, 12))
    assert len(Pattern.intra_doc.apply(row).documents()) == 3  # a token that was the anchor, and the two


def test_an_anchor_alone_has_nothing_to_be_copied_for() -> None:
    for attempt in (PackedLayout((0, 1), 1).with_copies, lambda: PackedLayout((0, 2), 2).pieces(8)):
        with pytest.raises(ValueError, match="an anchor alone has no documents"):
            attempt()


many = settings(max_examples=120, deadline=None)


@st.composite
def rows(draw: st.DrawFn) -> PackedLayout:
    """Small random rows, every second one with documents in several segments."""
    anchor = draw(st.integers(0, 3))
    lengths = draw(st.lists(st.integers(1, 9), min_size=0 if anchor else 1, max_size=8))
    bounds = [0, anchor] if anchor else [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    segments = len(bounds) - 1
    ids = draw(st.none() | st.lists(st.integers(-2, 3), min_size=segments, max_size=segments))
    if ids is not None and anchor:
        ids[0] = 99
    return PackedLayout(
        tuple(bounds), anchor, draw(st.sampled_from(list(Positions))), None if ids is None else tuple(ids)
    )


def documents(row: PackedLayout) -> list[int]:
    """The document of each token."""
    found = []
    for i in range(len(row.doc_offsets) - 1):
        for _ in range(row.doc_offsets[i], row.doc_offsets[i + 1]):
            found.append(i if row.doc_ids is None else row.doc_ids[i])
    return found


def ranks(row: PackedLayout) -> list[int]:
    docs = documents(row)
    return [docs[:t].count(docs[t]) for t in range(len(docs))]


def may_see(row: PackedLayout, q: int, k: int, window: int | None) -> bool:
    if k > q:
        return False
    if k < row.anchor_len:
        return True
    docs, rank = documents(row), ranks(row)
    return docs[q] == docs[k] and (window is None or rank[q] - rank[k] < window)


def order(row: PackedLayout) -> list[int]:
    docs = documents(row)
    return [t for doc in dict.fromkeys(docs) for t in range(len(docs)) if docs[t] == doc]


def key_sequences(row: PackedLayout) -> list[list[int]]:
    """For each document, the places (documents together) of the keys that it needs: the anchor, then its own."""
    docs = [documents(row)[t] for t in order(row)]
    sequences = []
    for number, doc in enumerate(dict.fromkeys(docs)):
        own = [t for t in range(len(docs)) if docs[t] == doc]
        is_anchor = row.anchor_len > 0 and number == 0
        sequences.append(own if is_anchor else [*range(row.anchor_len), *own])
    return sequences


@many
@given(rows(), st.none() | st.integers(1, 12))
def test_visibility(row: PackedLayout, window: int | None) -> None:
    expected = [[may_see(row, q, k, window) for k in range(row.length)] for q in range(row.length)]
    assert row.allowed_array(window).tolist() == expected
    assert row.allowed(window=window).tolist() == expected
    assert row.attention_pairs(window) == sum(map(sum, expected))


@many
@given(rows())
def test_ranks_and_positions(row: PackedLayout) -> None:
    assert row.token_docs().tolist() == documents(row)
    assert row.token_ranks().tolist() == ranks(row)
    assert row.num_documents == len(set(documents(row)) - set(documents(row)[: row.anchor_len]))
    if row.positions is Positions.continuous:
        expected = list(range(row.length))
    else:
        expected = [t if t < row.anchor_len else rank + row.anchor_len for t, rank in enumerate(ranks(row))]
    assert row.position_ids().tolist() == row.position_array().tolist() == expected
    assert row.position_ids().dtype == torch.int64


@many
@given(rows())
def test_order_moves_documents_together(row: PackedLayout) -> None:
    assert row.order_array().tolist() == order(row)
    grouped = row.by_document()
    assert grouped.doc_ids is None and grouped.anchor_len == row.anchor_len and grouped.positions == row.positions
    lengths = [documents(row).count(doc) for doc in dict.fromkeys(documents(row))]
    assert list(np.diff(grouped.doc_offsets)) == lengths
    moved = np.ix_(row.order_array(), row.order_array())
    assert (grouped.allowed_array() == row.allowed_array()[moved]).all()


@many
@given(rows())
def test_kernel_boundaries(row: PackedLayout) -> None:
    docs = [documents(row)[t] for t in order(row)]
    starts = [t for t in range(len(docs)) if t == 0 or docs[t] != docs[t - 1]]
    assert row.cu_seqlens_array().tolist() == [*starts, len(docs)]
    sequences = key_sequences(row)
    assert row.kv_index_array().tolist() == [t for sequence in sequences for t in sequence]
    assert row.cu_seqlens_k_array().tolist() == [sum(map(len, sequences[:i])) for i in range(len(sequences) + 1)]
    assert row.cu_seqlens_array().dtype == row.cu_seqlens_k_array().dtype == np.int32
    assert row.kv_index_array().dtype == np.int64


# -- copies and pieces ------------------------------------------------------------------------------------------------


def own_tokens(row: PackedLayout) -> list[list[int]]:
    """The tokens of each document, in order of first appearance, the anchor's left out."""
    docs = documents(row)
    own = range(row.anchor_len, len(docs))
    return [[t for t in own if docs[t] == doc] for doc in dict.fromkeys(docs[row.anchor_len :])]


def check_copies(row: PackedLayout, layout: PackedLayout, index: np.ndarray, chosen: list[list[int]]) -> None:
    """`layout` and `index` are these documents of `row`, given by their tokens, each behind a copy of the anchor."""
    anchor = list(range(row.anchor_len))
    behind = [[*anchor, *own] for own in chosen]
    assert index.tolist() == [t for tokens in behind for t in tokens]
    assert layout.position_array().tolist() == [int(row.position_array()[t]) for t in index]
    assert (layout.length, layout.anchor_len, layout.copies) == (len(index), 0, row.anchor_len)
    assert layout.together and layout.num_documents == len(chosen)
    assert layout.cu_seqlens_array().tolist() == [sum(map(len, behind[:i])) for i in range(len(behind) + 1)]
    number = [i for i, tokens in enumerate(behind) for _ in tokens]
    seen = row.allowed_array()
    expected = [
        [number[q] == number[k] and bool(seen[index[q], index[k]]) for k in range(len(index))]
        for q in range(len(index))
    ]
    assert layout.allowed_array().tolist() == expected, "a token sees its copy and its document, as in the row"


with_documents = rows().filter(lambda row: row.length > row.anchor_len)


@many
@given(with_documents)
def test_documents_are_where_the_row_has_them(row: PackedLayout) -> None:
    found = row.documents()
    assert [[t for a, b in document.spans for t in range(a, b)] for document in found] == own_tokens(row)
    for document, own in zip(found, own_tokens(row), strict=True):
        assert document.length == len(own)
        assert document.positions == tuple(int(row.position_array()[start]) for start, _ in document.spans)
        assert document.where(2).tolist() == [0, 1, *own]
        assert document.where().tolist() == own


@many
@given(with_documents)
def test_with_copies(row: PackedLayout) -> None:
    check_copies(row, *row.with_copies(), own_tokens(row))


@many
@given(with_documents, st.integers(4, 40), st.sampled_from([0.0, 5.0, 1e4]))
def test_pieces_hold_each_document_once(row: PackedLayout, max_tokens: int, token_cost: float) -> None:
    left = own_tokens(row)
    for layout, index in row.pieces(max_tokens, token_cost):
        chosen = []  # what the index says, cut at its boundaries
        for start, stop in zip(layout.cu_seqlens_array(), layout.cu_seqlens_array()[1:], strict=False):
            chosen.append(index[start + row.anchor_len : stop].tolist())
        check_copies(row, layout, index, chosen)
        assert layout.length <= max_tokens or len(chosen) == 1
        assert sorted(map(len, chosen), reverse=True) == list(map(len, chosen)), "equally long ones lie together"
        for own in chosen:
            left.remove(own)
    assert not left
    again = row.pieces(max_tokens, token_cost)
    for (layout, index), (same, same_index) in zip(row.pieces(max_tokens, token_cost), again, strict=True):
        assert layout == same and (index == same_index).all()


@many
@given(with_documents)
def test_documents_laid_out_behind_a_shared_anchor(row: PackedLayout) -> None:
    layout = lay_out(row.documents(), row.anchor_len, shared=True)
    index = [*range(row.anchor_len), *(t for own in own_tokens(row) for t in own)]
    assert (layout.anchor_len, layout.copies, layout.length) == (row.anchor_len, 0, row.length)
    assert layout.position_array().tolist() == row.position_array()[index].tolist()
    assert (layout.allowed_array() == row.allowed_array()[np.ix_(index, index)]).all()


def test_documents_of_several_rows_in_one_layout() -> None:
    parts = [Document(((1, 3), (7, 9)), (1, 7)), Document(((5, 6),), (5,))]
    layout = lay_out(parts, 1)
    assert layout == PackedLayout((0, 3, 5, 7), doc_ids=(0, 0, 1), starts=(1, 7, 5), copies=1)
    assert layout.position_array().tolist() == [0, 1, 2, 7, 8, 0, 5]


def test_pieces_without_room_and_copies_of_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces of 1 tokens have no room behind an anchor of 1"):
        ROW.pieces(1)
    with pytest.raises(ValueError, match="are those of the layout that it was made from"):
        ROW.with_copies()[0].documents()


def test_a_row_of_one_document_is_one_piece() -> None:
    ((layout, index),) = Pattern.full.apply(ROW).pieces(2)
    assert layout.length == 6 and index.tolist() == [0, 1, 2, 3, 4, 5]


ROW = PackedLayout((0, 1, 4, 6), 1)


@pytest.mark.parametrize(
    ("pattern", "anchor_len", "positions", "sees"),
    [
        (Pattern.full, 0, [0, 1, 2, 3, 4, 5], ["x", "xx", "xxx", "xxxx", "xxxxx", "xxxxxx"]),
        (Pattern.intra_doc, 0, [0, 1, 2, 3, 4, 5], ["x", ".x", ".xx", ".xxx", "....x", "....xx"]),
        (Pattern.intra_doc_reset, 0, [0, 0, 1, 2, 0, 1], ["x", ".x", ".xx", ".xxx", "....x", "....xx"]),
        (Pattern.anchor, 1, [0, 1, 2, 3, 4, 5], ["x", "xx", "xxx", "xxxx", "x...x", "x...xx"]),
        (Pattern.anchor_reset, 1, [0, 1, 2, 3, 1, 2], ["x", "xx", "xxx", "xxxx", "x...x", "x...xx"]),
    ],
)
def test_patterns(pattern: Pattern, anchor_len: int, positions: list[int], sees: list[str]) -> None:
    layout = pattern.apply(ROW)
    assert (layout.length, layout.anchor_len) == (ROW.length, anchor_len)
    assert layout.position_array().tolist() == positions
    picture = ["".join("x" if cell else "." for cell in line).rstrip(".") for line in layout.allowed_array()]
    assert picture == sees


@pytest.mark.parametrize("pattern", list(Pattern))
def test_patterns_keep_interleaved_documents(pattern: Pattern) -> None:
    row = PackedLayout((0, 1, 3, 4, 6), 1, doc_ids=(9, 0, 1, 0))
    layout = pattern.apply(row)
    assert layout.length == 6
    assert bool(layout.allowed_array()[5, 1]), "the second chunk sees the first"
    assert bool(layout.allowed_array()[5, 3]) == (pattern is Pattern.full), "but not the document between"


def test_patterns_are_named_as_their_values() -> None:
    for enum in (Pattern, Positions):
        assert all(member.name == member.value for member in enum)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"doc_offsets": ()}, r"increase strictly from 0 to the row length, got \(\)"),
        ({"doc_offsets": (0,)}, r"got \(0,\)"),
        ({"doc_offsets": (1, 5)}, r"got \(1, 5\)"),
        ({"doc_offsets": (0, 4, 4, 9)}, r"got \(0, 4, 4, 9\)"),
        ({"doc_offsets": (0, 5, 3)}, r"got \(0, 5, 3\)"),
        ({"doc_offsets": (*range(20), 5)}, r"got \(0, 1, 2, 3, 4, 5, 6, \.\.\.\)"),
        ({"doc_offsets": (0, 3, 9), "anchor_len": 1}, "first segment must be the anchor: it ends at 3, .* is 1"),
        ({"doc_offsets": (0, 3, 9), "anchor_len": -1}, "anchor_len is -1"),
        ({"doc_offsets": (0, 3, 9), "doc_ids": (0,)}, "doc_ids has 1 entries for 2 segments"),
        ({"doc_offsets": (0, 1, 9), "anchor_len": 1, "doc_ids": (4, 4)}, "anchor's doc_id must not be a document's"),
        ({"doc_offsets": (0, 3, 9), "starts": (0,)}, "starts has 1 entries for 2 segments"),
        ({"doc_offsets": (0, 3, 9), "copies": 1}, "a layout with copies of the anchor has starts"),
        ({"doc_offsets": (0, 1, 9), "anchor_len": 1, "copies": 1, "starts": (0, 1)}, "and no shared anchor"),
    ],
)
def test_refused_layouts(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout(**fields)


def test_layouts_are_values() -> None:
    same = PackedLayout((0, 1, 4, 6), 1)
    assert ROW == same and hash(ROW) == hash(same) and len({ROW, same}) == 1
    assert len({ROW, PackedLayout((0, 1, 4, 6)), PackedLayout((0, 1, 4, 6), 1, Positions.reset)}) == 3
    with pytest.raises(AttributeError):
        ROW.anchor_len = 0  # type: ignore[misc]


def test_derived_tensors_are_made_once() -> None:
    assert ROW.position_ids() is PackedLayout((0, 1, 4, 6), 1).position_ids()
    with torch.inference_mode():
        made_here = PackedLayout((0, 1, 2, 31), 1).position_ids()
    assert not made_here.is_inference()
