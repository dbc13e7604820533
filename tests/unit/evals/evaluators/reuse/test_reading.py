from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import KINDS, RetrievalTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Problem
from anchorctx.evals.evaluators.reuse.tasks.crew import Crew
from anchorctx.evals.evaluators.reuse.tasks.reading import TOWNS, UNKNOWN, WORDS, Reading
from anchorctx.kvcomm.agents import Answer, Ids, Messages, Template

TOKENIZER = train_tokenizer(vocabulary=512, sample_chars=20_000)
LINES = [f"def f{i}(x):\n" if i % 2 else f"    return x + {i}\n" for i in range(200)]


def encode(text: str) -> Ids:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def reading(agents: int = 3, seed: int = 0, **settings: Any) -> Reading:
    config = RetrievalTaskConfig(**({"problems": 6, "document_tokens": 300, "facts": 3} | settings))
    crew = Crew.of(None, "retrieval").of_size(agents)
    return Reading(config, crew, [encode(line) for line in LINES], encode, seed)


def look_up(texts: Mapping[str, Any], readers: int) -> str:
    """What a careful judge says who reads all documents, the later ones last."""
    documents = [TOKENIZER.decode(texts[f"document_{i + 1}"]) for i in range(readers)]
    town = texts["question"].removeprefix("What is the code word of ").removesuffix("?")
    known: dict[str, str] = {}
    same: dict[str, str] = {}
    for line in "\n".join(documents).splitlines():
        words = line.rstrip(".").split()
        if line.startswith("The code word of"):
            known[words[4]] = words[-1]
        elif line.startswith("Correction"):
            known[words[5]] = words[-1]
        elif "has the same code word as" in line:
            same[words[0]] = words[-1]
    return known.get(same.get(town, town), UNKNOWN)


@pytest.mark.parametrize("agents", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_careful_judge_solves_every_kind(agents: int, kind: str) -> None:
    """The documents have the length that was asked for, and sentences stand on lines of their own."""
    task = reading(agents, kinds=[kind])
    (team,) = task.teams()
    assert team.decision == "judge" and len(team.problems) == 6
    for problem in team.problems:
        assert {len(problem.texts[f"document_{i}"]) for i in range(1, agents)} == {300}
        said = look_up(problem.texts, agents - 1)
        assert said == problem.expected and task.score(Answer(f"{said}.", 1.0), problem), (kind, problem)
        alone = {look_up(problem.texts | {f"document_{i}": () for i in range(1, agents) if i != only}, agents - 1)
                 for only in range(1, agents)}  # fmt: skip
        # Two hops need two documents, and a correction the statement that it corrects is not to be taken for it.
        assert (said in alone) == (kind != "two_hop")
        if kind == "override":
            assert len(alone - {UNKNOWN}) == 2


def test_readers_have_one_document_and_the_judge_has_all() -> None:
    (team,) = reading(4, kinds=["single"]).teams()
    held: dict[str, list[str]] = {}
    for agent in team.agents:
        assert isinstance(agent.template, Messages)
        held[agent.name] = [*Template.parse(agent.template.user).placeholders]
    one, two, three = ("document_1", "document_2", "document_3")
    names = ["reader", "reader_2", "reader_3"]
    assert held == {
        "reader": [one, "question"],
        "reader_2": [two, "reader", "question"],
        "reader_3": [three, "reader", "reader_2", "question"],
        "judge": [one, two, three, *names, "question"],
    }


@pytest.mark.parametrize(
    ("said", "expected", "good"),
    [("amber", "amber", True), ("Amber.", "amber", True), ("The code word of Ely is amber.", "amber", True),
     ("amber, not copper", "amber", False), ("ambers", "amber", False), ("", "amber", False),
     ("unknown", "amber", False), ("Unknown", UNKNOWN, True), ("", UNKNOWN, False),
     ("unknown, perhaps amber", UNKNOWN, False)],
)  # fmt: skip
def test_one_word_counts(said: str, expected: str, good: bool) -> None:
    assert reading().score(Answer(said, 0.1), Problem({}, expected)) is good


def test_problems_follow_from_the_seed_and_what_cannot_be_made_is_refused() -> None:
    assert reading().teams()[0].problems == reading().teams()[0].problems != reading(seed=1).teams()[0].problems
    assert len(set(TOWNS)) == len(TOWNS) and len(set(WORDS)) == len(WORDS) and UNKNOWN not in WORDS
    for settings, sentence in (
        ({"prefix": 5}, "retrieval.prefix=5 stands before prompts of plain text"),
        ({"facts": 20}, "need 42 keys, but there are 32"),
        ({"kinds": ["three"]}, "'three', which is unknown"),
    ):
        with pytest.raises(UserError, match=sentence):
            reading(**settings)
    with pytest.raises(UserError, match="document_tokens=20 has no room for 4 facts"):
        reading(document_tokens=20, kinds=["single"]).teams()
    with pytest.raises(UserError, match="agents.count=2 has too few readers"):
        reading(2)
