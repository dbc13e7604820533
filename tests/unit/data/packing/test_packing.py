"""2,000 random corpora: the packer against its specification, and every token put back where it came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from anchorctx.data.packing import best_fit
from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.assemble import RowShape, assemble
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.packer import Packer
from anchorctx.data.packing.pieces import ArrayText, Tags, make_pieces
from anchorctx.data.packing.planning import shards_of
from anchorctx.layout import Pattern

from ..plain_packing import PlainDocument, PlainPacker, PlainRow

ANCHOR, PAD, TAG = 2_000_001, 2_000_002, 1_000_000
CASES, GROUPS = 2000, 20
SOURCES = ("a", "b", "c")
BUFFER_PIECES = 30


@dataclass
class Case:
    """A corpus whose every token is unique (its id is 1 + its place in the corpus), and how to pack it."""

    lengths: np.ndarray
    tag: np.ndarray
    """Tag of each document, 0 is none."""
    source: np.ndarray
    weights: np.ndarray | None
    """(N,) float16 of all tokens."""
    config: PackConfig
    shape: RowShape

    @classmethod
    def of(cls, seed: int) -> Case:
        rng = np.random.default_rng(seed)
        kinds = [rng.integers(1, 40, 12), rng.integers(1, 4, 12), rng.integers(60, 200, 12), rng.integers(1, 90, 12)]
        lengths = rng.permutation(np.concatenate([kinds[i] for i in rng.integers(0, 4, 2)]))[: rng.integers(1, 25)]
        anchor_len, row_length = int(rng.integers(1, 4)), int(rng.integers(12, 90))
        config = PackConfig(
            policy=list(Policy)[rng.integers(3)],
            long_documents=list(LongDocuments)[rng.integers(3)],
            min_length=int(rng.choice([1, 1, 2, 5])),
            interleave=int(rng.choice([1, 1, 2, 4])),
            buffer_tokens=int(rng.choice([1, 300, 2**20])),
        )
        weights = rng.choice([0.0, 0.1, 1.0], lengths.sum()).astype(np.float16) if rng.integers(2) else None
        if weights is not None and seed % 2:  # the second part has none, which is 1 everywhere
            weights[lengths[: len(lengths) // 2].sum() :] = 1
        tags = rng.integers(0, 3, len(lengths)) if rng.integers(2) else np.zeros(len(lengths), int)
        shape = RowShape(row_length, anchor_len, ANCHOR, PAD, config.interleave, seed)
        return cls(lengths, tags, rng.integers(0, 3, len(lengths)), weights, config, shape)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    @property
    def tags(self) -> Tags:
        return Tags([np.arange(TAG, TAG + length, dtype=np.uint32) for length in (0, 1, 3)])

    def plain(self) -> list[PlainDocument]:
        weights = np.ones(self.lengths.sum()) if self.weights is None else self.weights.astype(float)
        return [
            PlainDocument(
                number,
                list(range(start + 1, start + length + 1)),
                weights[start : start + length].tolist(),
                self.tags.ids[tag].tolist(),
                source,
            )
            for number, (start, length, tag, source) in enumerate(
                zip(self.starts.tolist(), self.lengths.tolist(), self.tag.tolist(), self.source.tolist(), strict=True)
            )
        ]

    def packed(self) -> tuple[list[PlainRow], list, Accounting]:
        """The package's rows, made in calls and shards of random sizes, from a corpus in two parts."""
        rng = np.random.default_rng(self.shape.seed)
        half = len(self.lengths) // 2
        cut = int(self.starts[half])
        ids, weights = np.arange(1, self.lengths.sum() + 1, dtype=np.uint32), self.weights
        texts = {
            part: ArrayText(ids[span], None if weights is None or (weights[span] == 1).all() else weights[span])
            for part, span in enumerate((slice(0, cut), slice(cut, None)))
        }
        part = (np.arange(len(self.lengths)) >= half).astype(int)
        documents = make_pieces(
            self.lengths,
            size=self.lengths + self.tags.lengths[self.tag],
            document=np.arange(len(self.lengths)),
            part=part,
            start=self.starts - part * cut,
            tag=self.tag,
            source=self.source,
        )
        accounting = Accounting(SOURCES)
        accounting.add("document_tokens", self.source, self.lengths)
        packer = Packer(self.config, self.shape.capacity, self.tags.longest, accounting)
        calls = np.split(documents, np.sort(rng.integers(0, len(documents), 3)))
        several = [rows for call in calls for rows in packer.add(call)] + list(packer.finish())
        rows, layouts, per_shard = [], [], int(rng.integers(1, 5))
        for number, shard in enumerate(shards_of(iter(several), per_shard)):
            block = assemble(shard, self.shape, self.tags, texts, accounting, number * per_shard)
            for index in range(len(block)):
                row = block.row(index, self.shape.anchor_len)
                docs = row.layout.token_docs()
                rows.append(PlainRow(row.input_ids.tolist(), row.loss_weights.tolist(), docs.tolist()))
                layouts.append(row.layout)
        return rows, layouts, accounting


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_fit, "BUFFER_PIECES", BUFFER_PIECES)


@pytest.mark.parametrize("group", range(GROUPS))
def test_2000_random_corpora(group: int) -> None:
    for seed in range(group * CASES // GROUPS, (group + 1) * CASES // GROUPS):
        case = Case.of(seed)
        rows, layouts, accounting = case.packed()
        plain = PlainPacker(case.config, case.shape)
        try:
            check_against_the_specification(rows, plain.pack(case.plain(), BUFFER_PIECES))
            check_dropped(accounting, plain)
            check_put_back_together(case, rows, accounting)
            check_boundaries(case, rows, layouts)
            accounting.check(case.shape.row_length)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case.config}, {case.shape}") from error


def check_against_the_specification(rows: list[PlainRow], plain: list[PlainRow]) -> None:
    assert [row.ids for row in rows] == [row.ids for row in plain]
    for row, expected in zip(rows, plain, strict=True):
        assert row.weights == np.float32(np.float16(expected.weights)).tolist()
        assert same_partition(row.docs, expected.docs)


def same_partition(one: list[int], other: list[int]) -> bool:
    """Do the same tokens belong together, whatever their documents are called?"""
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def check_dropped(accounting: Accounting, plain: PlainPacker) -> None:
    found = {
        (reason, source): count
        for reason, counts in accounting.dropped.items()
        for source, count in enumerate(counts.tolist())
        if count
    }
    assert found == {key: count for key, count in plain.dropped.items() if count}


def check_put_back_together(case: Case, rows: list[PlainRow], accounting: Accounting) -> None:
    """Without the specification: what is in rows is what came minus what is reported as dropped, each token once."""
    cells = np.array([row.ids for row in rows], np.int64).reshape(-1)
    weights = np.array([row.weights for row in rows]).reshape(-1)
    is_content = cells < TAG
    placed = cells[is_content]
    assert len(np.unique(placed)) == len(placed)
    owner = np.repeat(np.arange(len(case.lengths)), case.lengths)
    came = np.bincount(case.source, case.lengths, 3)
    in_rows = np.bincount(case.source[owner[placed - 1]], minlength=3)
    lost = sum(accounting.dropped.values(), np.zeros(3, np.int64))
    assert (in_rows + lost == came).all()
    assert accounting.total("trained") == np.count_nonzero(weights)
    assert accounting.cells["anchor"] == (cells == ANCHOR).sum() == case.shape.anchor_len * len(rows)
    assert accounting.cells["padding"] == (cells == PAD).sum()
    assert accounting.cells["tags"] == ((cells >= TAG) & (cells < ANCHOR)).sum()
    trained = cells[weights > 0]
    own = np.ones(case.lengths.sum()) if case.weights is None else case.weights
    assert (own[trained - 1] > 0).all()
    heavy = placed[own[placed - 1] > 0]  # what is in rows and would be trained, were it no piece's first token
    first = np.setdiff1d(heavy, trained)
    assert len(first) <= accounting.total("first_tokens")


def check_boundaries(case: Case, rows: list[PlainRow], layouts: list) -> None:
    """Inside a document of a row tokens follow each other; no label crosses; anchor and positions are right."""
    owner = np.repeat(np.arange(len(case.lengths)), case.lengths)
    for row, layout in zip(rows, layouts, strict=True):
        ids, docs, head = np.array(row.ids), np.array(row.docs), case.shape.anchor_len
        assert (ids[:head] == ANCHOR).all() and (ids[head:] != ANCHOR).all()
        assert layout.length == case.shape.row_length and layout.anchor_len == head
        trained = np.flatnonzero(row.weights)
        assert (docs[trained] == docs[trained - 1]).all() and (ids[trained] < TAG).all()
        by_doc = np.argsort(docs, kind="stable")
        together = (docs[by_doc][1:] == docs[by_doc][:-1]) & (ids[by_doc][1:] < TAG) & (ids[by_doc][:-1] < TAG)
        after, before = ids[by_doc][1:][together], ids[by_doc][:-1][together]
        assert (after == before + 1).all() and (owner[after - 1] == owner[before - 1]).all()
        assert (layout.position_array() == np.arange(layout.length)).all()
        reset = Pattern.anchor_reset.apply(layout).position_array()
        for doc in np.unique(docs[head:]):
            own = reset[docs == doc]
            assert (own == head + np.arange(len(own))).all()


def test_the_cases_reach_every_policy_and_reason() -> None:
    """So that 2,000 cases are not 2,000 times the same."""
    cases = [Case.of(seed) for seed in range(200)]
    seen = {(c.config.policy, c.config.long_documents, c.config.min_length > 1, c.config.interleave > 1) for c in cases}
    assert len(seen) == 36
    reasons = {reason for case in cases for reason in case.packed()[2].dropped}
    assert reasons == {"shorter than min_length", "longer than a row", "truncated"}
    assert {case.weights is None for case in cases} == {bool(case.tag.any()) for case in cases} == {True, False}


def test_a_lost_token_is_an_error() -> None:
    """The account is an invariant that can fail: of a source, and of the rows."""
    case = next(c for c in map(Case.of, range(100)) if c.config.policy is Policy.one_per_row and len(c.lengths) > 3)
    rows, _, accounting = case.packed()
    accounting.add("document_tokens", np.array([1]), np.array([2]))
    with pytest.raises(RuntimeError, match="2 tokens of b are unaccounted for"):
        accounting.check(case.shape.row_length)
    accounting.add("trained", np.array([1]), np.array([2]))
    with pytest.raises(RuntimeError, match=f"rows do not add up: {len(rows)} x"):
        accounting.check(case.shape.row_length)
