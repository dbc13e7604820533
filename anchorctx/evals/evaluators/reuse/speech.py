"""Agents that speak for themselves on several problems at once: dense, whose words are the script, and every arm.

Decoding one token reads all weights, whoever it is for; a forward of one token for each of many talks reads them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team
from anchorctx.kvcomm.agents import Answer, Frame, Ids
from anchorctx.kvcomm.session import Session
from anchorctx.kvcomm.together import together
from anchorctx.kvcomm.turn import Talk, Turn


@dataclass(frozen=True, slots=True)
class Spoken:
    """What dense said in one turn; not the turn, which holds its prompt's keys and values."""

    prompt: Ids
    ids: Ids
    answer: Answer
    message: Ids

    @classmethod
    def of(cls, turn: Turn) -> Spoken:
        """Its words."""
        return cls(turn.prompt.ids, turn.ids, turn.answer, turn.message)


@dataclass(frozen=True, slots=True)
class Script:
    """What dense said on a problem, which all compared runs repeat."""

    turns: dict[str, Spoken]
    """By agent, in the order in which they spoke."""
    shuffled: Frame | None
    """The decision agent's prompt with those it hears in another order; None where it hears fewer than two."""
    other: Ids | None
    """What it says to that: the beginning."""


def scripts(
    session: Session,
    team: Team,
    problems: Sequence[tuple[Problem, Frame | None]],
    tokens: int,
    at_once: int,
) -> list[Script]:
    """What dense says on each problem, and to the decision agent's prompt in another order `tokens` at most."""
    talks = {i: _script(session, team, *problem, tokens) for i, problem in enumerate(problems)}
    return list(together(session.decoder, talks, at_once).values())


def _script(session: Session, team: Team, problem: Problem, shuffled: Frame | None, tokens: int) -> Talk[Script]:
    request, given = session.start(problem.texts), problem.script or {}
    turns: dict[str, Spoken] = {}
    for name in team.topology.order:
        turns[name] = Spoken.of((yield from request.turn(name, answer=given.get(name))))
    other: Ids | None = None
    if shuffled is not None and team.decision is not None:
        other = (yield from request.turn(team.decision, frame=shuffled, keep=False)).ids[:tokens]
    return Script(turns, shuffled, other)


def answers(
    sessions: Mapping[str, Session], problems: Sequence[Problem], at_once: int
) -> list[dict[str, dict[str, Answer]]]:
    """What each agent says, by problem and arm. A session hears of the problems in order, several under way at once."""
    if not sessions:
        return [{} for _ in problems]
    talks = {(i, arm): _answers(s, problem) for i, problem in enumerate(problems) for arm, s in sessions.items()}
    found = together(next(iter(sessions.values())).decoder, talks, at_once)
    return [{arm: found[i, arm] for arm in sessions} for i in range(len(problems))]


def _answers(session: Session, problem: Problem) -> Talk[dict[str, Answer]]:
    request, said = session.start(problem.texts), {}
    for name in session.topology.order:
        said[name] = (yield from request.turn(name)).answer
    return said
