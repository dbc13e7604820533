"""What a task is: teams of agents with their prompts, problems for them, and an exact scorer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Agent, Answer
from anchorctx.kvcomm.topology import TOPOLOGIES, Topology

DECISION = "decision"
"""The agent whose answer counts."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One request and what is right."""

    texts: Mapping[str, str | tuple[int, ...]]
    """By placeholder: text, or tokens."""
    expected: Any = None
    """What the scorer compares the answer with."""
    script: Mapping[str, tuple[int, ...]] | None = None
    """Given answers in tokens, by agent, where only time matters."""


@dataclass(frozen=True, slots=True)
class Team:
    """Agents for one kind of problem, and the problems."""

    kind: str
    """Kind of problem within the task; the task's own name where there is one kind only."""
    agents: tuple[Agent, ...]
    """The last is the decision agent where the team has one."""
    topology: Topology
    problems: tuple[Problem, ...]
    decision: str | None = DECISION
    """Whose answer is scored; None for a team that is only timed."""


def fingerprint(problems: Sequence[Problem]) -> str:
    """Twelve hex digits that change with the problems: figures of two models are paired only where these are equal."""
    # Texts, answers and scripts: all that a problem is made of.
    said = json.dumps([[sorted(p.texts.items()), str(p.expected), sorted((p.script or {}).items())] for p in problems])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


class Task(Protocol):
    """One task with its settings."""

    name: str

    def teams(self) -> Sequence[Team]:
        """The teams, one a kind."""
        ...

    def score(self, answer: Answer, problem: Problem) -> bool:
        """Whether the decision agent's answer is right."""
        ...


def panel(
    count: int, topology: str, question: str, last: str, *, roles: Sequence[str], tokens: int, final_tokens: int
) -> tuple[tuple[Agent, ...], Topology]:
    """`count` agents in a named topology, the last of them the decision agent, who hears all others.

    Each prompt: its role (`last` for the decision agent), the `question` text with its {placeholders}, then what each
    agent it hears said. In a debate the others speak in two rounds, and the decision agent hears the second.
    """
    if count < 2:
        raise UserError(f"agents.count={count} must be at least 2: one that answers, and the decision agent")
    graph = named_topology(topology, [f"agent_{i}" for i in range(1, count)], DECISION)
    agents = []
    for number, name in enumerate(graph.order):
        final = name == DECISION
        # In a debate agent_1@2 is agent_1's second turn.
        said = "".join(f"\n{other.replace('@', ' in round ')} said:\n{{{other}}}" for other in graph.inputs[name])
        role = last if final else roles[number % len(roles)]
        agents.append(Agent(name, f"{role}\n\n{question}\n{said}\n\nAnswer:", final_tokens if final else tokens))
    return tuple(agents), graph


def named_topology(topology: str, names: Sequence[str], decision: str) -> Topology:
    """Agents in a named topology, and a decision agent at the end, who hears all others; UserError for other names."""
    if topology not in TOPOLOGIES:
        raise UserError(f"unknown topology {topology!r}: choose {', '.join(TOPOLOGIES)}")
    graph = TOPOLOGIES[topology](names)
    # A debate's first round is heard through the second one alone.
    return graph.with_decision(decision, hears=graph.last if topology == "debate" else None)


def read_rows(
    path: str | None, dataset: str, split: str, fields: Mapping[str, type | tuple[type, ...]], count: int
) -> list[dict[str, Any]]:
    """`count` rows (0 for all) of a local JSON-lines file, or of a dataset on the hub (`name` or `name:configuration`).

    UserError for a missing file, a line that is not an object with `fields` of these types, or a hub that cannot be
    reached.
    """
    rows = []
    for where, row in _local(Path(path)) if path is not None else _hub(dataset, split):
        missing = [name for name in fields if name not in row]
        if missing:
            raise UserError(f"{where} has no field {missing[0]!r}: each row needs {', '.join(fields)}")
        wrong = [name for name, kind in fields.items() if not isinstance(row[name], kind)]
        if wrong:
            raise UserError(f"{where} has {row[wrong[0]]!r} as {wrong[0]!r}, which is of another type: correct the row")
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise UserError(f"{path or dataset} has no problems: name another file")
    return rows


def _local(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a JSON-lines file of problems, or null for the hub's")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():  # a file may end with an empty line
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON in UTF-8 ({error}): correct or delete the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is not a JSON object: correct or delete the line")
            yield f"{path}:{number}", row


def _hub(dataset: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, configuration = dataset.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub's errors have no common class
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"the dataset {dataset} cannot be loaded ({reason}): give a local file as path") from error
    for number, row in enumerate(rows):
        yield f"{dataset} row {number}", dict(row)  # type: ignore[call-overload]
