"""What an arm sees when an agent is about to speak, and the state of a request. Nothing here is global, and requests
share nothing but what a session encodes once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from anchorctx.kvcomm.agents import Frame, Ids, Prompt, Segment
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Buffer, Decoder


@dataclass(frozen=True, slots=True)
class Shared:
    """A segment's base KV: as it was computed first, in front of whatever stood before it then."""

    kv: KV
    """Un-rotated, except an agent's fixed prefix, which never moves."""
    home: int
    """Position of its first token when it was computed."""


@dataclass(slots=True)
class Tally:
    """Work outside the prompt's own forward: encodings of texts, of anchored documents, of messages."""

    tokens: int = 0
    pairs: int = 0
    """(query, key) pairs of attention."""
    seconds: float = 0.0

    def count(self, tokens: int, ahead: int = 0, part: float = 1.0) -> None:
        """`tokens` were run behind `ahead` others, through that part of the model: they count as so many fewer."""
        # Each new token sees all those ahead, and the new ones up to itself.
        self.tokens += math.ceil(tokens * part)
        self.pairs += math.ceil((tokens * ahead + tokens * (tokens + 1) // 2) * part)


@dataclass(slots=True)
class RequestState:
    """One request: its texts and messages, and the KV that was computed for them."""

    number: int
    """Requests are numbered as they are started."""
    contents: dict[str, Ids] = field(default_factory=dict)
    """By placeholder: texts and messages in tokens."""
    texts: dict[str, str] = field(default_factory=dict)
    """By placeholder: those of the contents that came as text, as they came."""
    shared: dict[str, Shared] = field(default_factory=dict)
    anchored: dict[tuple[Ids, int], KV] = field(default_factory=dict)
    """Documents encoded behind the anchor alone, by tokens and position."""
    distances: dict[tuple[str, int], float] = field(default_factory=dict)
    """KVCOMM: from its contents to exemplars, by placeholder and the exemplar's request."""

    def fork(self) -> RequestState:
        """A copy, independent from here on."""
        return RequestState(
            self.number,
            dict(self.contents),
            dict(self.texts),
            dict(self.shared),
            dict(self.anchored),
            dict(self.distances),
        )


class Prefixes:
    """What a session encodes once, before any request: base KV of each agent's glue, and the anchor's KV."""

    def __init__(self, decoder: Decoder, bos: int, header: Ids = ()) -> None:
        self._decoder, self._glue = decoder, dict[Frame, dict[int, Shared]]()
        self.header = (bos, *header)
        self._bos = bos
        self._anchor: KV | None = None

    def anchor(self) -> KV:
        """The anchor's KV, one token at position 0."""
        if self._anchor is None:
            self._anchor = self._decoder.encode(self._decoder.tensor([self._bos]))
        return self._anchor

    def glue(self, frame: Frame) -> dict[int, Shared]:
        """By segment number. One run of the skeleton; a prefix stays rotated, the rest is kept un-rotated."""
        if frame not in self._glue:
            skeleton, rope = frame.skeleton(), self._decoder.rope
            # Glue behind a placeholder depends on what stands there; the placeholder's name stands in for it. Copies,
            # so that the rest of the run is freed.
            whole = self._decoder.encode(self._decoder.tensor(skeleton.ids))
            pieces = {s.number: (s, whole.cut(s.start, s.stop)) for s in skeleton.segments if s.name is None}
            self._glue[frame] = {
                number: Shared((rope.unrotated(kv) if s.start else kv).copy(), s.start)
                for number, (s, kv) in pieces.items()
            }
        return self._glue[frame]


@dataclass(frozen=True, slots=True)
class Placement:
    """KV entries for some of a prompt's slots."""

    kv: KV
    start: int
    """Slot of the first."""
    rotation: int | None = None
    """Position that the first key is rotated to; None is its slot."""

    def write(self, decoder: Decoder, buffer: Buffer) -> None:
        """Place the entries: keys rotated once, values as they are."""
        # `naive` differs from `rotate` only here: it rotates to where the entries were computed, not to their slots.
        rotation = self.start if self.rotation is None else self.rotation
        decoder.rope.write(self.kv, rotation, buffer.kv(self.start, self.start + self.kv.length))


@dataclass(slots=True)
class TurnContext:
    """What an arm sees of an agent's turn: the prompt, and the base KV of its parts, computed when first asked for."""

    decoder: Decoder
    prompt: Prompt
    frame: Frame
    request: RequestState
    prefixes: Prefixes
    keep: bool = True
    """Whether the arm may learn from this turn."""
    tally: Tally = field(default_factory=Tally)
    memo: object = None
    """What the arm keeps of this turn until it has heard the answer: other turns may begin in between."""

    def glue(self, segment: Segment) -> Shared:
        """Base KV of a fixed text, from the session."""
        return self.prefixes.glue(self.frame)[segment.number]

    def prefix(self) -> Placement:
        """The fixed text that the prompt begins with; exact."""
        return Placement(self.glue(self.prompt.segments[0]).kv, 0)

    def base(self, name: str) -> Shared:
        """Base KV of a placeholder's content: a message's own, or the text encoded behind BOS and header, once."""
        if name not in self.request.shared:
            # BOS and the header stand in for the prompts that the text will be read in; their own KV is cut off.
            header, ids = self.prefixes.header, self.request.contents[name]
            whole = self._timed(lambda: self.decoder.encode(self.decoder.tensor([*header, *ids])))
            self.tally.count(len(header) + len(ids))
            kv = self.decoder.rope.unrotated(whole.cut(len(header))).copy()
            self.request.shared[name] = Shared(kv, len(header))
        return self.request.shared[name]

    def anchored(self, segment: Segment) -> KV:
        """The segment as a document of AnchorAttention: behind the anchor alone, at its own position; exact there."""
        # Exact only where the same tokens stand at the same position; read by several agents, it is encoded once.
        key = (segment.ids, segment.start)
        if key not in self.request.anchored:
            anchor, ids = self.prefixes.anchor(), self.decoder.tensor(segment.ids)
            document = self._timed(lambda: self.decoder.encode(ids, position=segment.start, behind=anchor))
            self.tally.count(segment.length, anchor.length)
            self.request.anchored[key] = document
        return self.request.anchored[key]

    def observed(self, buffer: Buffer, segment: Segment) -> KV:
        """What this prompt's run computed for a segment, un-rotated."""
        return self.decoder.rope.unrotated(buffer.kv(segment.start, segment.stop))

    def _timed(self, run: Callable[[], KV]) -> KV:
        began = now(self.decoder.device)
        result = run()
        self.tally.seconds += now(self.decoder.device) - began
        return result


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
