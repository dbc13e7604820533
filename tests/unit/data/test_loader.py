from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anchorctx.data.loader import Batch, RowLoader, Step, make_batch, validation_batches
from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern, Positions

T, ROWS = 8, 11


def build(folder: Path, name: str = "ab12") -> PackedSet:
    """Row i is all 10 + i, with three kinds of weights and two interleaved documents in every third row."""
    with ShardWriter(folder / name, T, 100, 1, 4) as writer:
        for i in range(ROWS):
            weights = np.array([0, 0, 1, 0.1, 0, 0, 1, 0 if i % 2 else 0.5], np.float32)
            layout = PackedLayout((0, 1, 3, 5, T), 1, doc_ids=(0, 1, 2, 1) if i % 3 == 0 else None)
            writer.add(Row(np.full(T, 10 + i), weights, layout), layout.num_documents)
        writer.close({"fingerprint": name, "row_length": T})
    return PackedSet.open(folder / name)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    return build(tmp_path_factory.mktemp("packed"))


def loader(packed: PackedSet, pattern: Pattern = Pattern.anchor, **options) -> RowLoader:
    return RowLoader(packed, pattern, **{"rows_per_step": 4, "micro_rows": 1, "seed": 3, **options})


def rows_in(batches: tuple[Batch, ...] | list[Batch]) -> list[int]:
    return [int(row) - 10 for batch in batches for row in batch.input_ids[:, 0]]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    packed: PackedSet, world: int, micro_rows: int
) -> None:
    reference = loader(packed, rows_per_step=8)
    ranks = [loader(packed, rows_per_step=8, micro_rows=micro_rows, rank=r, world=world) for r in range(world)]
    for index in range(4):
        whole, shares = reference.step(index), [rank.step(index) for rank in ranks]
        assert sorted(row for share in shares for row in rows_in(share.micro_batches)) == sorted(whole.rows)
        assert len({len(share.micro_batches) for share in shares}) == 1
        for share in shares:
            assert all(batch.input_ids.shape == (micro_rows, T) for batch in share.micro_batches)
            assert (share.rows, share.weight, share.trained_tokens, share.documents) == (
                whole.rows,
                whole.weight,
                whole.trained_tokens,
                whole.documents,
            )


def test_what_a_step_says_of_the_whole_is_what_its_batches_hold(packed: PackedSet) -> None:
    for index in range(3):
        step = loader(packed, rows_per_step=6).step(index)
        weights = torch.cat([batch.loss_weights for batch in step.micro_batches]).double()
        targets = torch.cat([batch.targets for batch in step.micro_batches])
        assert step.weight == pytest.approx(weights.sum().item(), abs=1e-12)
        assert step.trained_tokens == (targets != -100).sum().item()
        assert step.documents == sum(layout.num_documents for b in step.micro_batches for layout in b.layouts)


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
        shares = [rows_in(rank.step(steps).micro_batches) for rank in ranks]
        assert sorted(row for share in shares for row in share) == sorted(ranks[0].rows(steps).tolist())
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
def test_patterns_change_layouts_and_nothing_else(packed: PackedSet, pattern: Pattern) -> None:
    rows = np.array([0, 1, 2])
    batch, reference = make_batch(packed, rows, pattern), make_batch(packed, rows, Pattern.anchor)
    for name in ("input_ids", "targets", "loss_weights"):
        assert torch.equal(getattr(batch, name), getattr(reference, name))
    assert batch.layouts == tuple(pattern.apply(packed.row(i).layout) for i in range(3))
    assert len(set(batch.layouts)) == (1 if pattern is Pattern.full else 2)
    anchored = pattern in (Pattern.anchor, Pattern.anchor_reset)
    reset = pattern in (Pattern.intra_doc_reset, Pattern.anchor_reset)
    for layout in batch.layouts:
        assert layout.anchor_len == int(anchored)
        assert layout.positions is (Positions.reset if reset else Positions.continuous)
        assert layout.num_documents == 1 or pattern is not Pattern.full
    expected = {  # row 0: documents 1 (two chunks) and 2; row 1: three documents
        Pattern.anchor_reset: [[0, 1, 2, 1, 2, 3, 4, 5], [0, 1, 2, 1, 2, 1, 2, 3]],
        Pattern.intra_doc_reset: [[0, 0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 0, 1, 0, 1, 2]],
    }
    assert positions(batch)[:2].tolist() == expected.get(pattern, [list(range(T))] * 2)


def test_targets_are_the_next_tokens_where_these_have_weights(packed: PackedSet) -> None:
    batch = make_batch(packed, np.arange(ROWS), Pattern.anchor)
    assert torch.equal(batch.targets == -100, batch.loss_weights == 0)
    for i in range(ROWS):
        row = packed.row(i)
        assert batch.loss_weights[i].tolist() == [*row.loss_weights[1:].tolist(), 0]
        wanted = np.where(row.loss_weights[1:] == 0, -100, row.input_ids[1:])
        assert batch.targets[i].tolist() == [*wanted.tolist(), -100]
    assert batch.targets.dtype == torch.int64 and batch.loss_weights.dtype == torch.float32


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_rows", [1, 2, 4])
@pytest.mark.parametrize("max_rows", [None, 1, 5, 100])
def test_validation_sees_each_row_once(packed: PackedSet, world: int, micro_rows: int, max_rows: int | None) -> None:
    ranks = [list(validation_batches(packed, Pattern.anchor, micro_rows, r, world, max_rows)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen, repeats = [], 0
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.input_ids.shape == (micro_rows, T)
        assert torch.equal(batch.targets == -100, batch.loss_weights == 0)
        for row, targets in zip(batch.input_ids[:, 0].tolist(), batch.targets, strict=True):
            if bool((targets != -100).any()):
                seen.append(row - 10)
            else:
                repeats += 1
    count = min(ROWS, max_rows or ROWS)
    assert sorted(seen) == list(range(count))
    assert repeats == -count % (world * micro_rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"rows_per_step": 6, "micro_rows": 2, "world": 2},
            "6 rows a step do not divide into 2 processes x 2 micro_rows: use 4 or 8 rows a step, or "
            "micro_rows of 1, 3",
        ),
        (
            {"rows_per_step": 1, "world": 2},
            "1 rows a step do not divide into 2 processes x 1 micro_rows: use 2 rows a step",
        ),
        ({"micro_rows": 0}, "micro_rows=0 and 4 rows a step must both be at least 1: raise them"),
        ({"seed": -1}, "seed=-1 is negative: use 0 or more"),
    ],
)
def test_bad_settings(packed: PackedSet, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        loader(packed, **options)
    assert str(error.value) == sentence
