"""An agent's template in tokens, and the prompts that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from anchorctx.kvcomm.agents import Slot, Template

Ids = tuple[int, ...]
Encode = Callable[[str], Ids]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a prompt's tokens: one glue text, or one placeholder's content."""

    name: str | None
    """The placeholder's name; None for glue."""
    ids: Ids
    start: int
    """Slot and position of its first token."""
    number: int
    """Its place among the prompt's segments."""
    occurrence: int = 0
    """How often its placeholder stood in the prompt before."""

    @property
    def length(self) -> int:
        """Tokens; 0 for an empty answer."""
        return len(self.ids)

    @property
    def stop(self) -> int:
        """Slot behind its last token."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """All of one agent's segments; the first is glue that begins with BOS."""

    agent: str
    segments: tuple[Segment, ...]

    @property
    def ids(self) -> Ids:
        """All tokens."""
        return tuple(i for segment in self.segments for i in segment.ids)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.segments[-1].stop

    @property
    def placeholders(self) -> tuple[Segment, ...]:
        """The segments that come from others."""
        return tuple(segment for segment in self.segments if segment.name is not None)

    def glue_after(self, segment: Segment) -> Segment | None:
        """The fixed text right behind a placeholder; None at the end or before another placeholder."""
        follower = self.segments[segment.number + 1 : segment.number + 2]
        return follower[0] if follower and follower[0].name is None else None


class Frame:
    """A tokenised template."""

    def __init__(self, agent: str, template: Template, encode: Encode, bos: int) -> None:
        self.agent, self._encode = agent, encode
        self._parts: list[tuple[str | None, Ids]] = [(None, (bos,))]
        for part in template.parts:
            name, ids = (part.name, ()) if isinstance(part, Slot) else (None, _tokens(part, encode))
            if name is None and self._parts[-1][0] is None:  # BOS and a first text are one segment
                self._parts[-1] = (None, self._parts[-1][1] + ids)
            else:
                self._parts.append((name, ids))

    def prompt(self, contents: Mapping[str, Ids]) -> Prompt:
        """The prompt with these contents."""
        segments: list[Segment] = []
        seen: dict[str, int] = {}
        start = 0
        for number, (name, ids) in enumerate(self._parts):
            occurrence = 0
            if name is not None:
                ids, occurrence = contents[name], seen.get(name, 0)
                seen[name] = occurrence + 1
            segments.append(Segment(name, ids, start, number, occurrence))
            start += len(ids)
        return Prompt(self.agent, tuple(segments))

    def skeleton(self) -> Prompt:
        """The prompt with each placeholder's own name in its place: what the base KV of the glue is taken from."""
        return self.prompt({name: self._encode(name) for name, _ in self._parts if name is not None})


def _tokens(glue: str | Ids, encode: Encode) -> Ids:
    return encode(glue) if isinstance(glue, str) else glue


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that both have."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
