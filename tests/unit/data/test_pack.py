from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.data import pack
from anchorctx.data.assemble import RowShape
from anchorctx.data.bins import best_fit_decreasing
from anchorctx.data.pack import LongDocuments, PackConfig, Packer, Policy
from anchorctx.data.shards import Row
from anchorctx.errors import UserError

ANCHOR, PAD = 2_000_001, 2_000_002
TAG_BASE = 1_000_000


@dataclass
class Corpus:
    """Documents whose every token is unique: id = 1 + position in the corpus, so a row tells what it is made of."""

    lengths: list[int]
    tags: list[int]
    """Tag tokens in front of each document."""
    weights: list[np.ndarray | None]

    def documents(self):
        start = 1
        for length, tag, weights in zip(self.lengths, self.tags, self.weights, strict=True):
            yield np.arange(start, start + length, dtype=np.uint32), weights, TAG_BASE + np.arange(tag, dtype=np.uint32)
            start += length

    @property
    def owner(self) -> np.ndarray:
        """The document of every id; -1 for id 0, which no token has."""
        return np.concatenate([[-1], np.repeat(np.arange(len(self.lengths)), self.lengths)]).astype(int)

    @property
    def weight_of(self) -> np.ndarray:
        """The stored loss weight of every id."""
        each = [np.ones(n) if w is None else w for n, w in zip(self.lengths, self.weights, strict=True)]
        return np.concatenate([[0.0], *each]).astype(np.float16).astype(np.float32)


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    lengths = draw(st.lists(st.integers(1, 40) | st.integers(1, 3) | st.integers(60, 200), min_size=1, max_size=20))
    tags = [draw(st.integers(0, 2)) for _ in lengths]
    choices = st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=1, max_size=5)
    weights = [np.resize(np.array(draw(choices), np.float32), n) if draw(st.booleans()) else None for n in lengths]
    return Corpus(lengths, tags, weights)


configs = st.builds(
    PackConfig,
    policy=st.sampled_from(Policy),
    long_documents=st.sampled_from(LongDocuments),
    min_length=st.integers(1, 4),
    interleave=st.integers(1, 4),
    buffer_tokens=st.sampled_from([1, 50, 2**20]),
)
shapes = st.builds(
    RowShape,
    row_length=st.integers(12, 70),
    anchor_len=st.integers(1, 3),
    anchor_id=st.just(ANCHOR),
    pad_id=st.just(PAD),
)


def packed(corpus: Corpus, config: PackConfig, shape: RowShape) -> tuple[list[Row], Packer]:
    packer = Packer(config, shape)
    rows = [row for document in corpus.documents() for row in packer.add(*document)]
    return rows + list(packer.finish()), packer


def content(row: Row) -> np.ndarray:
    """The document tokens of a row, in its order."""
    return row.input_ids[row.input_ids < TAG_BASE]


@settings(max_examples=300, deadline=None)
@given(corpora(), configs, shapes)
def test_every_token_is_in_one_row_or_counted_as_dropped(corpus: Corpus, config: PackConfig, shape: RowShape) -> None:
    rows, packer = packed(corpus, config, shape)
    accounts = packer.accounting
    placed = np.concatenate([content(row) for row in rows]) if rows else np.empty(0, int)
    assert len(np.unique(placed)) == len(placed)
    assert len(placed) + accounts.dropped.total() == sum(corpus.lengths) == accounts.document_tokens
    cells = np.concatenate([row.input_ids for row in rows]) if rows else np.empty(0, int)
    assert accounts.rows == len(rows) and len(cells) == len(rows) * shape.row_length
    assert accounts.anchor == (cells == ANCHOR).sum() == shape.anchor_len * len(rows)
    assert accounts.padding == (cells == PAD).sum()
    assert accounts.tags == ((cells >= TAG_BASE) & (cells < ANCHOR)).sum()
    assert accounts.trained == sum(np.count_nonzero(row.loss_weights) for row in rows)
    assert accounts.trained + accounts.first_tokens + accounts.zero_weight == len(placed)


@settings(max_examples=300, deadline=None)
@given(corpora(), configs, shapes)
def test_what_is_dropped_is_what_the_policy_names(corpus: Corpus, config: PackConfig, shape: RowShape) -> None:
    """Reasoned from the corpus alone: which ids may be missing."""
    rows, packer = packed(corpus, config, shape)
    placed = np.concatenate([content(row) for row in rows]) if rows else np.empty(0, int)
    missing = np.setdiff1d(np.arange(1, sum(corpus.lengths) + 1), placed)
    lost: dict[int, list[int]] = defaultdict(list)
    for token in missing.tolist():
        lost[corpus.owner[token]].append(token)
    for number, (ids, _, tag) in enumerate(corpus.documents()):
        room = shape.capacity - len(tag)
        gone, n = lost[number], len(ids)
        if n < config.min_length or (n > room and config.long_documents is LongDocuments.drop):
            assert gone == ids.tolist()
        elif n > room and config.long_documents is LongDocuments.truncate:
            # concat_split may cut the kept beginning again at a row's edge, and drop a remainder below min_length
            kept = ids[:room].tolist()
            assert set(ids[room:].tolist()) <= set(gone)
            assert len(set(gone) & set(kept)) < config.min_length
        else:  # at most a remainder shorter than min_length, the end of a document that was cut
            assert len(gone) < config.min_length and gone == ids[n - len(gone) :].tolist()


@settings(max_examples=300, deadline=None)
@given(corpora(), configs, shapes)
def test_rows_hold_documents_in_order_and_labels_stay_inside(
    corpus: Corpus, config: PackConfig, shape: RowShape
) -> None:
    rows, _ = packed(corpus, config, shape)
    for row in rows:
        ids, docs = row.input_ids, row.layout.token_docs()
        head = shape.anchor_len
        assert ids.shape == row.loss_weights.shape == (shape.row_length,) == docs.shape
        assert ids.dtype == np.int64 and row.loss_weights.dtype == np.float32
        assert (ids[:head] == ANCHOR).all() and (ids[head:] != ANCHOR).all() and row.layout.anchor_len == head
        padding = np.flatnonzero(ids == PAD)
        assert padding.tolist() == list(range(shape.row_length - len(padding), shape.row_length))
        for doc in np.unique(docs):  # one document of the layout is one contiguous part of one document of the corpus
            own = ids[docs == doc]
            text = own[own < TAG_BASE]
            if len(text):
                assert (np.diff(text) == 1).all() and len(np.unique(corpus.owner[text])) == 1
                tag = corpus.tags[corpus.owner[text[0]]]
                assert own[: len(own) - len(text)].tolist() == list(range(TAG_BASE, TAG_BASE + tag))
            else:
                assert len(np.unique(own)) == 1 and own[0] in (ANCHOR, PAD)
        # the specification of labels, token by token
        is_text = ids < TAG_BASE
        expected = np.where(is_text, corpus.weight_of[np.where(is_text, ids, 0)], 0.0)
        for t in range(shape.row_length):
            if t == 0 or docs[t - 1] != docs[t]:
                expected[t] = 0.0
        np.testing.assert_array_equal(row.loss_weights, expected)


@settings(max_examples=200, deadline=None)
@given(corpora(), configs, shapes)
def test_best_fit_cuts_no_document_that_fits(corpus: Corpus, config: PackConfig, shape: RowShape) -> None:
    config.policy = Policy.best_fit
    rows, _ = packed(corpus, config, shape)
    where: dict[int, set[int]] = defaultdict(set)
    for i, row in enumerate(rows):
        for number in set(corpus.owner[content(row)].tolist()):
            where[number].add(i)
    for number, (ids, _, tag) in enumerate(corpus.documents()):
        if len(ids) + len(tag) <= shape.capacity:
            assert len(where[number]) == (len(ids) >= config.min_length)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 70))
def test_best_fit_decreasing_against_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):  # the textbook: the fullest row that has room, else a new one
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity - length)
        else:
            best = min(fits, key=lambda i: rooms[i])
            rooms[best] -= length
    assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)


def test_a_buffer_of_less_than_a_few_rows_does_not_pad_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tiny documents in long rows meet the limit on pieces long before the one on tokens."""
    monkeypatch.setattr(pack, "BUFFER_PIECES", 30)
    corpus, shape = uniform(*[2] * 1000), RowShape(101, 1, ANCHOR, PAD)
    rows, _ = packed(corpus, PackConfig(policy=Policy.best_fit), shape)
    assert len(rows) == 20 and not any((row.input_ids == PAD).any() for row in rows)


def test_best_fit_decreasing_refuses_what_no_row_holds() -> None:
    with pytest.raises(ValueError, match="1..5, got 3..6"):
        best_fit_decreasing(np.array([3, 6]), 5)


def uniform(*lengths: int) -> Corpus:
    return Corpus(list(lengths), [0] * len(lengths), [None] * len(lengths))


SHAPE = RowShape(9, 1, ANCHOR, PAD)


def pack_texts(corpus: Corpus, shape: RowShape = SHAPE, **options) -> list[list[int]]:
    return [content(row).tolist() for row in packed(corpus, PackConfig(**options), shape)[0]]


def test_a_split_loses_no_token_and_the_tail_of_the_corpus_is_a_row() -> None:
    rows = pack_texts(uniform(20, 5), policy=Policy.concat_split)
    assert rows == [list(range(1, 9)), list(range(9, 17)), list(range(17, 25)), [25]]


def test_the_last_token_of_a_document_is_not_trained_to_predict_the_next() -> None:
    (row,), _ = packed(uniform(3, 5), PackConfig(policy=Policy.concat_split), SHAPE)
    assert row.layout.doc_offsets == (0, 1, 4, 9)
    assert row.loss_weights.tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 1]


def test_a_row_is_exactly_row_length_long() -> None:
    for policy in Policy:
        for corpus in (uniform(8), uniform(9), uniform(7, 1), uniform(7, 2), uniform(1)):
            rows, _ = packed(corpus, PackConfig(policy=policy), SHAPE)
            assert {len(row.input_ids) for row in rows} == {9} == {row.layout.length for row in rows}


def test_policies_on_one_corpus() -> None:
    corpus = uniform(6, 5, 3, 2)
    assert pack_texts(corpus, policy=Policy.concat_split) == [[*range(1, 9)], [*range(9, 17)]]
    assert sorted(map(len, pack_texts(corpus, policy=Policy.best_fit))) == [8, 8]
    assert list(map(len, pack_texts(corpus, policy=Policy.one_per_row))) == [6, 5, 3, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_length": 0}, "pack.min_length=0 must be 1 to 8, what a row holds: change it"),
        ({"min_length": 9}, "pack.min_length=9 must be 1 to 8, what a row holds: change it"),
        ({"interleave": 0}, "pack.interleave=0 must be at least 1: use 1 for whole documents, or 2 or 3"),
        ({"buffer_tokens": 0}, "pack.buffer_tokens=0 must be positive: leave it at its default"),
    ],
)
def test_bad_settings(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Packer(PackConfig(**options), SHAPE)
    assert str(error.value) == sentence


def test_a_tag_that_fills_the_row() -> None:
    with pytest.raises(UserError, match="a domain tag of 8 tokens leaves no room in rows of 9"):
        packed(Corpus([3], [8], [None]), PackConfig(), SHAPE)
