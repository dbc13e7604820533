"""Documents with planted facts that only some agents hold and pass on, and a question about one of them.

A fact is a key token and a value token; a key asks. Agents read one document each and say what they found, as a fact;
the decision agent has all documents before it, hears the agents and answers. Four kinds of problem:

- `single`: the answer stands in one document.
- `two_hop`: `k1 -> k2` stands in one document and `k2 -> v` in another. The first agent is asked k1 and passes on the
  key of the value that it found; the last agent and the decision agent are asked by its message.
- `override`: the first document states one value, and the last agent, whose own document states another, corrects it.
  A correction is stated `CORRECTIONS` times and the newest is read first: a small model goes by number and place.
- `absent`: no document has the key; right is to say nothing.

An agent that is less sure of its first token than `confidence` says nothing, which is an empty answer to those who
hear it. So the same rule decides in all four kinds, and guessing earns nothing.

With `prefix` each agent has that much text of its own before its prompt, so that a document stands behind another
text, and at another place, wherever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import KINDS, RetrievalTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import DECISION, Problem, Team
from anchorctx.kvcomm.agents import Agent, Answer, Ids, Template
from anchorctx.kvcomm.topology import Topology
from anchorctx.settings import check_ranges

CORRECTIONS = 3
"""With the quickstart's model and 32 problems, dense answers `override` right in 0.59 (1), 0.69 (3), 0.72 (10)."""


@dataclass(frozen=True, slots=True)
class FactVocabulary:
    """The facts' tokens, as text."""

    keys: list[str]
    values: list[str]
    """As many as keys; value i names key i in `two_hop`."""


class RetrievalTask:
    """See the module."""

    name = "retrieval"

    def __init__(
        self,
        config: RetrievalTaskConfig,
        agents: int,
        lines: Sequence[Ids],
        vocabulary: FactVocabulary,
        tokens: Mapping[str, int],
        seed: int,
    ) -> None:
        """`lines` are a text's lines in tokens, `tokens` the ids of the vocabulary's texts."""
        check_retrieval(config, agents - 1, lines, len(vocabulary.keys))
        room = config.document_tokens - 2 * (config.facts + 1)
        if room < 0:
            raise UserError(
                f"retrieval.document_tokens={config.document_tokens} has no room for {config.facts + 1} facts of two "
                "tokens: lower retrieval.facts"
            )
        self.config, self._readers, self._lines = config, agents - 1, lines
        self._vocabulary, self._tokens, self._seed = vocabulary, tokens, seed

    def teams(self) -> Sequence[Team]:
        """One a kind."""
        return [self._team(kind) for kind in dict.fromkeys(self.config.kinds)]

    def score(self, answer: Answer, problem: Problem) -> bool:
        """Whether the answer is exactly the value; or, for `absent`, whether the agent said nothing."""
        said = answer.text if answer.confidence >= self.config.confidence else None
        return said == problem.expected

    def _team(self, kind: str) -> Team:
        names = [f"reader_{i}" for i in range(1, self._readers + 1)]
        # Each reader hears all before it, or in two_hop the first one alone.
        inputs = {name: names[:i] if kind != "two_hop" else names[:1] * bool(i) for i, name in enumerate(names)}
        agents = [self._reader(kind, i, name, inputs[name]) for i, name in enumerate(names)]
        # The newest first: document_2 before document_1, reader_2's note before reader_1's.
        documents = "".join(f"{{document_{i}}}" for i in range(self._readers, 0, -1))
        said = "".join(f"{{{name}}}" for name in reversed(names))
        ask = "" if kind == "two_hop" else "{question}"
        prompt = f"# the readers' notes come last\n{documents}\n{said}{ask}"
        agents.append(Agent(DECISION, self._prefixed(prompt, self._readers), 1))
        rng = np.random.default_rng([self._seed, KINDS.index(kind)])
        problems = tuple(self._problem(kind, rng) for _ in range(self.config.problems))
        return Team(kind, tuple(agents), Topology.of(inputs | {DECISION: names}), problems)

    def _reader(self, kind: str, number: int, name: str, heard: Sequence[str]) -> Agent:
        last, two_hop = number == self._readers - 1, kind == "two_hop"
        said = "".join(f"{{{other}}}" for other in heard)
        ask = said if two_hop and number else f"\n{said}{{question}}"
        times = CORRECTIONS if kind == "override" and last else 1

        def speak(answer: Answer, texts: Mapping[str, str]) -> str:
            if answer.confidence < self.config.confidence or answer.text not in self._vocabulary.values:
                return ""
            if two_hop and number == 0:
                return self._vocabulary.keys[self._vocabulary.values.index(answer.text)]
            # What it passes on is a fact: the key that it was asked, then the value.
            asked = texts[heard[0]] if two_hop else texts["question"]
            return (asked + answer.text) * times if asked else ""

        # Roles of different lengths, so that the same document stands at another place in every prompt.
        role = f"# reader {number + 1} of {self._readers}, who has one document and passes on what it says\n" * (
            1 + number % 3
        )
        # An overriding reader must not be asked after it heard the other value: it reads its own document alone.
        ask = "\n{question}" if kind == "override" and last else ask
        template = self._prefixed(f"{role}{{document_{number + 1}}}{ask}", number)
        return Agent(name, template, 1, speak, message_tokens=2 * times)  # a key and its value

    def _prefixed(self, prompt: str, number: int) -> Template:
        """The prompt of agent `number` behind the text of that agent, which is the same in every kind and problem."""
        parts = Template.parse(prompt).parts
        if not self.config.prefix:
            return Template(parts)
        starts = np.random.default_rng([self._seed, 7]).permutation(len(self._lines))
        text = text_of(self._lines, self.config.prefix, int(starts[number % len(starts)]))
        return Template((tuple(token for line in text for token in line), *parts))

    def _problem(self, kind: str, rng: np.random.Generator) -> Problem:
        config, words = self.config, self._vocabulary
        order, values = rng.permutation(len(words.keys)), rng.permutation(len(words.values))
        key, hop = int(order[0]), int(order[1])
        value, old = words.values[values[0]], words.values[values[1]]
        first, last = 0, self._readers - 1
        stated: list[list[tuple[int, str]]] = [[] for _ in range(self._readers)]
        if kind == "single":
            stated[int(rng.integers(self._readers))].append((key, value))
        elif kind == "two_hop":
            stated[first].append((key, words.values[hop]))
            stated[last].append((hop, value))
        elif kind == "override":
            stated[first].append((key, old))
            stated[last].append((key, value))
        # Other facts have other keys: what the documents say of `key` depends on the kind alone.
        others = iter(order[2:])
        for facts in stated:
            facts += [(int(next(others)), str(rng.choice(words.values))) for _ in range(config.facts)]
        texts: dict[str, str | tuple[int, ...]] = {"question": words.keys[key]}
        texts |= {f"document_{i + 1}": self._document(facts, rng) for i, facts in enumerate(stated)}
        return Problem(texts, None if kind == "absent" else value)

    def _document(self, facts: list[tuple[int, str]], rng: np.random.Generator) -> tuple[int, ...]:
        """Lines from a random place of the text, cut at the length, with the facts between them."""
        start = int(rng.integers(len(self._lines)))
        lines = text_of(self._lines, self.config.document_tokens - 2 * len(facts), start)
        slots = np.sort(rng.integers(0, len(lines) + 1, len(facts)))
        order = rng.permutation(len(facts))
        # From the back, so that the slots in front stay where they are.
        for slot, i in reversed(list(zip(slots.tolist(), order.tolist(), strict=True))):
            key, value = facts[i]
            lines.insert(slot, (self._tokens[self._vocabulary.keys[key]], self._tokens[value]))
        return tuple(token for line in lines for token in line)


def check_retrieval(config: RetrievalTaskConfig, readers: int, lines: Sequence[Ids], keys: int) -> None:
    """UserError where `readers` documents cannot be made from a text's lines, with facts about so many keys."""
    if readers < 2:
        raise UserError(
            f"retrieval with agents.count={readers + 1} has too few readers: give at least 3, the last decides"
        )
    unknown = [kind for kind in config.kinds if kind not in KINDS]
    if unknown or not config.kinds:
        given = f"{unknown[0]!r}, which is unknown" if unknown else "none"
        raise UserError(f"retrieval.kinds has {given}: choose {', '.join(KINDS)}")
    check_ranges(config, "retrieval")
    used = config.facts * readers + 2
    if used > keys:
        raise UserError(
            f"{config.facts} facts in each of {readers} documents need {used} keys, but there are {keys}: lower "
            "retrieval.facts"
        )
    for what, length in (("document", config.document_tokens), ("prefix", config.prefix)):
        if sum(map(len, lines)) < length:
            raise UserError(f"the text is shorter than a {what} of {length} tokens: give more text")


def text_of(lines: Sequence[Ids], length: int, at: int) -> list[Ids]:
    """A text's lines from line `at` on, `length` tokens of them; the last is cut."""
    # Round the text's end to its beginning, if need be.
    taken, found = [], 0
    while found < length:
        line = lines[at % len(lines)][: length - found]
        taken.append(line)
        found, at = found + len(line), at + 1
    return taken
