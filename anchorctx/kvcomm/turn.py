"""One agent's turn: fill the prompt's cache, compute the rest, speak, and keep the message's KV. One path for all arms.

All arms are timed on the same path, and nothing but decoding is left out of the time to first token:
`match` (deciding, approximating, choosing what to recompute), `encode` (base KV, anchored documents), `assemble`
(placing), `forward` (the first token), `upkeep` (observing offsets, keeping the message).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from anchorctx.flops import ModelFlops
from anchorctx.kvcomm.agents import Answer, Ids, Prompt
from anchorctx.kvcomm.arms.basic import Arm
from anchorctx.kvcomm.decoder import Buffer, Decoder
from anchorctx.kvcomm.request import Placement, Shared, TurnContext, now

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt's finished cache."""

    buffer: Buffer
    logits: torch.Tensor
    """(V,) of the first token to come."""
    given: tuple[Placement, ...]
    computed: int
    """Prompt tokens that the model ran on."""
    pairs: int
    """(query, key) pairs of attention for them."""
    reused: tuple[bool, ...]
    """For each non-empty placeholder: was any entry of it given?"""
    contents: tuple[int, int]
    """Tokens of all placeholders, and those of them that the model ran on."""
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one agent did."""

    agent: str
    prompt: Prompt
    computed: int
    """Prompt tokens that were run with this prompt."""
    hidden: int
    """Tokens that were run beside it: base texts, anchored documents, the message's own KV."""
    reused: tuple[bool, ...]
    """For each non-empty placeholder: did any of its KV come from elsewhere?"""
    contents: tuple[int, int]
    """Tokens of all placeholders, and those of them that were run with this prompt."""
    flops: float
    """Forward FLOPs of the prefill with all hidden work."""
    dense_flops: float
    """Those of a dense prefill."""
    seconds: dict[str, float]
    """By part; see the module."""
    answer: Answer
    ids: Ids
    """The answer's tokens."""
    message: Ids
    """What it passed on, in tokens."""
    logits: torch.Tensor
    """(n, V) that predicted the answer's tokens when it was given; (1, V), the first ones, otherwise."""
    buffer: Buffer
    """The prompt's KV."""

    @property
    def ttft(self) -> float:
        """Seconds to the first token with all hidden work, upkeep too."""
        return total(self.seconds)


@torch.no_grad()
def prefill(context: TurnContext, arm: Arm, room: int) -> Prefill:
    """Place what the arm gives, run the model on every other token; the buffer has `room` for what follows."""
    decoder, prompt = context.decoder, context.prompt
    clock = [now(decoder.device)]
    given = tuple(p for p in arm.place(context) if p.kv.length)
    clock.append(now(decoder.device))
    buffer = decoder.buffer(prompt.length + room)
    missing = torch.ones(prompt.length, dtype=torch.bool)
    for placement in given:
        placement.write(decoder, buffer)
        missing[placement.start : placement.start + placement.kv.length] = False
    clock.append(now(decoder.device))
    missing[arm.choose(context, buffer)] = True
    reused = tuple(not bool(missing[s.start : s.stop].all()) for s in prompt.placeholders if s.length)
    missing[-1] = True  # its logits are needed, whatever was placed there
    slots = torch.nonzero(missing)[:, 0]
    clock.append(now(decoder.device))
    contents = [missing[s.start : s.stop] for s in prompt.placeholders]
    ids = decoder.tensor(prompt.ids)[:, slots.to(decoder.device)]
    logits = decoder.forward(ids, buffer, _range_of(slots))[0, -1]
    clock.append(now(decoder.device))
    match, assemble, choose, forward = (b - a for a, b in itertools.pairwise(clock))
    # Encoding happens inside `place`, on demand: it is taken out of `match` and shown apart.
    seconds = {"match": match + choose - context.tally.seconds, "encode": context.tally.seconds}
    seconds |= {"assemble": assemble, "forward": forward}
    # The token in slot s sees s + 1 slots, itself included.
    pairs, counts = int((slots + 1).sum()), (sum(map(len, contents)), sum(int(run.sum()) for run in contents))
    return Prefill(buffer, logits, given, len(slots), pairs, reused, counts, seconds)


@dataclass(frozen=True, slots=True)
class Step:
    """What somebody who speaks waits for: the logits (V,) behind `token`, run in `slot` of a prompt's buffer."""

    buffer: Buffer
    slot: int
    token: int


Talk = Generator[Step, torch.Tensor, Found]
"""A computation that asks for one token's logits at a time; `together` runs several of them."""


def speak(
    buffer: Buffer,
    length: int,
    logits: torch.Tensor,
    limit: int,
    ends: frozenset[int],
    stop: Callable[[Ids], bool] | None = None,
) -> Talk[tuple[Ids, int]]:
    """Greedy decoding behind a prompt of `length` tokens: the answer, and how many of its tokens have their KV."""
    answer: list[int] = []
    while True:
        token = int(logits.argmax())
        if token in ends:
            return tuple(answer), len(answer)
        answer.append(token)
        if len(answer) == limit or (stop is not None and stop(tuple(answer))):
            return tuple(answer), len(answer) - 1
        # The first token came from the prefill's logits; its KV is computed when the second one is asked for.
        logits = yield Step(buffer, length + len(answer) - 1, token)


@torch.no_grad()
def recite(decoder: Decoder, buffer: Buffer, length: int, logits: torch.Tensor, answer: Ids) -> torch.Tensor:
    """Run a given answer: logits (max(1, n), V) that predict its tokens; their KV is in the buffer afterwards."""
    if not answer:
        return logits[None]
    at = range(length, length + len(answer))
    # The prefill predicts answer[0]; running answer[0 .. n-1] predicts answer[1 .. n], of which the last is not needed.
    following = decoder.forward(decoder.tensor(answer), buffer, at, keep=len(answer))[0]
    return torch.cat([logits[None], following[:-1]])


@torch.no_grad()
def keep_message(context: TurnContext, buffer: Buffer, message: Ids, filled: int) -> Shared:
    """The message's KV as its speaker computed it, un-rotated; its first `filled` tokens are in the buffer already."""
    decoder, length = context.decoder, context.prompt.length
    # `filled` is 0 where the message does not begin with the answer, and one short where the answer reached its limit:
    # its last token was not run.
    if filled < len(message):
        if buffer.capacity < length + len(message):
            buffer = _grown(decoder, buffer, length + filled, length + len(message))
        at = range(length + filled, length + len(message))
        decoder.forward(decoder.tensor(message[filled:]), buffer, at, keep=0)
        context.tally.count(len(message) - filled, length + filled)
    kv = decoder.rope.unrotated(buffer.kv(length, length + len(message)))
    return Shared(kv.copy(), length)


def finished(
    flops: ModelFlops,
    context: TurnContext,
    found: Prefill,
    seconds: dict[str, float],
    answer: Answer,
    ids: Ids,
    message: Ids,
    logits: torch.Tensor,
) -> Turn:
    """The turn of an agent that has spoken, with its work in FLOPs."""
    tally, length = context.tally, context.prompt.length
    layers = len(flops.windows)

    def forward(tokens: int, pairs: int) -> float:
        # ModelFlops counts forward and backward, which is three times the forward.
        return (flops.per_token * tokens + flops.per_pair * pairs * layers) / 3

    return Turn(
        agent=context.prompt.agent,
        prompt=context.prompt,
        computed=found.computed,
        hidden=tally.tokens,
        reused=found.reused,
        contents=found.contents,
        flops=forward(found.computed + tally.tokens, found.pairs + tally.pairs),
        dense_flops=forward(length, length * (length + 1) // 2),
        seconds=seconds,
        answer=answer,
        ids=ids,
        message=message,
        logits=logits,
        buffer=found.buffer,
    )


def _range_of(slots: torch.Tensor) -> range | torch.Tensor:
    """Neighbouring slots as a range, which needs no mask of its own."""
    first, last = int(slots[0]), int(slots[-1])
    return range(first, last + 1) if last - first + 1 == len(slots) else slots


def _grown(decoder: Decoder, buffer: Buffer, used: int, capacity: int) -> Buffer:
    larger = decoder.buffer(capacity, buffer.keys.shape[1])
    larger.keys[:, :, :, :used] = buffer.keys[:, :, :, :used]
    larger.values[:, :, :, :used] = buffer.values[:, :, :, :used]
    return larger


def total(seconds: dict[str, float], parts: Sequence[str] = ()) -> float:
    """Sum of all parts, or of those in `parts`."""
    return sum(value for name, value in seconds.items() if not parts or name in parts)
