"""Arms: ways to fill a prompt's KV cache from what other prompts left. Each decides which slots get reused entries.

All arms go through `turn.prefill`: slots without an entry are computed, and the last token always is. `dense` reuses
nothing and is what the others are measured against. Arms that learn from one request to the next are in `offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from anchorctx.kvcomm.agents import Ids, Segment, common_prefix
from anchorctx.kvcomm.arms.names import SETTINGS, Setting
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Buffer
from anchorctx.kvcomm.request import Placement, TurnContext


class Arm:
    """One way to reuse; an object keeps what it learns over the requests of one session."""

    name = "dense"
    shares = False
    """Whether it uses the base KV of messages; none is kept otherwise."""
    by_construction = False
    """Reuses everything whatever the content, so its reuse rate says nothing."""

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """Entries for some of the prompt's slots."""
        return ()

    def choose(self, context: TurnContext, buffer: Buffer) -> torch.Tensor:
        """(n,) slots to compute although an entry was placed there; the buffer holds all entries."""
        return torch.empty(0, dtype=torch.long)

    def observe(self, context: TurnContext, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Learn from the finished prefill; `given` is what `place` returned."""

    def hear(self, context: TurnContext, buffer: Buffer, ids: Ids, logits: torch.Tensor) -> None:
        """Learn from the finished answer: its tokens, and the logits (n, V), or (1, V) of the first one alone."""

    @property
    def nbytes(self) -> int:
        """Bytes kept from one request to the next, the session's glue not counted."""
        return 0


class Dense(Arm):
    """Computes everything."""


class FixedPrefix(Arm):
    """Dense, but the fixed text that prompts begin with is encoded once a session: exact."""

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """That text."""
        return [context.prefix()]


class DensePrefixCache(Arm):
    """Dense, but an identical beginning is copied from the agents' latest prompts: exact, as vLLM and SGLang do."""

    name = "dense_prefix_cache"

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Ids, KV]] = {}

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """The longest prefix that any agent's latest prompt had; before that, its fixed text."""
        ids = context.prompt.ids
        # Any agent's: prompts of different agents may begin alike, with the same documents.
        found = [(common_prefix(ids, kept), kv) for kept, kv in self._kept.values()]
        length, kv = max(found, key=lambda pair: pair[0], default=(0, None))
        prefix = context.prefix()
        if kv is None or length <= prefix.kv.length:
            return [prefix]
        return [Placement(kv.cut(0, length), 0)]

    def observe(self, context: TurnContext, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Keep this prompt's KV as it is, without a copy."""
        self._kept[context.prompt.agent] = (context.prompt.ids, buffer.kv(0, context.prompt.length))

    @property
    def nbytes(self) -> int:
        """Of the kept prompts."""
        return sum(kv.nbytes for _, kv in self._kept.values())


class Rotate(Arm):
    """Every segment's base KV, moved to its place: keys rotated by the distance, values unchanged."""

    name = "rotate"
    shares = True
    by_construction = True

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """One entry a segment."""
        # The first segment (BOS and the text behind it) stands at position 0 in every prompt and never moves.
        first, *rest = context.prompt.segments
        placed = [context.prefix() if first.length else None]
        placed += [self.glue(context, s) if s.name is None else self.text(context, s, s.name) for s in rest]
        return [placement for placement in placed if placement is not None and placement.kv.length]

    def glue(self, context: TurnContext, segment: Segment) -> Placement | None:
        """A fixed text behind a placeholder."""
        return Placement(context.glue(segment).kv, segment.start)

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """A placeholder's content."""
        return Placement(context.base(name).kv, segment.start)


class Naive(Rotate):
    """Concatenates the caches as they are: keys keep the rotation of the place where they were computed."""

    name = "naive"

    def glue(self, context: TurnContext, segment: Segment) -> Placement | None:
        """See Rotate."""
        shared = context.glue(segment)
        return Placement(shared.kv, segment.start, shared.home)

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """See Rotate."""
        shared = context.base(name)
        return Placement(shared.kv, segment.start, shared.home)


class RotateFirst(Rotate):
    """Rotates, and recomputes the first k tokens of each segment together with the last token (EPIC, arXiv 2410.15332).

    The first tokens of a text take most of the attention that its own first place gave them; up to some 300 recomputed
    tokens cost a GPU about what one does. Nothing is stored between requests. Segments are contents and the glue
    between them: a k of 0 is `rotate`, and one as long as the longest segment is dense.
    """

    name = "rotate_first_k"

    def __init__(self, k: int = 8) -> None:
        self.k = SETTINGS["rotate_first_k"].of(self.name, k)
        """Tokens recomputed at the start of each segment."""

    def glue(self, context: TurnContext, segment: Segment) -> Placement | None:
        """All but the first tokens."""
        return self._behind(context.glue(segment).kv, segment)

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """All but the first tokens."""
        return self._behind(context.base(name).kv, segment)

    def _behind(self, kv: KV, segment: Segment) -> Placement:
        return Placement(kv.cut(self.k), segment.start + min(self.k, segment.length))


class RotateGlue(RotateFirst):
    """The same with all of the glue recomputed, whose base KV is the farthest from any prompt: it was computed behind
    the placeholders' names. Where no glue behind a placeholder is longer than k, this is `rotate_first_k`.
    """

    name = "rotate_glue"

    def glue(self, context: TurnContext, segment: Segment) -> Placement | None:
        """Recomputed."""
        return None


class Anchored(Arm):
    """AnchorAttention's own reading: each segment is a document behind the anchor, at its own position.

    Under the anchor mask a document's KV depends on the anchor, itself and its position, so an entry is exact wherever
    the same text stands at the same position, and is encoded anew elsewhere. The final block, from behind the last
    placeholder on, attends to everything; where the prompt ends with a placeholder that is its last token alone.
    """

    name = "anchored"
    by_construction = True

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """Every segment up to the last placeholder's end."""
        # The first segment begins with the anchor, and prefix() has it. Glue behind the last placeholder is computed.
        last = max((segment.number for segment in context.prompt.placeholders), default=0)
        documents = [s for s in context.prompt.segments[1 : last + 1] if s.length]
        return [context.prefix(), *(Placement(context.anchored(s), s.start) for s in documents)]


# -- controls ---------------------------------------------------------------------------------------------------------
# What `rotate` does, with a placeholder's KV replaced: an arm that does no better has reused nothing.


class Zeroed(Rotate):
    """All zeros: the content takes its share of the attention and says nothing."""

    name = "zeroed"

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """See Rotate."""
        kv = context.base(name).kv
        return Placement(KV(torch.zeros_like(kv.keys), torch.zeros_like(kv.values)), segment.start)


class RandomMoments(Rotate):
    """Normal noise with each channel's mean and spread over the content's tokens."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = Setting("seed", whole=True).of(self.name, seed)

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """The same noise for every reader of one request's content."""
        kv = context.base(name).kv
        # Seeded by the request and the placeholder, not by the reader.
        entropy = [self.seed, context.request.number, *name.encode()]
        generator = torch.Generator().manual_seed(int(np.random.default_rng(entropy).integers(2**62)))
        return Placement(KV(_matched(kv.keys, generator), _matched(kv.values, generator)), segment.start)


class OtherRequest(Rotate):
    """The KV of another request's content in the same placeholder, cut or repeated to this one's length."""

    name = "other_request"
    by_construction = False

    def __init__(self) -> None:
        self._latest: dict[str, list[tuple[int, KV]]] = {}

    def text(self, context: TurnContext, segment: Segment, name: str) -> Placement | None:
        """Nothing, so that it is computed, while no other request had content there."""
        context.base(name)
        other = next((kv for number, kv in self._latest.get(name, ()) if number != context.request.number), None)
        if other is None or not other.length:
            return None
        # 5 tokens from a content of 3: index = [0, 1, 2, 0, 1].
        index = torch.arange(segment.length, device=other.keys.device) % other.length
        return Placement(KV(other.keys[:, :, :, index], other.values[:, :, :, index]), segment.start)

    def observe(self, context: TurnContext, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Keep this request's contents and those of the one before."""
        for name in {segment.name for segment in context.prompt.placeholders if segment.name is not None}:
            number, kv = context.request.number, context.base(name).kv
            # This request's content and one other: the latest may be read again before the next request.
            older = [entry for entry in self._latest.get(name, []) if entry[0] != number]
            self._latest[name] = [(number, kv), *older[:1]]

    @property
    def nbytes(self) -> int:
        """Of the kept contents."""
        return sum(kv.nbytes for entries in self._latest.values() for _, kv in entries)


class DenseChunked(Arm):
    """Dense in two chunks: the same numbers but for rounding. No arm can come nearer to dense than that."""

    name = "dense_chunked"

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """The first half, computed on its own; it saves nothing, so it counts as computed beside the prompt."""
        # The same tokens see the same tokens; only the order in which sums are taken differs.
        half = context.prompt.length // 2
        context.tally.count(half)
        return [Placement(context.decoder.encode(context.decoder.tensor(context.prompt.ids[:half])), 0)] if half else []


def _matched(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of the shape of `x` (L, B, H, T, D) with its mean and standard deviation over T."""
    if not x.shape[3]:
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return x.mean(3, keepdim=True) + x.std(3, keepdim=True, correction=0) * noise
