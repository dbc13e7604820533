"""Arms: ways to fill a prompt's KV cache from what other prompts left. Each decides which slots get reused entries.

All arms go through the same engine (`engine.prefill`): slots without an entry are computed, the last token always is.
`dense` reuses nothing and is what the others are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Buffer
from anchorctx.kvcomm.prompts import Ids, Segment, common_prefix
from anchorctx.kvcomm.request import Placement, Scene


class Arm:
    """One way to reuse; an object keeps what it learns over the requests of one session."""

    name = "dense"
    shares = False
    """Does it use the base KV of messages? If not, none is kept."""
    by_construction = False
    """Reuses everything whatever the content, so its reuse rate says nothing."""

    def place(self, scene: Scene) -> Sequence[Placement]:
        """Entries for some of the prompt's slots."""
        return ()

    def observe(self, scene: Scene, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Learn from the finished prefill; `given` is what `place` returned."""

    @property
    def nbytes(self) -> int:
        """Bytes kept from one request to the next, the session's glue not counted."""
        return 0


class Dense(Arm):
    """Computes everything."""


class DensePrefixCache(Arm):
    """Dense, but an identical beginning is copied from the agents' latest prompts: exact, as vLLM and SGLang do."""

    name = "dense_prefix_cache"

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Ids, KV]] = {}

    def place(self, scene: Scene) -> Sequence[Placement]:
        """The longest prefix that any agent's latest prompt had; before that, its fixed text."""
        ids = scene.prompt.ids
        found = [(common_prefix(ids, kept), kv) for kept, kv in self._kept.values()]
        length, kv = max(found, key=lambda pair: pair[0], default=(0, None))
        prefix = scene.prefix()
        if kv is None or length <= prefix.kv.length:
            return [prefix]
        return [Placement(kv.cut(0, length), 0)]

    def observe(self, scene: Scene, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Keep this prompt's KV as it is, without a copy."""
        self._kept[scene.prompt.agent] = (scene.prompt.ids, buffer.kv(0, scene.prompt.length))

    @property
    def nbytes(self) -> int:
        """Of the kept prompts."""
        return sum(kv.nbytes for _, kv in self._kept.values())


class Rotate(Arm):
    """Every segment's base KV, moved to its place: keys rotated by the distance, values unchanged."""

    name = "rotate"
    shares = True
    by_construction = True

    def place(self, scene: Scene) -> Sequence[Placement]:
        """One entry a segment."""
        first, *rest = scene.prompt.segments
        placed = [scene.prefix() if first.length else None]
        placed += [self.glue(scene, s) if s.name is None else self.text(scene, s, s.name) for s in rest]
        return [placement for placement in placed if placement is not None and placement.kv.length]

    def glue(self, scene: Scene, segment: Segment) -> Placement | None:
        """A fixed text behind a placeholder."""
        return Placement(scene.glue(segment).kv, segment.start)

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """A placeholder's content."""
        return Placement(scene.base(name).kv, segment.start)


class Naive(Rotate):
    """Concatenates the caches as they are: keys keep the rotation of the place where they were computed."""

    name = "naive"

    def glue(self, scene: Scene, segment: Segment) -> Placement | None:
        """See Rotate."""
        shared = scene.glue(segment)
        return Placement(shared.kv, segment.start, shared.home)

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """See Rotate."""
        shared = scene.base(name)
        return Placement(shared.kv, segment.start, shared.home)


class RotateGlue(Rotate):
    """Rotates, and recomputes the glue and the first tokens of each content together with the last token.

    The first k tokens of a text take most of the attention that its own first place gave them (EPIC's LegoLink); up to
    some 300 recomputed tokens cost a GPU about what one does. Nothing is stored between requests.
    """

    name = "rotate_glue"

    def __init__(self, first: int = 8) -> None:
        self.first = first
        """Tokens recomputed at the start of each content."""

    def glue(self, scene: Scene, segment: Segment) -> Placement | None:
        """Recomputed."""
        return None

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """All but the first tokens."""
        return Placement(scene.base(name).kv.cut(self.first), segment.start + min(self.first, segment.length))


class Anchored(Arm):
    """AnchorAttention's own reading: each segment is a document behind the anchor, at its own position.

    Under the anchor mask a document's KV depends on the anchor, itself and its position, so an entry is exact wherever
    the same text stands at the same position, and is encoded anew elsewhere. The final block, from behind the last
    placeholder on, attends to everything; where the prompt ends with a placeholder that is its last token alone.
    """

    name = "anchored"
    by_construction = True

    def place(self, scene: Scene) -> Sequence[Placement]:
        """Every segment up to the last placeholder's end."""
        last = max((segment.number for segment in scene.prompt.placeholders), default=0)
        documents = [s for s in scene.prompt.segments[1 : last + 1] if s.length]
        return [scene.prefix(), *(Placement(scene.anchored(s), s.start) for s in documents)]
