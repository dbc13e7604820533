"""Rows to batches, in an order that is a pure function of (seed, epoch, packed set).

A step is addressed by its number: resuming means asking for the next one. The global batch of a step is the same rows
whatever the number of processes; each takes its share. The order does not depend on the batch size either, so that a
run goes on from the number of tokens it has trained, with another number of processes or another batch (`resume_at`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from anchorctx.data.order import deal, epoch_order
from anchorctx.data.packed_set import PackedSet
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern

IGNORE = -100
"""Target of a token whose prediction is not trained: what torch's cross-entropy ignores, and so `models.loss` too."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of T tokens, as a model takes them."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the token after each token, which it must predict; -100 where that is not trained."""
    loss_weights: torch.Tensor
    """(B, T) float32: the weight of each prediction; 0 where not trained."""
    layouts: tuple[PackedLayout, ...]
    """One for each row, with the pattern applied."""


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one optimizer update: this process's batches, and figures of all processes'."""

    micro_batches: tuple[Batch, ...]
    """What this process runs."""
    rows: tuple[int, ...]
    """Rows of the global step."""
    weight: float
    """Sum of the loss weights of the global step."""
    trained_tokens: int
    """Trained tokens of the global step."""
    documents: int
    """Documents (or pieces) in the global step."""


class RowLoader:
    """Random access to the steps of a training run."""

    def __init__(
        self,
        packed: PackedSet,
        pattern: Pattern,
        *,
        rows_per_step: int,
        micro_rows: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        balance: bool = True,
    ) -> None:
        """Read rows of `packed` under `pattern`.

        Args:
            packed: the set.
            pattern: what a token may see.
            rows_per_step: rows of a step, over all processes; a multiple of `micro_rows` x `world`.
            micro_rows: rows of a micro-batch.
            rank, world: this process's number, and how many there are; those that share a row count as one.
            seed: of the order.
            shuffle: a new random order in every epoch, else the set's order.
            balance: rows of like attention cost in a step, dealt out evenly to the processes (see `order`).
        """
        _check(rows_per_step, micro_rows, rank, world, seed)
        self._packed, self._pattern = packed, pattern
        self._rows_per_step, self._micro_rows = rows_per_step, micro_rows
        self._rank, self._world = rank, world
        self._seed, self._shuffle, self._balance = seed, shuffle, balance
        self._first_step = self._first_row = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Step]] | None = None
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def step(self, index: int) -> Step:
        """Step `index`, from 0; the next one is read in the background."""
        if self._ahead is not None and self._ahead[0] == index:
            step = self._ahead[1].result()
        else:  # in the pool too, so that a single thread makes steps
            step = self._pool.submit(self._make, index).result()
        self._ahead = index + 1, self._pool.submit(self._make, index + 1)
        return step

    def resume_at(self, step: int, tokens: int, rows: int | None = None) -> None:
        """Let step `step` begin where the run stands after `tokens` trained tokens.

        `rows` is how many rows those were; without it they are counted, which leaves rows without trained tokens open.
        UserError when no number of rows trains exactly so many tokens: then they were of another set or order.
        """
        self._first_step, self._ahead = step, None
        self._first_row = self._rows_of(tokens) if rows is None else rows
        if self._tokens_of(self._first_row) != tokens:
            raise UserError(
                f"{tokens:,} trained tokens are no whole number of rows of the packed set {self._packed.fingerprint} "
                "in this order: resume with the same data, data.shuffle, data.balance and seed, or choose another "
                "out_dir"
            )

    def rows_before(self, step: int) -> int:
        """Rows of the run that come before step `step`."""
        # resumed at step 100 after 800 rows, now 16 rows a step: step 103 begins after 800 + 3 * 16 = 848
        return self._first_row + (step - self._first_step) * self._rows_per_step

    def _rows_of(self, tokens: int) -> int:
        """The least number of rows that train at least so many tokens."""
        # rows that train 5, 3, 4 tokens in this epoch's order, an epoch 12: 20 tokens are an epoch and 8 of the next,
        # totals = [5, 8, 12], so 3 + 2 rows
        epochs, rest = divmod(tokens, int(self._packed.row_trained.sum()))
        totals = np.cumsum(self._packed.row_trained[self._order(epochs)])
        return epochs * len(self._packed) + (int(np.searchsorted(totals, rest)) + 1 if rest else 0)

    def _tokens_of(self, rows: int) -> int:
        """Trained tokens of the first `rows` rows."""
        epochs, within = divmod(rows, len(self._packed))
        trained = self._packed.row_trained
        return epochs * int(trained.sum()) + int(trained[self._order(epochs)[:within]].sum())

    def rows(self, index: int) -> np.ndarray:
        """(rows_per_step,) the rows of step `index`, over all processes."""
        # a set of 10 rows, 4 a step: step 2 has counters [8, 9, 10, 11], places 8, 9 of epoch 0 and 0, 1 of epoch 1
        counters = self.rows_before(index) + np.arange(self._rows_per_step)
        epochs, within = np.divmod(counters, len(self._packed))
        return np.concatenate([self._order(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)])

    def share(self, rows: np.ndarray) -> np.ndarray:
        """(rows_per_step / world,) those of a step's `rows` that this process runs, in its order."""
        if not self._balance:
            return rows[self._rank :: self._world]
        return rows[deal(self._packed.row_cost[rows], self._world)[self._rank]]

    def _order(self, epoch: int) -> np.ndarray:
        """(rows,) the order of an epoch's rows."""
        if not self._shuffle:
            return np.arange(len(self._packed))
        cached = self._epoch_order  # the last epoch's: an order of a million rows takes a while
        if cached[0] != epoch:
            fingerprint = int(self._packed.fingerprint, 16)
            order = epoch_order(self._packed.row_cost, self._seed, epoch, fingerprint, self._balance)
            self._epoch_order = cached = epoch, order
        return cached[1]

    def _make(self, index: int) -> Step:
        rows = self.rows(index)
        mine = self.share(rows)
        batches = tuple(
            make_batch(self._packed, mine[i : i + self._micro_rows], self._pattern)
            for i in range(0, len(mine), self._micro_rows)
        )
        packed = self._packed
        return Step(
            batches,
            tuple(rows.tolist()),
            float(packed.row_weight[rows].sum()),
            int(packed.row_trained[rows].sum()),
            int(packed.row_documents[rows].sum()),
        )


def _check(rows_per_step: int, micro_rows: int, rank: int, world: int, seed: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} processes")
    if seed < 0:
        raise UserError(f"seed={seed} is negative: use 0 or more")
    if micro_rows < 1 or rows_per_step < 1:
        raise UserError(f"micro_rows={micro_rows} and {rows_per_step} rows a step must both be at least 1: raise them")
    unit = micro_rows * world
    if rows_per_step % unit:
        below, above = rows_per_step // unit * unit, (rows_per_step // unit + 1) * unit
        share, rest = divmod(rows_per_step, world)
        fits = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        other = "" if rest else f", or micro_rows of {fits}"
        raise UserError(
            f"{rows_per_step} rows a step do not divide into {world} processes x {micro_rows} micro_rows: "
            f"use {f'{below} or ' if below else ''}{above} rows a step{other}"
        )


def make_batch(packed: PackedSet, rows: np.ndarray, pattern: Pattern) -> Batch:
    """The given rows as a batch under `pattern`."""
    read = [packed.row(int(row)) for row in rows]
    ids = torch.from_numpy(np.stack([row.input_ids for row in read]))
    weights = torch.from_numpy(np.stack([row.loss_weights for row in read]))
    # ids     [<s>, a, b, c] with weights [0, 0, 1, .5]
    # targets [  _, b, c, _] with weights [0, 1, .5, 0]: what is predicted at each token
    weights = F.pad(weights[:, 1:], (0, 1))
    targets = F.pad(ids[:, 1:], (0, 1)).masked_fill(weights == 0, IGNORE)
    return Batch(ids, targets, weights, tuple(pattern.apply(row.layout) for row in read))


def validation_batches(
    packed: PackedSet, pattern: Pattern, micro_rows: int, rank: int, world: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """The first `max_rows` rows, each once over all processes, in order.

    Every process gets the same number of batches, so that collectives line up: where rows run out, a batch repeats the
    last row with all targets masked.
    """
    count = len(packed) if max_rows is None else min(len(packed), max_rows)
    unit = micro_rows * world
    # 5 rows, 2 processes, micro_rows=1: process 0 reads rows 0, 2, 4, process 1 rows 1, 3 and row 4 again, masked
    for start in range(rank * micro_rows, -(-count // unit) * unit, unit):
        wanted = np.arange(start, start + micro_rows)
        batch = make_batch(packed, np.minimum(wanted, count - 1), pattern)
        beyond = torch.from_numpy(wanted >= count)[:, None]
        yield replace(
            batch,
            targets=batch.targets.masked_fill(beyond, IGNORE),
            loss_weights=batch.loss_weights.masked_fill(beyond, 0.0),
        )
