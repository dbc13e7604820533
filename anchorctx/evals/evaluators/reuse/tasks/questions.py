"""Questions with exact answers: GSM8K (a number) and MMLU (a letter). Scorers read the answer, never search for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import QuestionTaskConfig
from anchorctx.evals.evaluators.reuse.tasks.base import Problem, Team, panel, read_rows
from anchorctx.kvcomm.agents import Answer

SOLVERS = (
    "You are a mathematician. Solve the problem step by step, then write #### and the number.",
    "You are a careful checker. Work the problem out on your own and compare, then write #### and the number.",
    "You are a programmer. Set the problem up as a calculation, carry it out, then write #### and the number.",
)
EXPERTS = (
    "You are an expert of the subject. Reason briefly, then give the letter of the right choice.",
    "You are a critic. Say which choices cannot be right, then give the letter of the right one.",
    "You are a teacher. Explain what the question tests, then give the letter of the right choice.",
)
LETTERS = "ABCD"
_NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?(?!\d|\.\d|[/^]|e[+-]?\d)")
"""Whole: not the 3 of 3/4 or the 1 of 1e3."""


class Gsm8k:
    """School mathematics (arXiv 2110.14168): fields `question` and `answer`, whose last line is `#### number`."""

    name = "gsm8k"

    def __init__(self, config: QuestionTaskConfig, agents: int, topology: str) -> None:
        self.config, self._agents, self._topology = config, agents, topology

    def teams(self) -> Sequence[Team]:
        """One."""
        rows = read_rows(
            self.config.path,
            self.config.dataset,
            self.config.split,
            {"question": str, "answer": str},
            self.config.problems,
        )
        problems = tuple(Problem({"question": row["question"]}, _reference(row["answer"])) for row in rows)
        last = "You decide. Read the other agents' solutions, then write #### and the right number."
        tokens = self.config.max_new_tokens
        agents, graph = panel(
            self._agents, self._topology, "Problem: {question}", last, roles=SOLVERS, tokens=tokens, final_tokens=tokens
        )
        return [Team(self.name, agents, graph, problems)]

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The numbers are equal."""
        return number_of(answer.text) == problem.expected


class Mmlu:
    """Multiple choice (arXiv 2009.03300): fields `question`, `choices` (four) and `answer` (0..3 or a letter)."""

    name = "mmlu"

    def __init__(self, config: QuestionTaskConfig, agents: int, topology: str) -> None:
        self.config, self._agents, self._topology = config, agents, topology

    def teams(self) -> Sequence[Team]:
        """One."""
        rows = read_rows(
            self.config.path,
            self.config.dataset,
            self.config.split,
            {"question": str, "choices": list, "answer": (int, str)},
            self.config.problems,
        )
        problems = []
        for row in rows:
            if len(row["choices"]) != len(LETTERS):
                raise UserError(f"{_named(row)} has {len(row['choices'])} choices, where there are four: correct it")
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
            answer = row["answer"]
            expected = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 4 else str(answer).strip().upper()
            if expected not in tuple(LETTERS):
                raise UserError(f"{_named(row)} has the answer {answer!r}, neither 0 to 3 nor A to D: correct it")
            problems.append(Problem({"question": f"{row['question']}\n{choices}"}, expected))
        last = "You decide. Read the other agents' answers, then reply with the letter of the right choice alone."
        agents, graph = panel(
            self._agents,
            self._topology,
            "Question: {question}",
            last,
            roles=EXPERTS,
            tokens=self.config.max_new_tokens,
            final_tokens=8,
        )
        return [Team(self.name, agents, graph, tuple(problems))]

    def score(self, answer: Answer, problem: Problem) -> bool:
        """The reply's letter is the right one."""
        return letter_of(answer.text) == problem.expected


def _named(row: dict[str, Any]) -> str:
    return f"the MMLU question {row['question'][:60]!r}"


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


def _reference(answer: str) -> Decimal:
    found = number_of(answer) if "####" in answer else None
    if found is None:
        raise UserError(f"a GSM8K answer must end with '#### number', got {answer[-40:]!r}: correct the file")
    return found


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
