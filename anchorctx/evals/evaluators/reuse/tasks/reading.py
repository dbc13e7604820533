"""`retrieval` in words, for chat models: facts are sentences between the lines of real text, and a question asks one.

Each reader has one document, the decision agent has all of them and hears the readers. The kinds are those of
`retrieval`, whose models are trained on tokens for facts:

- `single`: the answer stands in one document.
- `two_hop`: the first document says that two towns have the same code word, the last one what it is.
- `override`: the last document corrects the first.
- `absent`: no document has the answer; right is `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import KINDS, RetrievalTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team
from anchorctx.evals.evaluators.reuse.tasks.crew import Crew
from anchorctx.evals.evaluators.reuse.tasks.retrieval import check_retrieval, text_of
from anchorctx.kvcomm.agents import Answer, Ids

TOWNS = (
    "Ashford Bexley Camborne Dunster Epsom Falmouth Grantham Hexham Ilkley Jarrow Kendal Ludlow Malvern Newquay Oakham "
    "Penrith Quorn Redruth Selby Tenby Uckfield Ventnor Wells Yarm Alnwick Bodmin Corby Dorking Ely Frome Goole Honiton"
).split()
WORDS = (
    "amber barley candle dolphin ember falcon garnet hazel indigo jasmine kettle lantern magnet nutmeg orchid pepper "
    "quartz raven saddle timber umbrella velvet walnut yellow anchor basil copper daisy eagle feather ginger harbor"
).split()
UNKNOWN = "unknown"
"""What the decision agent says where no document has the answer."""


class Reading:
    """See the module."""

    name = "retrieval"

    def __init__(
        self,
        config: RetrievalTaskConfig,
        crew: Crew,
        lines: Sequence[Ids],
        encode: Callable[[str], Ids],
        seed: int,
    ) -> None:
        """`lines` are a text's lines in tokens, and `encode` makes tokens of a sentence."""
        self._readers = len(crew.members) - 1
        check_retrieval(config, self._readers, lines, len(TOWNS))
        if config.prefix:
            raise UserError(
                f"retrieval.prefix={config.prefix} stands before prompts of plain text, not before a chat template's: "
                "set it to 0"
            )
        self.config, self._crew, self._lines, self._encode, self._seed = config, crew, lines, encode, seed

    def teams(self) -> Sequence[Team]:
        """One a kind, of the same agents."""
        documents = [f"document_{i + 1}" for i in range(self._readers)]
        every = "\n\n".join(f"Document {i}:\n{{{name}}} (end of document {i})" for i, name in enumerate(documents, 1))

        def own(place: int) -> dict[str, str]:
            # A reader has {document}, its own; the decision agent, who is the last, {documents}.
            return {"document": f"{{{documents[place]}}}"} if place < self._readers else {"documents": every}

        agents, graph = self._crew.team(["question"], "full", 32, chat=True, own=own)
        teams = []
        for kind in dict.fromkeys(self.config.kinds):
            rng = np.random.default_rng([self._seed, KINDS.index(kind)])
            problems = tuple(self._problem(kind, rng) for _ in range(self.config.problems))
            teams.append(Team(kind, agents, graph, problems, self._crew.decision))
        return teams

    def score(self, answer: Answer, problem: Problem) -> bool:
        """Whether the answer names the right code word, or `unknown`, and no other."""
        said = set(re.findall(r"[a-z]+", answer.text.lower())) & {*WORDS, UNKNOWN}
        return said == {problem.expected}

    def _problem(self, kind: str, rng: np.random.Generator) -> Problem:
        towns, words = (rng.permutation(names).tolist() for names in (TOWNS, WORDS))
        town, other, word, old = towns[0], towns[1], words[0], words[1]
        first, last = 0, self._readers - 1
        stated: list[list[str]] = [[] for _ in range(self._readers)]
        if kind == "single":
            stated[int(rng.integers(self._readers))].append(_states(town, word))
        elif kind == "two_hop":
            stated[first].append(f"{town} has the same code word as {other}.\n")
            stated[last].append(_states(other, word))
        elif kind == "override":
            stated[first].append(_states(town, old))
            stated[last].append(f"Correction: the code word of {town} is not {old} any more, it is {word}.\n")
        # Other facts are about other towns.
        others = iter(towns[2:])
        for sentences in stated:
            sentences += [_states(next(others), str(rng.choice(words[2:]))) for _ in range(self.config.facts)]
        texts: dict[str, str | Ids] = {"question": f"What is the code word of {town}?"}
        texts |= {f"document_{i + 1}": self._document(sentences, rng) for i, sentences in enumerate(stated)}
        return Problem(texts, UNKNOWN if kind == "absent" else word)

    def _document(self, sentences: Sequence[str], rng: np.random.Generator) -> Ids:
        """Lines of the text from a random place on, with the sentences between them; as long as was asked for."""
        facts = [self._encode(sentence) for sentence in sentences]
        room = self.config.document_tokens - sum(map(len, facts))
        if room < 0:
            raise UserError(
                f"retrieval.document_tokens={self.config.document_tokens} has no room for {len(facts)} facts of "
                f"{sum(map(len, facts))} tokens: raise it, or lower retrieval.facts"
            )
        lines = text_of(self._lines, room, int(rng.integers(len(self._lines))))
        # Before a line, never behind the last one, which is cut.
        slots = np.sort(rng.integers(0, max(len(lines), 1), len(facts))).tolist()
        # From the back, so that the slots in front stay where they are.
        for slot, place in reversed(list(zip(slots, rng.permutation(len(facts)).tolist(), strict=True))):
            lines.insert(slot, facts[place])
        return tuple(token for line in lines for token in line)


def _states(town: str, word: str) -> str:
    return f"The code word of {town} is {word}.\n"
