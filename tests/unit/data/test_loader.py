from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anchorctx.data.loader import Batch, RowLoader, Step, check_trained, validation_batches
from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.data.pieces import AnchorVisible, Cutting, deal_pieces, piece_tokens
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.pieces import document_costs

T, ROWS = 8, 11


def build(folder: Path, name: str = "ab12") -> PackedSet:
    """Row i is 100 i + 100, + 101, ..., behind a 1, with three kinds of weights; every third row is interleaved."""
    with ShardWriter(folder / name, T, 2000, 1, 4) as writer:
        for i in range(ROWS):
            weights = np.array([0, 0, 1, 0.1, 0, 0, 1, 0 if i % 2 else 0.5], np.float32)
            layout = PackedLayout((0, 1, 3, 5, T), 1, doc_ids=(0, 1, 2, 1) if i % 3 == 0 else None)
            ids = np.arange(T) + 100 * (i + 1)
            ids[0] = 1
            writer.add(Row(ids, weights, layout), layout.num_documents)
        writer.close({"fingerprint": name, "row_length": T})
    return PackedSet.open(folder / name)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    return build(tmp_path_factory.mktemp("packed"))


def loader(packed: PackedSet, pattern: Pattern = Pattern.anchor, **options) -> RowLoader:
    names = ("max_tokens", "rank", "world", "sequence", "shared_anchor")
    cutting = Cutting(**{"max_tokens": 9, **{name: options.pop(name) for name in names if name in options}})
    return RowLoader(packed, pattern, cutting, **{"rows_per_step": 4, "seed": 3, **options})


def trained(batches: tuple[Batch, ...] | list[Batch]) -> list[tuple[float, ...]]:
    """(token, target, weight, position) of every prediction that is trained, sorted."""
    found = []
    for batch in batches:
        (layout,) = batch.layouts
        positions = layout.position_array().tolist()
        columns = (batch.input_ids[0], batch.targets[0], batch.loss_weights[0])
        for *values, position in zip(*(x.tolist() for x in columns), positions, strict=True):
            if values[1] != -100:
                found.append((*values, position))
    return sorted(found)


def expected(packed: PackedSet, rows: list[int], pattern: Pattern = Pattern.anchor) -> list[tuple[float, ...]]:
    """The same, read from the rows token by token."""
    found = []
    for i in rows:
        row = packed.row(i)
        positions = pattern.apply(row.layout).position_array().tolist()
        for t in range(T - 1):
            if row.loss_weights[t + 1]:
                weight = float(row.loss_weights[t + 1])
                found.append((int(row.input_ids[t]), int(row.input_ids[t + 1]), weight, positions[t]))
    return sorted(found)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("world", "sequence"), [(1, 1), (2, 1), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("max_tokens", [3, 4, 9, 100])
def test_a_step_trains_the_same_for_any_pieces_and_any_number_of_processes(
    packed: PackedSet, world: int, sequence: int, max_tokens: int, pattern: Pattern
) -> None:
    whole = loader(packed, pattern, rows_per_step=5)
    options = {"rows_per_step": 5, "world": world, "sequence": sequence, "max_tokens": max_tokens}
    ranks = [loader(packed, pattern, rank=rank, **options) for rank in range(world)]
    for index in range(3):
        reference, shares = whole.step(index), [rank.step(index) for rank in ranks]
        wanted = expected(packed, list(reference.rows), pattern)
        assert trained(reference.micro_batches) == wanted
        # what a group shares is in the hands of each of its processes
        own = [batch for share in shares for batch in share.micro_batches if not batch.spread]
        shared = [batch for share in shares[::sequence] for batch in share.micro_batches if batch.spread]
        assert trained(own + shared) == wanted
        assert len({tuple(batch.spread for batch in share.micro_batches) for share in shares}) == 1
        for share in shares:
            for name in ("rows", "weight", "trained_tokens", "documents", "layouts"):
                assert getattr(share, name) == getattr(reference, name)


@pytest.mark.parametrize("max_tokens", [3, 5, 7, 20])
@pytest.mark.parametrize("sequence", [1, 2])
def test_pieces_hold_whole_documents_behind_copies_and_no_more_than_they_may(
    packed: PackedSet, max_tokens: int, sequence: int
) -> None:
    run = loader(packed, rows_per_step=8, max_tokens=max_tokens, world=2, sequence=sequence)
    for index in range(3):
        step = run.step(index)
        for batch in step.micro_batches:
            (layout,) = batch.layouts
            assert layout.anchor_len == 0 and layout.together
            if layout == PackedLayout((0, 1)):
                continue
            long = layout.length > max_tokens
            assert not long or layout.num_documents == 1
            assert batch.spread == (long and sequence > 1)
            boundaries = layout.by_document().doc_offsets[:-1]
            assert layout.copies == 1 and set(batch.input_ids[0, list(boundaries)].tolist()) == {1}
            assert (batch.input_ids[0] == 1).sum() == layout.num_documents
        lengths = [d.length + 1 for layout in step.layouts for d in layout.documents()]
        assert step.long_documents == sum(length > max_tokens for length in lengths)


def test_a_shared_anchor_stands_once_in_front_of_each_piece(packed: PackedSet) -> None:
    run = loader(packed, rows_per_step=4, shared_anchor=True, max_tokens=9)
    step = run.step(0)
    for batch in step.micro_batches:
        assert batch.layouts[0].anchor_len == 1 and batch.layouts[0].copies == 0 and batch.layouts[0].length <= 9
        assert batch.input_ids[0, 0] == 1 and (batch.input_ids[0, 1:] > 1).all()
    assert trained(step.micro_batches) == expected(packed, list(step.rows))


def test_a_steps_batches_are_made_one_after_the_other(packed: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from anchorctx.data import loader as module

    made, make = [], module.make_batch
    monkeypatch.setattr(module, "make_batch", lambda *args, **rest: made.append(args[2]) or make(*args, **rest))
    run = loader(packed, rows_per_step=6, max_tokens=4)
    step = run.step(0)
    assert len(step.micro_batches) > 5
    for done, batch in enumerate(step.micro_batches, 1):
        # at most the next one, and the first of the next step, are made ahead
        assert len(made) <= done + 2
        assert torch.equal(batch.input_ids, step.micro_batches[done - 1].input_ids) and made.pop()
    with pytest.raises(IndexError):
        step.micro_batches[len(step.micro_batches)]


def test_padding_is_neither_computed_nor_a_long_document(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", 40, 2000, 1, 4) as writer:
        layout = PackedLayout((0, 1, 5, 9, 40), 1)
        weights = np.zeros(40, np.float32)
        weights[[2, 3, 4, 6, 7, 8]] = 1
        writer.add(Row(np.arange(40) + 1, weights, layout), 2)
        writer.close({"fingerprint": "ab34", "row_length": 40})
    padded = PackedSet.open(tmp_path / "set")
    assert padded.layout(0).padding and padded.row_cost.tolist() == [1 + 16 + 16]
    for sequence in (1, 2):
        step = loader(padded, rows_per_step=1, max_tokens=12, world=sequence, sequence=sequence).step(0)
        assert step.long_documents == 0 and all(not batch.spread for batch in step.micro_batches)
        assert sum(layout.length for batch in step.micro_batches for layout in batch.layouts) <= 10
    (whole,) = loader(padded, Pattern.full, rows_per_step=1, max_tokens=42).step(0).micro_batches
    assert whole.input_ids.shape == (1, 40)


def test_a_set_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", 4, 2000, 1, 4) as writer:
        writer.add(Row(np.array([1, 5, 6, 7]), np.zeros(4, np.float32), PackedLayout((0, 1, 2, 3, 4), 1)), 3)
        writer.close({"fingerprint": "ab56", "row_length": 4})
    with pytest.raises(UserError, match="data.validation has no trained token in 1 rows"):
        check_trained(PackedSet.open(tmp_path / "set"), "validation", 3)


def test_what_a_step_says_of_the_whole_is_what_its_batches_hold(packed: PackedSet) -> None:
    for index in range(3):
        step = loader(packed, rows_per_step=6).step(index)
        weights = torch.cat([batch.loss_weights[0] for batch in step.micro_batches]).double()
        targets = torch.cat([batch.targets[0] for batch in step.micro_batches])
        assert step.weight == pytest.approx(weights.sum().item(), abs=1e-12)
        assert step.trained_tokens == (targets != -100).sum().item()
        assert step.documents == sum(layout.num_documents for batch in step.micro_batches for layout in batch.layouts)
        assert step.documents == sum(layout.num_documents for layout in step.layouts)


def positions(batch: Batch) -> torch.Tensor:
    return torch.stack([layout.position_ids() for layout in batch.layouts])


def flat(step: Step) -> list[torch.Tensor]:
    return [tensor for b in step.micro_batches for tensor in (b.input_ids, b.targets, b.loss_weights, positions(b))]


def test_any_step_can_be_asked_for_first(packed: PackedSet) -> None:
    sequential = loader(packed)
    steps = [sequential.step(i) for i in range(7)]
    jumping = loader(packed)
    for index in (5, 6, 0, 3, 2, 5, 1, 4):
        assert jumping.step(index).rows == steps[index].rows
        assert all(torch.equal(a, b) for a, b in zip(flat(jumping.step(index)), flat(steps[index]), strict=True))


@pytest.mark.parametrize("rows_per_step", [1, 4, 11, 30])
def test_an_epoch_has_each_row_once_and_its_own_order(packed: PackedSet, rows_per_step: int) -> None:
    ordered = loader(packed, rows_per_step=rows_per_step)
    steps = -(-3 * ROWS // rows_per_step)
    stream = np.concatenate([ordered.rows(i) for i in range(steps)])[: 3 * ROWS].reshape(3, ROWS)
    assert (np.sort(stream, axis=1) == np.arange(ROWS)).all()
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 3
    assert ordered.step(1).rows == tuple(ordered.rows(1).tolist())


def test_the_batch_size_does_not_change_the_order(packed: PackedSet) -> None:
    small, large = loader(packed, rows_per_step=2), loader(packed, rows_per_step=8)
    assert np.concatenate([small.rows(i) for i in range(12)]).tolist() == [
        *large.rows(0),
        *large.rows(1),
        *large.rows(2),
    ]


def test_the_order_depends_on_seed_and_content(packed: PackedSet, tmp_path: Path) -> None:
    first = loader(packed, rows_per_step=ROWS).rows(0).tolist()
    assert loader(packed, rows_per_step=ROWS).rows(0).tolist() == first
    assert loader(packed, rows_per_step=ROWS, seed=4).rows(0).tolist() != first
    assert loader(build(tmp_path, "cd34"), rows_per_step=ROWS).rows(0).tolist() != first
    assert loader(packed, rows_per_step=ROWS, shuffle=False).rows(1).tolist() == list(range(ROWS))


def stream(loader: RowLoader, first: int, steps: int) -> list[int]:
    return [row for i in range(first, first + steps) for row in loader.rows(i).tolist()]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 9])
@pytest.mark.parametrize(("rows_per_step", "world"), [(4, 2), (2, 1), (8, 4), (6, 3)])
def test_a_run_goes_on_from_its_trained_tokens_with_another_batch_and_other_processes(
    packed: PackedSet, balance: bool, steps: int, rows_per_step: int, world: int
) -> None:
    """In the third epoch, too: no row is left out and none comes twice."""
    before = loader(packed, balance=balance)
    tokens = sum(before.step(i).trained_tokens for i in range(steps))
    whole = stream(before, 0, 20)
    for rows in (None, before.rows_before(steps)):
        ranks = [
            loader(packed, balance=balance, rows_per_step=rows_per_step, rank=rank, world=world)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.resume_at(steps, tokens, rows)
        assert stream(before, 0, steps) + stream(ranks[0], steps, 3) == whole[: steps * 4 + 3 * rows_per_step]
        batches = [batch for rank in ranks for batch in rank.step(steps).micro_batches]
        assert trained(batches) == expected(packed, ranks[0].rows(steps).tolist())
        again = loader(packed, balance=balance, rows_per_step=4)  # and once more, from where that one stopped
        again.resume_at(steps + 2, tokens + sum(ranks[0].step(steps + i).trained_tokens for i in range(2)))
        assert again.rows(steps + 2).tolist() == whole[steps * 4 + 2 * rows_per_step :][:4]


def test_rows_without_trained_tokens_are_neither_lost_nor_doubled(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "ab12", T, 100, 1, 4) as writer:
        for i in range(8):
            weights = np.full(T, float(i % 2), np.float32)
            writer.add(Row(np.full(T, 10 + i), weights, PackedLayout((0, 1, T), 1)), 1)
        writer.close({"fingerprint": "ab12", "row_length": T})
    packed = PackedSet.open(tmp_path)
    for step in range(9):
        run = loader(packed, rows_per_step=1)
        tokens = sum(run.step(i).trained_tokens for i in range(step))
        resumed = loader(packed, rows_per_step=1)
        resumed.resume_at(step, tokens, run.rows_before(step))
        assert stream(resumed, step, 4) == stream(run, step, 4)


def test_tokens_of_another_order_are_refused(packed: PackedSet) -> None:
    for rows in (None, 3):
        with pytest.raises(UserError, match="5 trained tokens are no whole number of rows of the packed set ab12"):
            loader(packed).resume_at(3, 5, rows)


@pytest.mark.parametrize("pattern", Pattern)
def test_a_pattern_decides_on_copies_and_positions(packed: PackedSet, pattern: Pattern) -> None:
    run = loader(packed, pattern, rows_per_step=1, shuffle=False, max_tokens=100)
    anchored = pattern in (Pattern.anchor, Pattern.anchor_reset)
    found = []
    for index in range(2):  # row 0: documents 1 (two chunks) and 2; row 1: three documents
        (batch,) = run.step(index).micro_batches
        (layout,) = batch.layouts
        assert layout.copies == int(anchored)
        found.append(sorted(zip(batch.input_ids[0].tolist(), layout.position_array().tolist(), strict=True)))
    wanted = {
        Pattern.full: [[1, *range(101, 108)], [1, *range(201, 208)]],
        Pattern.anchor: [[1, 1, *range(101, 108)], [1, 1, 1, *range(201, 208)]],
    }
    # without an anchor the row's first token is a document of one token, which trains nothing and is left out
    ids = wanted.get(pattern, wanted[Pattern.anchor] if anchored else [list(range(101, 108)), list(range(201, 208))])
    places = {
        Pattern.anchor_reset: [[0, 0, 1, 2, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 1, 2, 1, 2, 3]],
        Pattern.intra_doc_reset: [[0, 1, 0, 1, 2, 3, 4], [0, 1, 0, 1, 0, 1, 2]],
        Pattern.anchor: [[0, 0, *range(1, 8)], [0, 0, 0, *range(1, 8)]],
        Pattern.full: [list(range(8))] * 2,
        Pattern.intra_doc: [list(range(1, 8))] * 2,
    }[pattern]
    assert found == [sorted(zip(a, b, strict=True)) for a, b in zip(ids, places, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [3, 9, 30])
@pytest.mark.parametrize("max_rows", [None, 1, 5, 100])
def test_validation_sees_each_row_once(packed: PackedSet, world: int, max_tokens: int, max_rows: int | None) -> None:
    ranks = [
        list(validation_batches(packed, Pattern.anchor, Cutting(max_tokens, r, world), max_rows)) for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert trained(batches) == expected(packed, list(range(min(ROWS, max_rows or ROWS))))
    for batch in batches:
        assert torch.equal(batch.targets == -100, batch.loss_weights == 0)
        assert batch.targets.dtype == torch.int64 and batch.loss_weights.dtype == torch.float32


def test_a_process_without_documents_gets_an_empty_piece(packed: PackedSet) -> None:
    ranks = [loader(packed, rows_per_step=1, max_tokens=100, rank=rank, world=8) for rank in range(8)]
    batches = [batch for rank in ranks for batch in rank.step(0).micro_batches]
    assert len(batches) == 8
    empty = [batch for batch in batches if batch.layouts == (PackedLayout((0, 1)),)]
    assert len(empty) >= 5 and all(batch.targets.tolist() == [[-100]] for batch in empty)
    assert trained(batches) == expected(packed, list(ranks[0].step(0).rows))


def test_eight_processes_have_the_same_to_do() -> None:
    """A row of 1,048,576 tokens of log-normal documents: the costliest process is within 5 % of the mean."""
    rng, offsets = np.random.default_rng(0), [0, 1]
    while offsets[-1] < 2**20:
        offsets.append(min(offsets[-1] + max(int(rng.lognormal(np.log(800), 1.2)), 1), 2**20))
    layout = PackedLayout(tuple(offsets), 1)
    cuttings = [Cutting(32_768, rank, 8, token_cost=25_000) for rank in range(8)]
    costs = [
        sum(
            document_costs(np.array([d.length + 1 for _, d in piece.documents]), 25_000).sum()
            for piece in deal_pieces([layout], cutting).pieces
        )
        for cutting in cuttings
    ]
    assert max(costs) < 1.02 * np.mean(costs)


def test_the_room_of_a_piece_follows_the_row_unless_it_is_given() -> None:
    assert piece_tokens(None, 1024, Pattern.anchor, 1) == 1088
    assert piece_tokens(100, 1024, Pattern.anchor, 1) == 100
    assert piece_tokens(512, 1024, Pattern.full, 2) == 512
    with pytest.raises(UserError) as error:
        piece_tokens(100, 1024, Pattern.full, 2)
    assert str(error.value) == (
        "micro_tokens=100 x 2 processes cannot hold a row of 1024 tokens, and pattern=full makes each row one "
        "document, which cannot be cut: raise micro_tokens or parallel.sequence_parallel, or take another pattern"
    )
    assert [choice.value for choice in AnchorVisible] == ["window", "always"]


def test_pieces_too_small_for_any_document() -> None:
    with pytest.raises(UserError, match="micro_tokens=3 leaves no room for .* behind an anchor of 2: use at least 4"):
        piece_tokens(3, 64, Pattern.anchor, 1, anchor_len=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": -1}, "seed=-1 is negative: use 0 or more"),
    ],
)
def test_bad_settings(packed: PackedSet, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        loader(packed, **options)
    assert str(error.value) == sentence
