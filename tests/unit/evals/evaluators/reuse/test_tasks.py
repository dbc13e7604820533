from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import (
    KINDS,
    CopyTaskConfig,
    QuestionTaskConfig,
    RetrievalTaskConfig,
    ReuseConfig,
)
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team, fingerprint, panel, read_rows
from anchorctx.evals.evaluators.reuse.tasks.copy import CopyTask
from anchorctx.evals.evaluators.reuse.tasks.questions import (
    CodeProblem,
    Gsm8k,
    HumanEval,
    Mmlu,
    letter_of,
    number_of,
    program_of,
)
from anchorctx.evals.evaluators.reuse.tasks.retrieval import CORRECTIONS, FactVocabulary, RetrievalTask
from anchorctx.kvcomm.agents import Answer, Slot, Template

WORDS = FactVocabulary([f"k{i}" for i in range(20)], [f"v{i}" for i in range(20)])
IDS = {f"k{i}": 1000 + i for i in range(20)} | {f"v{i}": 2000 + i for i in range(20)}


def retrieval(agents: int = 3, **settings: Any) -> RetrievalTask:
    config = RetrievalTaskConfig(**({"problems": 6, "document_tokens": 60, "facts": 3} | settings))
    lines = [tuple(range(5 * i, 5 * i + 5)) for i in range(30)]
    return RetrievalTask(config, agents, lines, WORDS, IDS, seed=0)


def facts(document: Any) -> dict[int, int]:
    return {a: b for a, b in zip(document, document[1:], strict=False) if a in range(1000, 1020)}


def perfect(team: Team, problem: Problem) -> tuple[Answer, dict[str, str]]:
    """What readers and decider say who look facts up: the last statement of the last key asked, or nothing."""
    texts: dict[str, Any] = dict(problem.texts)
    word = {i: w for w, i in IDS.items()}
    answer = Answer("", 0.0)
    for name in team.topology.order:
        agent = next(a for a in team.agents if a.name == name)
        names = Template.of(agent.template).placeholders
        read: list[str] = []
        for text in (texts[n] for n in names):
            spaced = text.replace("v", " v").replace("k", " k").split() if isinstance(text, str) else ()
            read += spaced or [word.get(i, "-") for i in text]
        stated = [(a, b) for a, b in zip(read, read[1:], strict=False) if a[0] == "k" and b[0] == "v"]
        known: dict[str, list[str]] = {}
        for a, b in stated:
            known.setdefault(a, []).append(b)
        values = known.get(read[-1], [])
        best = max(values, key=values.count) if values else ""
        answer = Answer(best, 1.0 if best else 0.0)
        plain = {n: texts[n] if isinstance(texts[n], str) else "" for n in names}
        texts[name] = answer.text if agent.speak is None else agent.speak(answer, plain)
    return answer, {n: texts[n] for n in team.topology.order}


@pytest.mark.parametrize("agents", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_that_looks_facts_up_solves_every_kind(agents: int, kind: str) -> None:
    task = retrieval(agents)
    team = next(team for team in task.teams() if team.kind == kind)
    assert len(team.problems) == 6
    for problem in team.problems:
        answer, messages = perfect(team, problem)
        assert task.score(answer, problem), (kind, problem, messages)
        if kind == "override":
            assert messages[f"reader_{agents - 1}"].count(str(problem.expected)) == CORRECTIONS


def test_retrieval_problems_are_what_they_are_called() -> None:
    teams = {team.kind: team for team in retrieval().teams()}
    for kind, team in teams.items():
        for problem in team.problems:
            key = IDS[str(problem.texts["question"])]
            one, two = (facts(problem.texts[f"document_{i}"]) for i in (1, 2))
            assert len(problem.texts["document_1"]) == len(problem.texts["document_2"]) == 60
            value = None if problem.expected is None else IDS[problem.expected]
            found = [d[key] for d in (one, two) if key in d]
            if kind == "single":
                assert found == [value]
            elif kind == "two_hop":
                assert key in one and two[one[key] - 1000] == value
            elif kind == "override":
                assert found[1] == value != found[0]
            else:
                assert not found and value is None


def test_prefixes_stand_before_the_same_problems() -> None:
    """Each agent has its own text before its prompt, the same in every problem; problems stay as they were."""
    plain = {team.kind: team for team in retrieval().teams()}
    (team,) = retrieval(prefix=17, kinds=["two_hop"]).teams()
    assert team.problems == plain["two_hop"].problems
    heads = [agent.template.parts[0] for agent in team.agents]  # type: ignore[union-attr]
    assert all(len(head) == 17 for head in heads) and len(set(heads)) == len(heads) == 3
    for agent, before in zip(team.agents, plain["two_hop"].agents, strict=True):
        assert agent.template.parts[1:] == before.template.parts  # type: ignore[union-attr]
    assert retrieval(prefix=17).teams()[2].agents[0].template.parts[0] == heads[0]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="retrieval.kinds has none: choose single"):
        retrieval(kinds=[])
    with pytest.raises(UserError, match="shorter than a prefix of 151 tokens"):
        retrieval(prefix=151)


def test_problems_have_a_fingerprint() -> None:
    one, other = (retrieval(document_tokens=n).teams()[0].problems for n in (60, 61))
    assert fingerprint(one) == fingerprint(retrieval().teams()[0].problems) != fingerprint(other)


def test_retrieval_scores_exactly() -> None:
    task = retrieval(confidence=0.8)
    known, absent = Problem({}, "v1"), Problem({}, None)
    assert task.score(Answer("v1", 0.8), known) and not task.score(Answer("v1", 0.79), known)
    assert not task.score(Answer("v11", 1.0), known) and not task.score(Answer("v1 v2", 1.0), known)
    assert task.score(Answer("v1", 0.5), absent) and not task.score(Answer("v1", 0.9), absent)


def test_tasks_are_seeded() -> None:
    assert retrieval().teams()[0].problems == retrieval().teams()[0].problems
    config = CopyTaskConfig(problems=2, question=10, prefix=5, output=3)
    one, other = (CopyTask(config, 3, "full", 50, seed) for seed in (0, 1))
    assert one.teams()[0].problems == CopyTask(config, 3, "full", 50, 0).teams()[0].problems
    assert one.teams()[0].problems != other.teams()[0].problems


def test_copy_has_the_lengths_that_were_asked_for() -> None:
    (team,) = CopyTask(CopyTaskConfig(problems=2, question=10, prefix=5, output=3), 3, "full", 50, 0).teams()
    assert team.decision is None and len(team.problems) == 2
    for agent, heard in zip(team.agents, ([], ["agent_1"], ["agent_1", "agent_2"]), strict=True):
        prefix, *slots = agent.template.parts  # type: ignore[union-attr]
        assert len(prefix) == 5 and [slot.name for slot in slots] == ["question", *heard]
    script = team.problems[0].script
    assert script is not None and {len(ids) for ids in script.values()} == {3}
    assert len(team.problems[0].texts["question"]) == 10


def test_copy_is_refused_before_it_is_made_where_it_is_too_long() -> None:
    """BOS, 5, 10, two answers of 3 that are heard and one that is said are 25 tokens."""
    config = CopyTaskConfig(problems=1, question=10, prefix=5, output=3)
    (team,) = CopyTask(config, 3, "full", 50, 0, 25).teams()
    with pytest.raises(UserError, match="copy.output=3 make a prompt and an answer of 25 tokens, .* reaches 24: lower"):
        CopyTask(config, 3, "full", 50, 0, 24)
    for field in ("question", "prefix", "output"):
        with pytest.raises(UserError, match=f"copy.{field}=1{'0' * 14}[, ].*but the model reaches 4096: lower them"):
            CopyTask(dataclasses.replace(config, **{field: 10**14}), 3, "full", 50, 0, 4096)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 18", "18"),
        ("#### $1,234.50 in all, not 7", "1234.5"),
        ("#### -3\n#### 4", "-3"),
        ("first 3, then 18 eggs.", "18"),
        ("#### none, 7 before", None),
        ("no number", None),
        ("180", "180"),
        ("#### 3/4", None),
        ("#### 1e3", None),
        ("#### 42.", "42"),
        ("so 10-3", "3"),
    ],
)
def test_numbers_are_read(text: str, number: str | None) -> None:
    assert number_of(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("D. Paris", "D"),
        ("The answer is (A).", "A"),
        ("A's are rare", None),
        ("Because", None),
        ("Either A or B", None),
        ("A reasonable answer is B", "B"),
        ("A reasonable person waits", None),
        ("C: the third", "C"),
        ("", None),
    ],
)
def test_letters_are_read(text: str, letter: str | None) -> None:
    assert letter_of(text) == letter


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_and_mmlu_read_local_files(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "g.jsonl", [{"question": f"q{i}", "answer": f"1 + {i}\n#### {1 + i},000"} for i in range(3)]
    )
    task = Gsm8k(QuestionTaskConfig(path=path, problems=2), 3, "full")
    (team,) = task.teams()
    assert [p.expected for p in team.problems] == [1000, 2000] and team.agents[-1].name == "decision"
    assert task.score(Answer("#### 1000", 1.0), team.problems[0])
    assert not task.score(Answer("10000", 1.0), team.problems[0])
    path = jsonl(tmp_path / "m.jsonl", [{"question": "q", "choices": list("wxyz"), "answer": a} for a in (2, "b")])
    mmlu = Mmlu(QuestionTaskConfig(path=path, problems=0), 2, "chain")
    (team,) = mmlu.teams()
    assert [p.expected for p in team.problems] == ["C", "B"]
    assert team.problems[0].texts["question"] == "q\nA. w\nB. x\nC. y\nD. z"
    assert mmlu.score(Answer(" C.", 1.0), team.problems[0]) and not mmlu.score(Answer("D", 1.0), team.problems[0])


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.jsonl is not a file"):
        read_rows(str(tmp_path / "none.jsonl"), "", "test", {"a": int}, 0)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{\n')
    with pytest.raises(UserError, match="bad.jsonl:2 is not JSON"):
        read_rows(str(tmp_path / "bad.jsonl"), "", "test", {"a": int}, 0)
    with pytest.raises(UserError, match="bad.jsonl:1 has no field 'b'"):
        read_rows(str(tmp_path / "bad.jsonl"), "", "test", {"b": int}, 0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl has no problems"):
        read_rows(str(tmp_path / "empty.jsonl"), "", "test", {"b": int}, 0)
    path = jsonl(tmp_path / "g.jsonl", [{"question": "q", "answer": "18"}])
    with pytest.raises(UserError, match="must end with '#### number'"):
        Gsm8k(QuestionTaskConfig(path=path), 3, "full").teams()
    with pytest.raises(UserError, match=r"bad.jsonl:1 has 1 as 'a', which is of another type"):
        read_rows(str(tmp_path / "bad.jsonl"), "", "test", {"a": str}, 0)
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl:1 is not JSON in UTF-8"):
        read_rows(str(tmp_path / "latin.jsonl"), "", "test", {"a": str}, 0)
    path = jsonl(tmp_path / "m.jsonl", [{"question": "q", "choices": ["w", "x"], "answer": 3}])
    with pytest.raises(UserError, match="has 2 choices, where there are four"):
        Mmlu(QuestionTaskConfig(path=path), 2, "chain").teams()
    with pytest.raises(UserError, match="copy with agents=0 has nobody"):
        CopyTask(CopyTaskConfig(), 0, "full", 96, 0)
    with pytest.raises(UserError, match="confidence=5 must be between 0 and 1"):
        retrieval(confidence=5)
    with pytest.raises(UserError, match="agents.count=1 must be at least 2"):
        panel(1, "full", "", "", roles=("r",), tokens=1, final_tokens=1)
    with pytest.raises(UserError, match="agents.count=2 has too few readers"):
        retrieval(2)
    with pytest.raises(UserError, match="lower retrieval.facts"):
        retrieval(facts=10)


# -- programs ---------------------------------------------------------------------------------------------------------


def test_humaneval_runs_only_when_allowed(tmp_path: Path) -> None:
    row = {"prompt": "def one():\n    '''1.'''\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    config = ReuseConfig(humaneval=QuestionTaskConfig(path=jsonl(tmp_path / "h.jsonl", [row])))
    with pytest.raises(UserError, match="allow_code_execution=true"):
        HumanEval(config)
    config.allow_code_execution = True
    task = HumanEval(config)
    (problem,) = task.teams()[0].problems
    replies = {"    return 1": True, "def one():\n    return 1": True, "```python\ndef one(): return 1\n```": True}
    replies |= {"    return 2": False, "": False, "It returns 1.": False}
    assert {reply: task.score(Answer(reply, 1.0), problem) for reply in replies} == replies


def test_a_completion_is_joined_to_its_prompt() -> None:
    problem = CodeProblem("import math\ndef f(x):\n    'doc'\n", "def check(g): ...", "f")
    assert program_of("    return x", problem) == "import math\ndef f(x):\n    'doc'\n    return x"
    whole = program_of("```python\ndef f(x):\n    return 2 * x\n```\nDone.", problem)
    assert "check" not in whole  # the tests are another process's
    space: dict[str, Any] = {}
    exec(whole, space)
    assert space["f"](4) == 8 and np.isclose(space["math"].pi, 3.14159, atol=1e-5)


TEXTS = ["Janet's ducks lay 16 eggs.", "A train goes 3 miles", "def f(x):\n    return x"]


@pytest.mark.parametrize("topology", ["full", "chain", "debate"])
@pytest.mark.parametrize("task", [Gsm8k, Mmlu, HumanEval])
def test_prompts_in_pieces_have_the_tokens_of_the_whole(task: Any, topology: str) -> None:
    """A blank belongs to the word behind it in byte-level tokenizers: glue that ends in one tokenizes otherwise."""
    tokenizer = train_tokenizer(vocabulary=512, sample_chars=50_000)
    agents, graph = panel(3, topology, task.ask, task.last, roles=task.roles, tokens=8, final_tokens=8)
    for agent in agents:
        template = Template.of(agent.template)
        glues = [a for a, b in zip(template.parts, template.parts[1:], strict=False) if isinstance(b, Slot)]
        assert glues and not [glue for glue in glues if isinstance(glue, str) and glue.endswith(" ")]
        for text in TEXTS:
            pieces = [text if isinstance(part, Slot) else str(part) for part in template.parts]
            apart = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
            assert apart == tokenizer("".join(pieces), add_special_tokens=False)["input_ids"], (agent.name, text)
