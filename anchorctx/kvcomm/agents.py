"""Agents, their prompts' templates, and the prompts in tokens.

A template is fixed text (glue) with placeholders for what others share. A prompt is tokenised piece by piece, so that a
placeholder's tokens are the same in every prompt: BOS, then each glue and each placeholder's text on its own.
Placeholders may touch each other, stand at either end, or be empty. Messages become a template in `chat`, which begins
as the model's chat template does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from anchorctx.errors import UserError

Ids = tuple[int, ...]
Encode = Callable[[str], Ids]


@dataclass(frozen=True, slots=True)
class Slot:
    """A placeholder in a template."""

    name: str
    """Whose text stands here: a text of the request, or an agent's message."""


@dataclass(frozen=True, slots=True)
class Template:
    """Glue and placeholders (Slot) in order. Glue is text, or a tuple of token ids where its length must be exact."""

    parts: tuple[str | Ids | Slot, ...]
    bos: bool = True
    """Put BOS in front; False where the first part is glue that begins as the model's chat template does."""

    @classmethod
    def parse(cls, text: str) -> Template:
        """`Solve {question} with {planner}'s plan`; `{{` and `}}` are single braces."""
        try:
            fields = list(Formatter().parse(text))
        except ValueError as error:
            raise UserError(
                f"the template {text[:60]!r} has a brace without its other half ({error}): close the placeholder, or "
                "write {{ and }} for single braces"
            ) from error
        parts: list[str | Ids | Slot] = []
        glue = ""
        # "Solve {q} now" gives ("Solve ", "q", "", None) and (" now", None, None, None). A literal ends at "{{" too, so
        # glue is gathered until a placeholder follows.
        for literal, name, spec, conversion in fields:
            glue += literal
            if name is None:
                continue
            if not name.strip() or spec or conversion:
                raise UserError(
                    f"the template {text[:60]!r} has a placeholder without a name, or with a format: name it as in "
                    "{question}, or write {{ and }} for single braces"
                )
            parts += [*([glue] if glue else []), Slot(name.strip())]
            glue = ""
        return cls((*parts, *([glue] if glue else [])))

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Names in order, as often as they occur."""
        return tuple(part.name for part in self.parts if isinstance(part, Slot))

    @classmethod
    def of(cls, template: str | Template) -> Template:
        """A template, parsed from text if need be."""
        return cls.parse(template) if isinstance(template, str) else template

    def reordered(self, names: Mapping[str, str]) -> Template:
        """The same with placeholders exchanged: `names` maps each name to the one that takes its place."""
        parts = tuple(Slot(names.get(p.name, p.name)) if isinstance(p, Slot) else p for p in self.parts)
        return Template(parts, self.bos)


@dataclass(frozen=True, slots=True)
class Messages:
    """A prompt as a conversation, for chat models: what the agent is, and what it is asked, with {placeholders}.

    Begin and end each with words, not with a placeholder or a blank: many chat templates trim messages.
    """

    user: str
    """What is asked."""
    system: str = ""
    """What the agent is; without one the chat template may put its own."""

    @property
    def by_role(self) -> dict[str, str]:
        """In the order of the conversation; no system message where there is none."""
        return ({"system": self.system} if self.system else {}) | {"user": self.user}

    def plain(self) -> str:
        """The same without a chat template: the texts below each other, and `Answer:`."""
        return "\n\n".join([*self.by_role.values(), "Answer:"])


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent said, and how sure it was of it."""

    text: str
    """Empty when it said nothing."""
    confidence: float
    """Probability of its first token, 0..1."""


Speak = Callable[[Answer, Mapping[str, str]], str]
"""What an agent passes on: from its answer and the texts that its prompt held, by placeholder."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent."""

    name: str
    """What other templates call it."""
    template: str | Template | Messages
    """Its prompt: its role and instructions, with {placeholders} for the request's texts and other agents' names."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    speak: Speak | None = None
    """Turns its answer into the message that others read; None passes the answer on as it is."""
    stop: Callable[[str], bool] | None = None
    """Ends the answer once it holds for the text so far; None ends at the end of the turn or the length alone."""
    checkpoint: str | None = None
    """The checkpoint that it runs, where agents come from elsewhere: all must be the same. None takes the session's."""
    message_tokens: int | None = None
    """Longest message that `speak` makes, in tokens; None is max_new_tokens."""

    @property
    def longest_message(self) -> int:
        """In tokens."""
        return self.max_new_tokens if self.message_tokens is None else self.message_tokens


def check_agents(agents: Sequence[Agent]) -> None:
    """UserError for no agents, doubled names, lengths that are none, or agents of different checkpoints."""
    if not agents:
        raise UserError("a session without agents has nobody to speak: give at least one")
    names = [agent.name for agent in agents]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"two agents are called {doubled[0]!r}: names must differ, rename one")
    checkpoints = {agent.checkpoint: agent.name for agent in reversed(agents) if agent.checkpoint is not None}
    if len(checkpoints) > 1:
        (one, a), (other, b) = sorted(checkpoints.items(), key=lambda item: names.index(item[1]))[:2]
        raise UserError(
            f"agent {a!r} runs {one} but agent {b!r} runs {other}: KV caches are shared only within one checkpoint, "
            "give all agents the same"
        )
    for agent in agents:
        lengths = ("max_new_tokens", agent.max_new_tokens, 1), ("message_tokens", agent.longest_message, 0)
        for field, length, least in lengths:
            if not isinstance(length, int) or length < least:
                raise UserError(f"agent {agent.name!r} has {field}={length}: give it a whole number, {least} at least")


def check_placeholders(agent: Agent, template: Template, texts: Collection[str], inputs: Sequence[str]) -> None:
    """UserError when a placeholder is neither a text of the request nor an agent that this one hears."""
    for name in template.placeholders:
        if name not in texts and name not in inputs:
            known = ", ".join([*sorted(texts), *inputs]) or "nothing"
            raise UserError(
                f"agent {agent.name!r} has the placeholder {{{name}}}, but the request and the topology give it "
                f"{known}: correct the name, or connect the agents"
            )


# -- prompts in tokens ------------------------------------------------------------------------------------------------


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
    """All of one agent's segments; the first is glue that begins with BOS, or as the chat template does."""

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
    """A template in tokens, which makes prompts from contents."""

    def __init__(self, agent: str, template: Template, encode: Encode, bos: int) -> None:
        self.agent, self._encode = agent, encode
        self._parts: list[tuple[str | None, Ids]] = [(None, (bos,) if template.bos else ())]
        for part in template.parts:
            name, ids = (part.name, ()) if isinstance(part, Slot) else (None, _tokens(part, encode))
            if name is None and self._parts[-1][0] is None:  # BOS and a first text are one segment
                self._parts[-1] = (None, self._parts[-1][1] + ids)
            else:
                self._parts.append((name, ids))

    @property
    def first(self) -> int:
        """The token that its prompts begin with."""
        return self._parts[0][1][0]

    def prompt(self, contents: Mapping[str, Ids]) -> Prompt:
        """The prompt with these contents."""
        segments: list[Segment] = []
        seen: dict[str, int] = {}
        # Parts [BOS a], {x}, [b], {x} with x of 3 tokens: segments start at 0, 2, 5, 6; the second x has occurrence 1.
        start = 0
        for number, (name, ids) in enumerate(self._parts):
            occurrence = 0
            if name is not None:
                ids, occurrence = contents[name], seen.get(name, 0)
                seen[name] = occurrence + 1
            segments.append(Segment(name, ids, start, number, occurrence))
            start += len(ids)
        return Prompt(self.agent, tuple(segments))

    def length(self, contents: Mapping[str, int]) -> int:
        """Tokens of the prompt with contents of these lengths, which need not exist."""
        return sum(len(ids) if name is None else contents[name] for name, ids in self._parts)

    def skeleton(self) -> Prompt:
        """The prompt with each placeholder's name as its content: the base KV of the glue is taken from it."""
        return self.prompt({name: self._encode(name) for name, _ in self._parts if name is not None})


def _tokens(glue: str | Ids, encode: Encode) -> Ids:
    return encode(glue) if isinstance(glue, str) else glue


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens in which both agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
