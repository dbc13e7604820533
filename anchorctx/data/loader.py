"""Rows to batches, in an order that is a pure function of (seed, epoch, packed set).

A step is addressed by its number: resuming means asking for the next one. The global batch of a step is the same rows
whatever the number of processes; their documents are dealt out in pieces (`data.pieces`). The order does not depend on
the batch size either, so that a run goes on from the number of tokens it has trained, with another number of processes,
another batch or other pieces (`resume_at`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from anchorctx.data.order import epoch_order
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.pieces import Cutting, Piece, deal_pieces
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern

IGNORE = -100
"""Target of a token whose prediction is not trained: what torch's cross-entropy ignores, and so `models.loss` too."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes: B rows of T tokens; the loader makes one row of each piece."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the token after each token, which it must predict; -100 where that is not trained."""
    loss_weights: torch.Tensor
    """(B, T) float32: the weight of each prediction; 0 where not trained."""
    layouts: tuple[PackedLayout, ...]
    """One for each row."""
    spread: bool = False
    """Do the processes of a sequence-parallel group share these tokens? Else they are this process's alone."""


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one optimizer update: this process's batches, and figures of all processes'."""

    micro_batches: Sequence[Batch]
    """What this process runs; the loader's are read while they are iterated over (`Batches`)."""
    rows: tuple[int, ...]
    """Rows of the global step."""
    layouts: tuple[PackedLayout, ...]
    """Their layouts, with the pattern applied and one shared anchor, as they were packed."""
    weight: float
    """Sum of the loss weights of the global step."""
    trained_tokens: int
    """Trained tokens of the global step."""
    documents: int
    """Documents of the global step, those that packing cut from others included."""
    long_documents: int
    """Those among them that are longer than a piece."""


class Batches(Sequence[Batch]):
    """A step's batches, each made when it is asked for: rows of a million tokens are never held whole.

    In a loop, each is read in the background while the one before it is computed.
    """

    def __init__(self, make: Callable[[Piece], Batch], pieces: Sequence[Piece], pool: Executor) -> None:
        """`make` reads a piece, in a thread of `pool`; the first piece is read at once."""
        self._make, self._pieces, self._pool = make, pieces, pool
        self._first = pool.submit(make, pieces[0])

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return self._pool.submit(self._make, self._pieces[index]).result()

    def __iter__(self) -> Iterator[Batch]:
        ahead = self._first
        for following in self._pieces[1:]:
            batch, ahead = ahead.result(), self._pool.submit(self._make, following)
            yield batch
        yield ahead.result()


class RowLoader:
    """Random access to the steps of a training run."""

    def __init__(
        self,
        packed: PackedSet,
        pattern: Pattern,
        cutting: Cutting,
        *,
        rows_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        balance: bool = True,
    ) -> None:
        """Read rows of `packed` under `pattern`.

        Args:
            packed: the set.
            pattern: what a token may see.
            cutting: how a step's rows are cut into pieces, and which process this is.
            rows_per_step: rows of a step, over all processes.
            seed: of the order.
            shuffle: a new random order in every epoch, else the set's order.
            balance: rows of like attention cost share a step (see `order`).
        """
        if seed < 0:
            raise UserError(f"seed={seed} is negative: use 0 or more")
        self._packed, self._pattern, self._cutting = packed, pattern, cutting
        self._rows_per_step = rows_per_step
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
        rows, packed = self.rows(index), self._packed
        layouts = row_layouts(packed, rows, self._pattern)
        dealt = deal_pieces(layouts, self._cutting)
        make = functools.partial(make_batch, packed, rows, anchor_len=layouts[0].anchor_len, cutting=self._cutting)
        return Step(
            Batches(make, dealt.pieces, self._pool),
            tuple(rows.tolist()),
            layouts,
            float(packed.row_weight[rows].sum()),
            int(packed.row_trained[rows].sum()),
            int(packed.row_documents[rows].sum()),
            dealt.long_documents,
        )


def check_trained(packed: PackedSet, key: str, rows: int | None = None) -> None:
    """UserError when the first `rows` rows of the set at `data.{key}` (None: all) train no token."""
    if not packed.row_trained[:rows].any():
        raise UserError(
            f"data.{key} has no trained token in {len(packed) if rows is None else min(rows, len(packed)):,} rows "
            f"({packed.folder}): documents need two tokens or more, and loss weights above 0; prepare others"
        )


def row_layouts(packed: PackedSet, rows: np.ndarray, pattern: Pattern) -> tuple[PackedLayout, ...]:
    """The layouts of whole rows under `pattern`."""
    return tuple(pattern.apply(packed.layout(int(row))) for row in rows)


def make_batch(packed: PackedSet, rows: np.ndarray, piece: Piece, anchor_len: int, cutting: Cutting) -> Batch:
    """A piece of the given rows as one row of tokens, (1, T')."""
    layout = piece.layout(anchor_len, cutting)
    parts = [(rows[row], document.where(layout.copies)) for row, document in piece.documents]
    if layout.anchor_len:  # shared by all documents of the piece
        parts.insert(0, (rows[piece.documents[0][0]], np.arange(anchor_len)))
    read = [packed.predictions(int(row), index) for row, index in parts]
    ids, targets, weights = (torch.from_numpy(np.concatenate(x)) for x in zip(*(read or [EMPTY]), strict=True))
    targets.masked_fill_(weights == 0, IGNORE)
    return Batch(ids[None], targets[None], weights[None], (layout,), piece.spread)


EMPTY = (np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32))
"""Token, target and weight of an empty piece."""


def validation_batches(
    packed: PackedSet, pattern: Pattern, cutting: Cutting, max_rows: int | None = None
) -> Iterator[Batch]:
    """This process's pieces of the first `max_rows` rows; every process gets the same number of them."""
    rows = np.arange(len(packed) if max_rows is None else min(len(packed), max_rows))
    layouts = row_layouts(packed, rows, pattern)
    for piece in deal_pieces(layouts, cutting).pieces:
        yield make_batch(packed, rows, piece, layouts[0].anchor_len, cutting)
