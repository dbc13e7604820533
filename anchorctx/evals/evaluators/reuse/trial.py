"""Running a team's problems through dense and through every arm.

Each problem runs twice through each arm. In the *compared* run every agent, the decision agent too, goes through the
arm and is made to say what dense said: the words are the same, so differences come from the cache. It is timed, problem
by problem, so that all arms meet the same machine. In the *free* run agents speak for themselves, and the decision
agent is dense unless told otherwise: that gives the accuracy. Dense and the free runs decode several problems at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.evals.evaluators.reuse.measures import closeness, turn_error
from anchorctx.evals.evaluators.reuse.record import Record
from anchorctx.evals.evaluators.reuse.speech import Script, answers, scripts
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Task, Team
from anchorctx.kvcomm.agents import Answer, Frame, Ids
from anchorctx.kvcomm.arms.basic import Arm, FixedPrefix
from anchorctx.kvcomm.arms.predicted import Predicted
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.session import Session
from anchorctx.kvcomm.turn import Turn
from anchorctx.records.transcripts import Said, Transcript

Words = dict[str, tuple[Ids, Ids]]
"""What dense said on a problem: each agent's answer and its message, in the order in which they spoke."""


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
    accuracy: bool
    decision_dense: bool
    compare_tokens: int
    decode_together: int
    seed: int


class Trial:
    """One team through all arms: call `prepare`, then `run` for some problems at a time, in order, or `replay` for as
    many at a time that were run before. UserError where a prompt is too long.
    """

    def __init__(self, lab: Lab, task: Task, team: Team) -> None:
        self._lab, self._task, self.team = lab, task, team
        self._script = self._session(FixedPrefix(), None)
        # Each arm has two sessions, for compared and for free runs, since an arm learns from what goes through it.
        self._compared = {name: self._session(make(), None) for name, make in lab.arms.items()}
        decision = team.decision if lab.decision_dense else None
        free = {name: make for name, make in lab.arms.items() if name != "dense" and lab.accuracy}
        self._free = {name: self._session(make(), decision) for name, make in free.items()}
        for problem in team.problems:
            self._script.check(problem.texts)
        self._rng = np.random.default_rng([lab.seed, *team.kind.encode()])
        self._orders: dict[tuple[str, ...], Frame] = {}

    def prepare(self) -> None:
        """Encode the agents' fixed texts, so that no problem's time has that in it."""
        for session in (self._script, *self._compared.values(), *self._free.values()):
            session.prepare()

    def run(self, problems: Sequence[Problem]) -> list[Ran]:
        """Some problems through every arm."""
        lab, asked = self._lab, [(problem, self._shuffled()) for problem in problems]
        said = scripts(self._script, self.team, asked, lab.compare_tokens, lab.decode_together)
        records = [self._compared_runs(*both) for both in zip(problems, said, strict=True)]
        free = self._speak_freely(problems, list(self._free)) if self.team.decision is not None else [{}] * len(said)
        return [self._ran(*one) for one in zip(problems, said, records, free, strict=True)]

    def replay(self, problems: Sequence[Problem], words: Sequence[Words]) -> None:
        """Leave the arms as `run` left them, given what dense said then: only those that learn are run again."""
        for problem, said in zip(problems, words, strict=True):
            self._shuffled()
            self._script.start(problem.texts)  # requests are numbered
            for session in self._compared.values():
                request = session.start(problem.texts)
                for agent, (ids, message) in said.items() if _learns(session.arm) else ():
                    request.run(agent, answer=ids[: self._lab.compare_tokens], message=message)
        if self.team.decision is not None:
            # As it was: what an arm learns here has the rounding of the tokens that were run at once.
            self._speak_freely(problems, [name for name, session in self._free.items() if _learns(session.arm)])
            for session in (session for session in self._free.values() if not _learns(session.arm)):
                for problem in problems:
                    session.start(problem.texts)

    def _session(self, arm: Arm, decision: str | None) -> Session:
        lab, team = self._lab, self.team
        return Session(
            lab.model,
            lab.tokenizer,
            team.agents,
            arm=arm,
            topology=team.topology,
            decision=decision,
            decoder=lab.decoder,
        )

    def _compared_runs(self, problem: Problem, said: Script) -> dict[str, Record]:
        """One problem through every arm, dense's own run first."""
        records = {n: Record(n, self.team.kind, s.arm.by_construction) for n, s in self._compared.items()}
        truth = self._compare("dense", problem, said, None, records["dense"])
        for name, record in records.items():
            if name != "dense":
                self._compare(name, problem, said, truth, record)
        return records

    def _compare(
        self, name: str, problem: Problem, said: Script, truth: dict[str, Turn] | None, record: Record
    ) -> dict[str, Turn]:
        """The compared run; dense's own turns come back as the truth for the others."""
        session = self._compared[name]
        request = session.start(problem.texts)
        turns: dict[str, Turn] = {}
        for agent, spoken in said.turns.items():
            if said.other is not None and agent == self.team.decision:
                # Before the agent reads in its usual order: an arm that learns would else answer from what it just
                # learnt. In a fork, so that work done here does not shorten the time of the turn below.
                turn = request.fork().run(agent, answer=said.other, frame=said.shuffled, keep=False)
                record.judged[True].append(_says(turn, said.other))
            # Only the beginning of the answer is compared, but the whole message is passed on.
            turns[agent] = request.run(agent, answer=spoken.ids[: self._lab.compare_tokens], message=spoken.message)
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
        record.contents.append((turn.prompt.segments[0].length, *turn.contents))
        record.flops.append((turn.dense_flops, turn.flops))
        if final:
            record.judged[False].append(_says(turn, turn.ids))

    def _speak_freely(self, problems: Sequence[Problem], names: Sequence[str]) -> list[dict[str, dict[str, Answer]]]:
        """The free runs of some arms, several at once; those that learn among themselves, so that `replay`, which runs
        only them, gives them the same rounding, and problem by problem, so that what one knows is what it has learnt
        from all problems before, however many are run together."""
        learning = {name: self._free[name] for name in names if _learns(self._free[name].arm)}
        others = {name: self._free[name] for name in names if name not in learning}
        together = self._lab.decode_together
        learnt = [answers(learning, [problem], together)[0] for problem in problems]
        return [a | b for a, b in zip(learnt, answers(others, problems, together), strict=True)]

    def _ran(
        self, problem: Problem, said: Script, records: dict[str, Record], free: dict[str, dict[str, Answer]]
    ) -> Ran:
        words = {agent: (spoken.ids, spoken.message) for agent, spoken in said.turns.items()}
        decision = self.team.decision
        if decision is None:  # teams without one (copy) are only timed and compared
            return Ran(records, words, None)
        # Dense's own answers are at hand from the first run: it is not run again.
        spoken = {"dense": {agent: spoken.answer for agent, spoken in said.turns.items()}}
        spoken |= {name: free[name] for name in self._free}
        for name, answer in spoken.items():
            records[name].correct.append(self._task.score(answer[decision], problem))
        return Ran(records, words, self._transcript(problem, said, records, spoken))

    def _transcript(
        self, problem: Problem, said: Script, records: dict[str, Record], spoken: dict[str, dict[str, Answer]]
    ) -> Transcript:
        arms = {}
        for name, answer in spoken.items():
            record = records[name]
            turns = zip(said.turns, record.closeness[-1], strict=True)
            texts = {agent: one.text for agent, one in answer.items()}
            arms[name] = Said(texts, {agent: float(turn.kl.mean()) for agent, turn in turns}, record.correct[-1])
        number = next(i for i, other in enumerate(self.team.problems) if other is problem)
        return Transcript(
            model="",
            task=self._task.name,
            kind=self.team.kind,
            problem=number,
            problems="",
            expected=str(problem.expected),
            prompts={agent: self._script.decode(turn.prompt) for agent, turn in said.turns.items()},
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
            self._orders[tuple(order)] = self._script.frame(decision, dict(zip(heard, order, strict=True)))
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
