"""HumanEval (arXiv 2107.03374): a function from its docstring, right when its tests pass. Runs generated code only when
it is allowed to, in `sandbox`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import Limits, QuestionTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team, panel, read_rows
from anchorctx.evals.evaluators.reuse.tasks.sandbox import passes
from anchorctx.kvcomm.agents import Answer

FIELDS = ("prompt", "test", "entry_point")
CODERS = (
    "You are a programmer. Complete the function. Reply with the whole function in Python and nothing else.",
    "You are a reviewer. Write the function anew, minding the edge cases. Reply with the whole function in Python.",
)


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """What the tests need."""

    prompt: str
    """Imports, signature and docstring."""
    test: str
    """Defines `check(candidate)`."""
    entry_point: str
    """The function's name."""


class HumanEval:
    """See the module; fields `prompt`, `test` and `entry_point`."""

    name = "humaneval"

    def __init__(
        self, config: QuestionTaskConfig, agents: int, topology: str, allow_code_execution: bool, limits: Limits
    ) -> None:
        if not allow_code_execution:
            raise UserError(
                "humaneval runs code that a model wrote: set allow_code_execution=true to allow that, in a subprocess "
                "without network, with limits on time, memory and files"
            )
        self.config, self._agents, self._topology, self._limits = config, agents, topology, limits

    def teams(self) -> Sequence[Team]:
        """One."""
        config = self.config
        rows = read_rows(config.path, config.dataset, config.split, dict.fromkeys(FIELDS, str), config.problems)
        problems = tuple(
            Problem({"question": row["prompt"]}, CodeProblem(*(str(row[name]) for name in FIELDS))) for row in rows
        )
        last = "You decide. Read the other agents' functions and reply with the right one, in Python and nothing else."
        tokens = config.max_new_tokens
        agents, graph = panel(
            self._agents, self._topology, "{question}", last, roles=CODERS, tokens=tokens, final_tokens=tokens
        )
        return [Team(self.name, agents, graph, problems)]

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The program's tests pass."""
        return passes(program_of(answer.text, problem.expected), self._limits)


def program_of(reply: str, problem: CodeProblem) -> str:
    """The reply's code, or the prompt completed by it, followed by the tests and their call."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    code = fenced.group(1) if fenced else reply
    whole = re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE) is not None
    body = f"{problem.prompt}\n    pass\n\n{code}" if whole else problem.prompt + code
    return f"{body}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
