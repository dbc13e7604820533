"""Talks run to their end: one by one, or several at once, of which each forward gives everyone the next token.

A forward of one token reads all weights, one of several tokens reads them once for all. Prompts differ in length, so
each is a row of its own, with its own slots and mask (`Decoder.forward_rows`). Words are those of single runs up to
rounding: a row's logits differ from the single ones in the last digits.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch

from anchorctx.kvcomm.decoder import Buffer, Decoder
from anchorctx.kvcomm.turn import Found, Step, Talk

Name = TypeVar("Name", bound=Hashable)


def alone(decoder: Decoder, talk: Talk[Found]) -> Found:
    """A talk's outcome."""
    try:
        step = next(talk)
        while True:
            step = talk.send(_single(decoder, step))
    except StopIteration as end:
        return end.value


def together(decoder: Decoder, talks: Mapping[Name, Talk[Found]], at_once: int | None = None) -> dict[Name, Found]:
    """The talks' outcomes; every forward has a token of each that still goes on, as long as there are several.

    What a talk does between two tokens, such as reading the next prompt, is done for it alone meanwhile. No more than
    `at_once` go on at a time, each in a row of memory; the next one begins when one of them is over. None is all.
    """
    at_once = len(talks) if at_once is None else min(at_once, len(talks))
    found: dict[Name, Found] = {}
    steps: dict[Name, Step] = {}
    waiting, rows = iter(talks), _Rows[Name](decoder, at_once)

    def go_on(name: Name, logits: torch.Tensor | None) -> None:
        steps.pop(name, None)
        try:
            steps[name] = next(talks[name]) if logits is None else talks[name].send(logits)
        except StopIteration as end:
            found[name] = end.value

    def begin() -> None:
        while len(steps) < at_once and (name := next(waiting, None)) is not None:
            go_on(name, None)

    begin()
    while steps:
        for name, logits in rows.forward(steps).items():
            go_on(name, logits)
        begin()
    return {name: found[name] for name in talks}


def _single(decoder: Decoder, step: Step) -> torch.Tensor:
    return decoder.forward(decoder.tensor([step.token]), step.buffer, range(step.slot, step.slot + 1))[0, -1]


class _Rows(Generic[Name]):
    """One buffer with a row for each talk, the ones that go on in front; their own buffers are kept up to date."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        self.decoder, self.count = decoder, count
        self.buffer: Buffer | None = None
        self.names: list[Name] = []
        """Of the rows."""
        self.held: dict[Name, tuple[Buffer, int]] = {}
        """Whose entries a row has, and how many of them."""

    def forward(self, steps: Mapping[Name, Step]) -> dict[Name, torch.Tensor]:
        """Each one's logits (V,)."""
        if len(steps) == 1:
            ((name, step),) = steps.items()
            return {name: _single(self.decoder, step)}
        self._leave(steps)
        self.names += [name for name in steps if name not in self.names]
        buffer = self._room(max(step.buffer.capacity for step in steps.values()))
        ordered = [steps[name] for name in self.names]
        for row, (name, step) in enumerate(zip(self.names, ordered, strict=True)):
            own, filled = self.held.get(name, (None, 0))
            if (
                own is not step.buffer or filled != step.slot
            ):  # another prompt, or one whose tokens were not all run here
                _copy(step.buffer, 0, buffer, row, slice(step.slot))
                for entries in (buffer.keys, buffer.values):
                    entries[:, row, :, step.slot :] = 0  # hidden from this row, but read as well
        device = self.decoder.device
        ids, slots = (torch.tensor(x, device=device) for x in ([s.token for s in ordered], [s.slot for s in ordered]))
        logits = self.decoder.forward_rows(ids, buffer, slots)
        for row, (name, step) in enumerate(zip(self.names, ordered, strict=True)):
            _copy(buffer, row, step.buffer, 0, slice(step.slot, step.slot + 1))
            self.held[name] = step.buffer, step.slot + 1
        return dict(zip(self.names, logits, strict=True))

    def _leave(self, steps: Mapping[Name, Step]) -> None:
        """Take out the rows of talks that are over; the last row moves into each one's place."""
        for name in [name for name in self.names if name not in steps]:
            row, last = self.names.index(name), self.names.pop()
            self.held.pop(name)
            if last != name:
                self.names[row] = last
                assert self.buffer is not None
                _copy(self.buffer, len(self.names), self.buffer, row, slice(None))

    def _room(self, capacity: int) -> Buffer:
        """The buffer, with room for so many tokens a row."""
        if self.buffer is None or self.buffer.capacity < capacity:
            self.buffer = self.decoder.buffer(capacity, self.count)
            self.held.clear()
        return self.buffer


def _copy(source: Buffer, row: int, target: Buffer, other: int, slots: slice) -> None:
    target.keys[:, other, :, slots] = source.keys[:, row, :, slots]
    target.values[:, other, :, slots] = source.values[:, row, :, slots]
