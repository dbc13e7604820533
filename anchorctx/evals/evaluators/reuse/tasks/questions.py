"""Questions with exact answers: GSM8K (a number), MMLU (a letter) and HumanEval (a function that passes its tests).

Scorers read the answer where it must stand and never search a reply for something that fits. HumanEval runs generated
code, in `sandbox`, and only when that is allowed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import QuestionTaskConfig, ReuseConfig
from anchorctx.evals.evaluators.reuse.tasks.base import DECISION, Problem, Team, panel, read_rows
from anchorctx.evals.evaluators.reuse.tasks.crew import Crew
from anchorctx.evals.evaluators.reuse.tasks.sandbox import CodeProblem, check_sandbox, passes
from anchorctx.kvcomm.agents import Answer

LETTERS = "ABCD"
# A whole number with its sign and decimals: not the 3 of 3/4, the 1 of 1e3 or the 8 of 18.
_NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?(?!\d|\.\d|[/^]|e[+-]?\d)")


_LAST_LINE = re.compile(r"####[^\n]*\d[^\n]*\n")


class QuestionTask(ABC):
    """One team of agents in a named topology, and questions from a file or the hub."""

    name: str
    fields: ClassVar[dict[str, type | tuple[type, ...]]]
    """What each row of the file must have, by type."""
    ask: ClassVar[str] = "{question}"
    """The question in every agent's prompt."""
    roles: ClassVar[Sequence[str]]
    """How the agents' prompts begin, in turn."""
    last: ClassVar[str]
    """How the decision agent's prompt begins."""
    final_tokens: ClassVar[int | None] = None
    """Longest answer of the decision agent, in tokens; None is that of the others, max_new_tokens."""

    def __init__(
        self, config: QuestionTaskConfig, agents: int, topology: str, crew: Crew | None = None, chat: bool = False
    ) -> None:
        """`agents` with `roles` and plain prompts, or a crew, whose prompts are messages where the model chats."""
        self.config, self._agents, self._topology = config, agents, topology
        self._crew, self._chat = crew, chat

    def teams(self) -> Sequence[Team]:
        """One."""
        config, tokens = self.config, self.config.max_new_tokens
        if self._crew is not None:
            agents, graph = self._crew.team(("question",), self._topology, tokens, self._chat)
        else:
            agents, graph = panel(
                self._agents,
                self._topology,
                self.ask,
                self.last,
                roles=self.roles,
                tokens=tokens,
                final_tokens=self.final_tokens or tokens,
            )
        rows = read_rows(config.path, config.dataset, config.split, self.fields, config.problems)
        problems = tuple(self.problem(row) for row in rows)
        agents = tuple(replace(agent, stop=self.complete) for agent in agents)
        return [Team(self.name, agents, graph, problems, DECISION if self._crew is None else self._crew.decision)]

    def complete(self, text: str) -> bool:
        """Whether an answer is whole, so that its agent stops: small models repeat their last line for ever."""
        return False

    @abstractmethod
    def problem(self, row: dict[str, Any]) -> Problem:
        """The problem of a row, which has all `fields`; UserError where it makes none."""

    @abstractmethod
    def score(self, answer: Answer, problem: Problem) -> bool:
        """Whether the decision agent's answer is right."""


class Gsm8k(QuestionTask):
    """School mathematics (arXiv 2110.14168): fields `question` and `answer`, whose last line is `#### number`."""

    name = "gsm8k"
    fields = {"question": str, "answer": str}
    ask = "Problem:\n{question}"
    roles = (
        "You are a mathematician. Solve the problem step by step, then write #### and the number.",
        "You are a careful checker. Work the problem out on your own and compare, then write #### and the number.",
        "You are a programmer. Set the problem up as a calculation, carry it out, then write #### and the number.",
    )
    last = "You decide. Read the other agents' solutions, then write #### and the right number."

    def complete(self, text: str) -> bool:
        """A line with #### and a number has ended."""
        return _LAST_LINE.search(text) is not None

    def problem(self, row: dict[str, Any]) -> Problem:
        """The question, and the number that is right."""
        answer = row["answer"]
        expected = number_of(answer) if "####" in answer else None
        if expected is None:
            raise UserError(f"a GSM8K answer must end with '#### number', got {answer[-40:]!r}: correct the file")
        return Problem({"question": row["question"]}, expected)

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The numbers are equal."""
        return number_of(answer.text) == problem.expected


class Mmlu(QuestionTask):
    """Multiple choice (arXiv 2009.03300): fields `question`, `choices` (four) and `answer` (0..3 or a letter)."""

    name = "mmlu"
    fields = {"question": str, "choices": list, "answer": (int, str)}
    ask = "Question:\n{question}"
    roles = (
        "You are an expert of the subject. Reason briefly, then give the letter of the right choice.",
        "You are a critic. Say which choices cannot be right, then give the letter of the right one.",
        "You are a teacher. Explain what the question tests, then give the letter of the right choice.",
    )
    last = "You decide. Read the other agents' answers, then reply with the letter of the right choice alone."
    final_tokens = 8

    def problem(self, row: dict[str, Any]) -> Problem:
        """The question with its choices, and the right letter."""
        named = f"the MMLU question {row['question'][:60]!r}"
        if len(row["choices"]) != len(LETTERS):
            raise UserError(f"{named} has {len(row['choices'])} choices, where there are four: correct it")
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
        answer = row["answer"]
        expected = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 4 else str(answer).strip().upper()
        if expected not in tuple(LETTERS):
            raise UserError(f"{named} has the answer {answer!r}, neither 0 to 3 nor A to D: correct it")
        return Problem({"question": f"{row['question']}\n{choices}"}, expected)

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The reply's letter is the right one."""
        return letter_of(answer.text) == problem.expected


class HumanEval(QuestionTask):
    """Functions from their docstrings (arXiv 2107.03374): fields `prompt`, `test` and `entry_point`."""

    name = "humaneval"
    fields = {"prompt": str, "test": str, "entry_point": str}
    roles = (
        "You are a programmer. Complete the function. Reply with the whole function in Python and nothing else.",
        "You are a reviewer. Write the function anew, minding the edge cases. Reply with the whole function in Python.",
    )
    last = "You decide. Read the other agents' functions and reply with the right one, in Python and nothing else."

    def __init__(self, config: ReuseConfig, crew: Crew | None = None, chat: bool = False) -> None:
        super().__init__(config.humaneval, config.agents.count, config.topology, crew, chat)
        if not config.allow_code_execution:
            raise UserError(
                "humaneval runs code that a model wrote: set allow_code_execution=true to allow that, in processes "
                "that can only compute, with limits on time and memory"
            )
        self._limits, self._unsafe = config.sandbox, config.unsafe_code_execution
        check_sandbox(self._limits, unsafe=self._unsafe)

    def complete(self, text: str) -> bool:
        """A block of code has ended."""
        return text.count("```") > 1

    def problem(self, row: dict[str, Any]) -> Problem:
        """The prompt, and what its tests need."""
        return Problem({"question": row["prompt"]}, CodeProblem(*(row[name] for name in self.fields)))

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The program's tests pass."""
        program = program_of(answer.text, problem.expected)
        return passes(program, problem.expected, self._limits, unsafe=self._unsafe)


# -- reading replies --------------------------------------------------------------------------------------------------


def number_of(text: str) -> Decimal | None:
    """The number right behind the first `####`, or the last number where there is no such mark; None without any."""
    _, mark, behind = text.partition("####")
    if mark:
        found = _NUMBER.match(behind.strip())
        return _decimal(found.group()) if found else None
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def letter_of(text: str) -> str | None:
    """The letter that a reply is or begins with (`B`, `(B)`, `B. ...`), or ends with after `answer is`; else None.

    A letter and a space are a word: `A reasonable answer is B` says B.
    """
    text = text.strip()
    found = re.search(r"answer is:?\s*\(?([A-D])\)?\.?$", text) or re.match(r"\(?([A-D])(?:\)|[.:,;]|\n|$)", text)
    return found.group(1) if found else None


def program_of(reply: str, problem: CodeProblem) -> str:
    """The reply's code behind the prompt, or the prompt completed by it."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    code = fenced.group(1) if fenced else reply
    whole = re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE) is not None
    # A whole function still needs the prompt's imports; `pass` makes the prompt's own signature a valid function first.
    return f"{problem.prompt}\n    pass\n\n{code}" if whole else problem.prompt + code


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
