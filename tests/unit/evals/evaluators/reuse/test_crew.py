from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import QuestionTaskConfig, ReuseConfig
from anchorctx.evals.evaluators.reuse.tasks.crew import Crew, agents_file
from anchorctx.evals.evaluators.reuse.tasks.questions import Gsm8k, HumanEval, Mmlu, letter_of, number_of
from anchorctx.kvcomm.agents import Messages, Template
from anchorctx.kvcomm.topology import TOPOLOGIES

MINE = """
gsm8k:
  decision: boss
  topology: {boss: [ann, bob], bob: [ann], ann: []}
  agents:
    - {name: boss, user: "Q: {question} A: {ann} B: {bob} so?", system: "{{x}}", max_new_tokens: 5}
    - {name: ann, user: "Solve {question} now."}
    - {name: bob, user: "Solve {question} too. {heard}Go on."}
"""


def crew(tmp_path: Path, text: str, task: str = "gsm8k") -> Crew:
    path = tmp_path / "agents.yaml"
    path.write_text(text)
    return Crew.of(str(path), task)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("task", ["gsm8k", "mmlu", "humaneval"])
def test_the_packages_agents_fit_every_topology(task: str, topology: str) -> None:
    found = Crew.of(None, task).of_size(5)
    agents, graph = found.team(["question"], topology, 99, True)
    assert [agent.name for agent in agents] == list(graph.order) and agents[-1].name == "judge"
    for agent in agents:
        assert isinstance(agent.template, Messages)
        names = [*Template.parse(agent.template.user).placeholders, *Template.parse(agent.template.system).placeholders]
        assert names == ["question", *graph.inputs[agent.name]]
        assert len(agent.template.system.split()) > 150
        for text in agent.template.by_role.values():
            assert text[0].isalpha() and text[-1] not in "} \n"
    assert {agent.max_new_tokens for agent in agents[:-1]} == {99}


def test_roles_are_taken_in_turn() -> None:
    names = [member.name for member in Crew.of(None, "humaneval").of_size(6).members]
    assert names == ["programmer", "reviewer", "programmer_2", "reviewer_2", "programmer_3", "judge"]
    with pytest.raises(UserError, match="agents.count=1 must be at least 2"):
        Crew.of(None, "gsm8k").of_size(1)


def test_worked_examples_are_right_and_end_as_they_are_scored() -> None:
    """Every line of arithmetic that the gsm8k agents read is true: mistakes are of understanding."""
    sums = 0
    for member in Crew.of(None, "gsm8k").members:
        text = " ".join(member.system.split())
        for left, right in re.findall(r"(?<![\d.])(\d+(?: [-+*/] \d+)+) = (\d+(?:\.\d+)?)", text):
            assert eval(left) == float(right), (member.name, left, right)
            sums += 1
        marks = [line for line in member.system.splitlines() if line.startswith("#### ")]
        assert len([line for line in marks if number_of(line) is not None]) == 3
    assert sums > 30
    replies = [line.removeprefix("Your reply: ") for m in Crew.of(None, "mmlu").members
               for line in m.system.splitlines() if line.startswith("Your reply: ")]  # fmt: skip
    assert [letter_of(reply) for reply in replies] == ["C", "B"]


@pytest.mark.parametrize(
    ("task", "text", "whole"),
    [(Gsm8k, "so #### 18\n", True), (Gsm8k, "so #### 18", False), (Gsm8k, "#### and\n", False),
     (Gsm8k, "18\n", False), (HumanEval, "```python\nx", False), (HumanEval, "```python\nx\n```", True),
     (Mmlu, "B\n", False)],
)  # fmt: skip
def test_an_answer_ends_where_it_is_whole(task: Any, text: str, whole: bool) -> None:
    made = (
        HumanEval(ReuseConfig(allow_code_execution=True))
        if task is HumanEval
        else task(QuestionTaskConfig(), 3, "full")
    )
    assert made.complete(text) is whole


def test_a_users_file_says_who_speaks_and_who_decides(tmp_path: Path) -> None:
    problems = tmp_path / "g.jsonl"
    problems.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    config = QuestionTaskConfig(path=str(problems), max_new_tokens=77)
    for chat in (True, False):
        (team,) = Gsm8k(config, 3, "chain", crew(tmp_path, MINE), chat).teams()
        assert team.decision == "boss" and team.topology.order == ("ann", "bob", "boss")
        assert {agent.name: agent.max_new_tokens for agent in team.agents} == {"ann": 77, "bob": 77, "boss": 5}
        bob = next(agent.template for agent in team.agents if agent.name == "bob")
        said = "Solve {question} too. ann wrote:\n{ann} (end of what ann wrote)\n\nGo on."
        assert bob == (Messages(said) if chat else f"{said}\n\nAnswer:")
        boss = team.agents[-1].template
        assert boss == Messages("Q: {question} A: {ann} B: {bob} so?", "{{x}}") or str(boss).startswith("{{x}}\n\nQ: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("boss: [ann, bob]", "boss: [ann, carl]", "'boss' hears 'carl', who is no agent: the agents are"),
        ("bob: [ann]", "carl: [ann]", "topology has 'carl', who is no agent: the agents are ann, bob, boss"),
        ("ann: []", "ann: [bob]", "the topology has the cycle ann -> bob -> ann"),
        ("ann: []", "ann: [boss]", "the topology has the cycle"),
        ("{boss: [ann, bob], bob: [ann], ann: []}", "{ann: [boss]}", "'ann' hears 'boss', whose answer is the last"),
        ("{boss: [ann, bob], bob: [ann], ann: []}", "ring", "unknown topology 'ring': choose chain"),
        ("{boss: [ann, bob], bob: [ann], ann: []}", "[ann]", "gsm8k.topology is .*give a name, or {agent: "),
        ("decision: boss", "decision: carl", "decision='carl' is no agent: name one of boss, ann, bob"),
        ("  decision: boss\n", "", "gsm8k.decision is missing: add it"),
        ("name: bob", "name: ann", "two agents are called 'ann': rename one"),
        ("name: bob", "name: b b", "is no name: use letters"),
        ("name: bob", "name: heard", "an agent is called 'heard', as a placeholder is: rename it"),
        ("name: bob", "naem: bob", r"gsm8k.agents\[2\].*(name is missing|unknown key)"),
        (
            "max_new_tokens: 5",
            "tokens: 5",
            r"unknown key gsm8k.agents\[0\].tokens: the keys beside it are name, system",
        ),
        ("max_new_tokens: 5", "max_new_tokens: 0", r"gsm8k.agents\[0\].max_new_tokens=0 is wrong"),
        ("topology:", "topolgy:", "unknown key gsm8k.topolgy: the keys beside it are agents, decision, topology"),
        (
            "{question} now",
            "{questoin} now",
            "the user message of 'ann' has the placeholder {questoin}.*question, heard",
        ),
        ("Solve {question} now", "{bob} {question}", "the user message of 'ann' has the placeholder {bob}"),
        ("{question} now", "{question now", "user of ann: the template .* without its other half"),
        ("gsm8k:", "mmlu:", "has agents for mmlu, not for gsm8k: add gsm8k, or leave it out"),
        (
            "  decision: boss",
            "  decision: boss\n  decision: ann",
            r"the key 'decision' stands twice \(line 4\): remove one",
        ),
        ("    - {name: ann,", "    - {<<: {}, name: ann,", r"the merge key << \(line 7\) is not read here: write its"),
        ("gsm8k:", "5: {}\ngsm8k:", r"the key 5 \(line 2\) is no text: put it in quotes"),
        ("gsm8k:", "? [1, 2]\n: 3\ngsm8k:", r"the key \[1, 2\] \(line 2\) is no text"),
        ('"Solve {question} now."', '"  "', r"gsm8k.agents\[1\].user is empty: write what the agent is asked"),
        ('"Solve {question} now."', '""', r"gsm8k.agents\[1\].user is empty"),
        ('"Solve {question} now."', "7", r"gsm8k.agents\[1\].user=7 is wrong: give it as text"),
        (
            MINE[MINE.index("    - {name: ann") :],
            "    - ann\n",
            r"agents\[1\]='ann' is wrong: give it the keys name, sys",
        ),
        (MINE[MINE.index("    - {name: ann") :], "", r"gsm8k.agents=\[.*is wrong: give two agents at least"),
        (MINE, "gsm8k: 5", "gsm8k=5 is wrong: give it the keys agents, decision, topology"),
        (
            MINE,
            MINE.replace("{question}", "it"),
            "gsm8k: no agent has {question}, so that nobody knows .*: put it into",
        ),
        ("gsm8k:", "gsm8k: [", "is not YAML in UTF-8"),
        (MINE, "- 1", r"the file=\[1\] is wrong"),
        (MINE, "", "the file=None is wrong"),
    ],
)
def test_faults_of_a_file_are_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINE
    with pytest.raises(UserError, match=message) as caught:
        crew(tmp_path, MINE.replace(old, new, 1)).team(["question"], "full", 9, True)
    said = str(caught.value)
    assert (
        "\n" not in said
        and "agents.yaml" in said
        and not re.search(r"_Member|_Crew|_File|dictionary|input should", said)
    )


def test_some_agent_must_have_what_is_the_tasks_own(tmp_path: Path) -> None:
    """A reader's document, or the decision agent's documents: one of them is enough."""
    mine = MINE.replace("gsm8k", "retrieval")

    def own(place: int) -> dict[str, str]:
        return {"document": "{document_1}"} if place < 2 else {"documents": "{document_1}"}

    with pytest.raises(UserError, match="retrieval: no agent has {document} or {documents}, so that nobody knows"):
        crew(tmp_path, mine, "retrieval").team(["question"], "full", 9, True, own)
    one = mine.replace("Q: {question}", "Q: {question} {documents}")
    assert crew(tmp_path, one, "retrieval").team(["question"], "full", 9, True, own)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="agents.file=.*none.yaml cannot be read"):
        agents_file(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="agents.file=/dev/zero is a device, not a file"):
        agents_file("/dev/zero")
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(UserError, match="agents.file=.*pipe is a pipe, not a file"):
        agents_file(str(pipe))
    (large := tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UserError, match="agents.file=.*large.yaml has more than 1,048,576 bytes"):
        agents_file(str(large))
    (tmp_path / "latin.yaml").write_bytes(b"gsm8k: {decision: \xe9}")
    with pytest.raises(UserError, match="is not YAML in UTF-8"):
        Crew.of(str(tmp_path / "latin.yaml"), "gsm8k")
