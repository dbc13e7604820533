"""Agents and their prompts: fixed text (glue) with placeholders for what others share.

A prompt is tokenised piece by piece, so that a placeholder's tokens are the same in every prompt: BOS, then each glue
and each placeholder's text on its own. Placeholders may touch each other, stand at either end, or be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from anchorctx.errors import UserError


@dataclass(frozen=True, slots=True)
class Slot:
    """A placeholder in a template."""

    name: str
    """Whose text stands here: a text of the request, or an agent's message."""


@dataclass(frozen=True, slots=True)
class Template:
    """Glue and placeholders (Slot) in order. Glue is text, or a tuple of token ids where its length must be exact."""

    parts: tuple[str | tuple[int, ...] | Slot, ...]

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
        parts: list[str | tuple[int, ...] | Slot] = []
        glue = ""
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
        """Names in order, repeated where they are."""
        return tuple(part.name for part in self.parts if isinstance(part, Slot))

    @classmethod
    def of(cls, template: str | Template) -> Template:
        """Parsed where it is not yet."""
        return cls.parse(template) if isinstance(template, str) else template

    def reordered(self, names: Mapping[str, str]) -> Template:
        """The same with placeholders exchanged: `names` says what stands where each name stood."""
        return Template(tuple(Slot(names.get(p.name, p.name)) if isinstance(p, Slot) else p for p in self.parts))


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent said, and how sure it was."""

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
    template: str | Template
    """Its prompt: its role and instructions, with {placeholders} for the request's texts and other agents' names."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    speak: Speak | None = None
    """Turns its answer into the message that others read; None passes the answer on as it is."""
    stop: Callable[[str], bool] | None = None
    """Ends the answer once it holds for the text so far; None ends at the end-of-sequence token or the length alone."""
    checkpoint: str | None = None
    """The checkpoint that it runs, where agents come from elsewhere: all must be the same. None takes the session's."""
    message_tokens: int | None = None
    """Longest message that `speak` makes, in tokens; None is max_new_tokens."""

    @property
    def longest_message(self) -> int:
        """In tokens."""
        return self.max_new_tokens if self.message_tokens is None else self.message_tokens


def check_agents(agents: Sequence[Agent]) -> None:
    """UserError for doubled names, answers without tokens, or agents of different checkpoints."""
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
    short = next((agent for agent in agents if agent.max_new_tokens < 1), None)
    if short is not None:
        raise UserError(f"agent {short.name!r} has max_new_tokens={short.max_new_tokens}: give it at least 1")


def check_placeholders(agent: Agent, template: Template, texts: Collection[str], inputs: Sequence[str]) -> None:
    """UserError when a placeholder is neither a text of the request nor an agent that this one hears."""
    for name in template.placeholders:
        if name not in texts and name not in inputs:
            known = ", ".join([*sorted(texts), *inputs]) or "nothing"
            raise UserError(
                f"agent {agent.name!r} has the placeholder {{{name}}}, but the request and the topology give it "
                f"{known}: correct the name, or connect the agents"
            )
