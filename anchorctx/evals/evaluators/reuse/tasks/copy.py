"""Synthetic requests with given lengths, for timing: answers are given, so that every arm has the same tokens.

The paper's geometry is the default of `benchmarks/kvcomm.py`: five fully connected agents, a question of 1,024
tokens, a fixed prefix of 512 for each agent, answers of 512.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import CopyTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team
from anchorctx.kvcomm.agents import Agent, Answer, Slot, Template
from anchorctx.kvcomm.topology import TOPOLOGIES
from anchorctx.settings import check_ranges


class CopyTask:
    """See the module; tokens are drawn evenly from a vocabulary."""

    name = "copy"

    def __init__(
        self,
        config: CopyTaskConfig,
        agents: int,
        topology: str,
        vocabulary: int,
        seed: int,
        reach: int | None = None,
    ) -> None:
        """Prompts and answers that are longer than `reach` are refused before they are made; None makes any."""
        check_ranges(config, "copy")
        if agents < 1:
            raise UserError(f"copy with agents={agents} has nobody to speak: give at least 1")
        if topology not in TOPOLOGIES:
            raise UserError(f"unknown topology {topology!r}: choose {', '.join(TOPOLOGIES)}")
        self.config, self._vocabulary, self._seed = config, vocabulary, seed
        self._topology = TOPOLOGIES[topology]([f"agent_{i}" for i in range(1, agents + 1)])
        # BOS, the prefix, the question, what those said that the agent hears, and what it says itself.
        answers = 1 + max(map(len, self._topology.inputs.values()))
        longest = 1 + config.prefix + config.question + answers * config.output
        if reach is not None and longest > reach:
            raise UserError(
                f"copy.prefix={config.prefix}, copy.question={config.question} and copy.output={config.output} make a "
                f"prompt and an answer of {longest} tokens, but the model reaches {reach}: lower them, or agents.count"
            )

    def teams(self) -> Sequence[Team]:
        """One, without a decision agent."""
        # Drawn in a fixed order (prefixes, then each problem's question and answers), so a seed fixes the problems.
        config, graph, rng = self.config, self._topology, np.random.default_rng([self._seed, 9])

        def draw(length: int) -> tuple[int, ...]:
            return tuple(rng.integers(self._vocabulary, size=length).tolist())

        agents = []
        for name in graph.order:
            heard = [Slot(other) for other in graph.inputs[name]]
            agents.append(Agent(name, Template((draw(config.prefix), Slot("question"), *heard)), config.output))
        problems = [
            Problem({"question": draw(config.question)}, script={name: draw(config.output) for name in graph.order})
            for _ in range(config.problems)
        ]
        return [Team(self.name, tuple(agents), graph, tuple(problems), None)]

    def score(self, answer: Answer, problem: Problem) -> bool:
        """Always: nothing is right or wrong here."""
        return True
