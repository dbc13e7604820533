"""Running a team's problems through dense and through every arm, problem by problem, so that all meet the same machine.

Each problem runs twice through each arm. In the *compared* run every agent, the decision agent too, goes through the
arm and is made to say what dense said: the words are the same, so differences come from the cache. In the *free* run
agents speak for themselves, and the decision agent is dense unless told otherwise: that gives the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.evals.evaluators.reuse.measures import Closeness, KvError, closeness, turn_error
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Task, Team
from anchorctx.kvcomm.agents import Frame, Ids
from anchorctx.kvcomm.arms.basic import Arm
from anchorctx.kvcomm.arms.predicted import Predicted
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.session import Session
from anchorctx.kvcomm.together import together
from anchorctx.kvcomm.turn import Turn
from anchorctx.records.transcripts import Said, Transcript

Words = dict[str, tuple[Ids, Ids]]
"""What dense said on a problem: each agent's answer and its message, in the order in which they spoke."""


@dataclass(slots=True)
class Record:
    """What one arm did on some of a team's problems."""

    arm: str
    kind: str
    by_construction: bool
    closeness: list[list[Closeness]] = field(default_factory=list)
    """By problem and turn."""
    errors: list[KvError] = field(default_factory=list)
    """By turn with placeholders."""
    correct: list[bool] = field(default_factory=list)
    """By problem."""
    judged: dict[bool, list[bool]] = field(default_factory=lambda: {False: [], True: []})
    """By problem, in the agents' order (False) and in another (True): did the decision agent say what dense says?"""
    reused: list[bool] = field(default_factory=list)
    """By turn: all its contents."""
    tokens: list[tuple[int, int, int]] = field(default_factory=list)
    """By turn: prompt tokens, those computed with it, and those computed beside it."""
    flops: list[tuple[float, float]] = field(default_factory=list)
    """By turn: dense, and spent with all hidden work."""
    ttft: list[dict[str, float]] = field(default_factory=list)
    """By problem: seconds by agent."""
    forecasts: list[list[Any]] = field(default_factory=list)
    """By turn, of an arm that predicts: [stage, expected and limit in nats, the greatest that is wanted]."""
    calibration: list[list[float]] = field(default_factory=list)
    """[expected, true] of what its predictions were fitted to, each left out in turn."""
    kept_bytes: int = 0
    """The most that the arm kept from one request to the next, in bytes."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one problem gave."""

    records: dict[str, Record]
    """By arm."""
    words: Words
    transcript: Transcript | None
    """What was said, but for who runs it; None where nobody decides."""


@dataclass(frozen=True, slots=True)
class Lab:
    """What all trials share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    arms: dict[str, Callable[[], Arm]]
    decision_dense: bool
    compare_tokens: int
    decode_together: int
    seed: int


class Trial:
    """One team through all arms: call `prepare`, then `run` for each problem, in order, or `replay` for those that were
    run before. UserError where a prompt is too long.
    """

    def __init__(self, lab: Lab, task: Task, team: Team) -> None:
        self._lab, self._task, self.team = lab, task, team
        self._dense = self._session("dense", lab.arms["dense"], None)
        # Each arm has two sessions, for compared and for free runs, since an arm learns from what goes through it.
        self._compared = {name: self._session(name, make, None) for name, make in lab.arms.items()}
        decision = team.decision if lab.decision_dense else None
        self._free = {name: self._session(name, make, decision) for name, make in lab.arms.items() if name != "dense"}
        for problem in team.problems:
            self._dense.check(problem.texts)
        self.records: dict[str, Record] = {}
        self._rng = np.random.default_rng([lab.seed, *team.kind.encode()])
        self._orders: dict[tuple[str, ...], Frame] = {}

    def prepare(self) -> None:
        """Encode the agents' fixed texts, so that no problem's time has that in it."""
        for session in (self._dense, *self._compared.values(), *self._free.values()):
            session.prepare()

    def run(self, problem: Problem) -> Ran:
        """One problem through every arm."""
        self.records = {n: Record(n, self.team.kind, s.arm.by_construction) for n, s in self._compared.items()}
        # What dense says is the script of the compared runs, dense's own included.
        said = self._dense.start(problem.texts)
        script = problem.script or {}
        dense = {name: said.run(name, answer=script.get(name)) for name in self.team.topology.order}
        shuffled = self._shuffled()
        other: Ids | None = None
        if shuffled is not None and self.team.decision is not None:
            other = said.run(self.team.decision, frame=shuffled, keep=False).ids[: self._lab.compare_tokens]
        truth = self._compare("dense", problem, dense, None, shuffled, other)
        for name in self._compared:
            if name != "dense":
                self._compare(name, problem, dense, truth, shuffled, other)
        words = {agent: (turn.ids, turn.message) for agent, turn in dense.items()}
        if self.team.decision is None:  # teams without one (copy) are only timed and compared
            return Ran(self.records, words, None)
        return Ran(self.records, words, self._transcript(problem, dense, self._answer(problem, dense)))

    def replay(self, problem: Problem, words: Words) -> None:
        """Leave the arms as `run` left them, given what dense said then: only those that learn are run again."""
        self._shuffled()
        self._dense.start(problem.texts)  # requests are numbered
        for session in self._compared.values():
            request = session.start(problem.texts)
            for agent, (ids, message) in words.items() if _learns(session.arm) else ():
                request.run(agent, answer=ids[: self._lab.compare_tokens], message=message)
        if self.team.decision is not None:
            # As it was: what an arm learns here has the rounding of the tokens that were run at once.
            learning = [name for name, session in self._free.items() if _learns(session.arm)]
            self._speak_freely(problem, learning)
            for session in (self._free[name] for name in self._free if name not in learning):
                session.start(problem.texts)

    def _session(self, name: str, make: Callable[[], Arm], decision: str | None) -> Session:
        lab, team = self._lab, self.team
        return Session(
            lab.model,
            lab.tokenizer,
            team.agents,
            arm=make(),
            topology=team.topology,
            decision=decision,
            decoder=lab.decoder,
        )

    def _compare(
        self,
        name: str,
        problem: Problem,
        dense: dict[str, Turn],
        truth: dict[str, Turn] | None,
        shuffled: Frame | None,
        other: Ids | None,
    ) -> dict[str, Turn]:
        """The compared run; dense's own turns come back as the truth for the others."""
        session, record = self._compared[name], self.records[name]
        request = session.start(problem.texts)
        turns: dict[str, Turn] = {}
        for agent, model in dense.items():
            if other is not None and agent == self.team.decision:
                # Before the agent reads in its usual order: an arm that learns would else answer from what it just
                # learnt. In a fork, so that work done here does not shorten the time of the turn below.
                turn = request.fork().run(agent, answer=other, frame=shuffled, keep=False)
                record.judged[True].append(_says(turn, other))
            # Only the beginning of the answer is compared, but the whole message is passed on.
            turns[agent] = request.run(agent, answer=model.ids[: self._lab.compare_tokens], message=model.message)
            if isinstance(session.arm, Predicted):
                _note_forecast(record, session.arm)
        record.closeness.append([])
        for agent, turn in turns.items():
            self._note(record, turn, (truth or turns)[agent], final=agent == self.team.decision)
        record.ttft.append({agent: turn.ttft for agent, turn in turns.items()})
        record.kept_bytes = max(record.kept_bytes, session.arm.nbytes)
        return turns

    def _note(self, record: Record, turn: Turn, true: Turn, *, final: bool) -> None:
        record.closeness[-1].append(closeness(true, turn))
        error = turn_error(true, turn)
        if error is not None:
            record.errors.append(error)
        record.reused.append(bool(turn.reused) and all(turn.reused))
        record.tokens.append((turn.prompt.length, turn.computed, turn.hidden))
        record.flops.append((turn.dense_flops, turn.flops))
        if final:
            record.judged[False].append(_says(turn, turn.ids))

    def _answer(self, problem: Problem, dense: dict[str, Turn]) -> dict[str, dict[str, str]]:
        """The free run, and dense's own: what each agent said, by arm."""
        decision = self.team.decision
        assert decision is not None
        self.records["dense"].correct.append(self._task.score(dense[decision].answer, problem))
        said = {"dense": {agent: turn.answer.text for agent, turn in dense.items()}}
        # Dense's own answers are at hand from the first run: it is not run again.
        for name, turns in self._speak_freely(problem, list(self._free)).items():
            self.records[name].correct.append(self._task.score(turns[decision].answer, problem))
            said[name] = {agent: turn.answer.text for agent, turn in turns.items()}
        return said

    def _speak_freely(self, problem: Problem, names: list[str]) -> dict[str, dict[str, Turn]]:
        """The free runs of some arms, several at once; those that learn among themselves, so that `replay`, which runs
        only them, gives them the same rounding."""
        learning = [name for name in names if _learns(self._free[name].arm)]
        others = [name for name in names if name not in learning]
        turns: dict[str, dict[str, Turn]] = {}
        for group in (learning, others):
            size = self._lab.decode_together
            for some in (group[first : first + size] for first in range(0, len(group), size)):
                talks = {name: self._free[name].talk(problem.texts) for name in some}
                turns |= together(self._lab.decoder, talks)
        return {name: turns[name] for name in names}

    def _transcript(self, problem: Problem, dense: dict[str, Turn], said: dict[str, dict[str, str]]) -> Transcript:
        arms = {}
        for name, answers in said.items():
            record = self.records[name]
            turns = zip(dense, record.closeness[-1], strict=True)
            arms[name] = Said(answers, {agent: float(turn.kl.mean()) for agent, turn in turns}, record.correct[-1])
        number = next(i for i, other in enumerate(self.team.problems) if other is problem)
        return Transcript(
            model="",
            task=self._task.name,
            kind=self.team.kind,
            problem=number,
            problems="",
            expected=str(problem.expected),
            prompts={agent: self._dense.decode(turn.prompt.ids) for agent, turn in dense.items()},
            arms=arms,
        )

    def _shuffled(self) -> Frame | None:
        """The decision agent's prompt with those it hears in another order; None where it hears fewer than two."""
        decision = self.team.decision
        heard = self.team.topology.inputs[decision] if decision is not None else ()
        if len(heard) < 2 or decision is None:
            return None
        order = list(heard)  # draw until it differs; two agents have only one other order
        while order == list(heard):
            order = [heard[i] for i in self._rng.permutation(len(heard))]
        if tuple(order) not in self._orders:
            self._orders[tuple(order)] = self._dense.frame(decision, dict(zip(heard, order, strict=True)))
        return self._orders[tuple(order)]


def _note_forecast(record: Record, arm: Predicted) -> None:
    found = arm.forecast
    # One for every turn, so that each stands beside its true divergence: None where there was nothing to reuse.
    said = [None, None, None] if found is None else [found.stage, found.expected, found.limit]
    record.forecasts.append([*said, arm.bound])
    record.calibration += [list(pair) for pair in found.calibration] if found is not None else []


def _learns(arm: Arm) -> bool:
    """Whether it keeps anything from one request to the next."""
    return type(arm).observe is not Arm.observe or type(arm).hear is not Arm.hear


def _says(turn: Turn, answer: Ids) -> bool:
    """Whether greedy decoding would say `answer`: it predicts each token after the ones before it."""
    return turn.logits[: len(answer)].argmax(-1).tolist() == list(answer)
