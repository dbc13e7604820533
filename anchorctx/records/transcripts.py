"""What agents were told and what they said, one problem a line in `transcripts.jsonl`, for people to read.

Texts are cut in the middle, so that a line has at most some 100 kB with every arm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "transcripts.jsonl"
PROMPT_CHARS, ANSWER_CHARS = 6000, 2000
"""Longest prompt and answer that are kept, in characters."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the agents said through one arm."""

    answers: Mapping[str, str]
    """By agent, in the order in which they spoke; each heard what the others said through this arm."""
    kl: Mapping[str, float]
    """By agent: mean KL(dense | arm) of a token in nats, on the same words."""
    correct: bool
    """Whether the decision agent's answer is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One problem through every arm."""

    model: str
    """Its label."""
    task: str
    kind: str
    """Kind of problem; the task's name where it has one kind."""
    problem: int
    """Its number among the problems of its kind, from 0."""
    problems: str
    """Fingerprint of all problems, as in the rows of results.jsonl."""
    expected: str
    """What is right."""
    prompts: Mapping[str, str]
    """By agent: what it read, in dense's run."""
    arms: Mapping[str, Said]
    """By arm; `dense` is the first."""

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        """Which problem of which evaluation it is of."""
        return self.model, self.task, self.kind, self.problems, self.problem


def append_transcript(path: Path, transcript: Transcript) -> None:
    """Add a line, with its texts cut; it is in the file on return, whole unless the process was killed in between."""
    line = asdict(transcript)
    line["prompts"] = {agent: shortened(text, PROMPT_CHARS) for agent, text in transcript.prompts.items()}
    for said in line["arms"].values():
        said["answers"] = {agent: shortened(text, ANSWER_CHARS) for agent, text in said["answers"].items()}
    with path.open("a+b") as file:
        # A line that a killed process left half-written must not take this one with it.
        file.seek(max(file.seek(0, 2) - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def read_transcripts(path: Path) -> list[Transcript]:
    """Those of a file, in order; of a problem that was run twice the later. Empty where there is no file.

    Lines that are none, such as one that was cut off, are left out: nothing is computed from them.
    """
    found = {transcript.place: transcript for transcript in _lines(path)} if path.is_file() else {}
    return list(found.values())


def shortened(text: str, limit: int) -> str:
    """A text with its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


def _lines(path: Path) -> Iterator[Transcript]:
    for line in path.read_bytes().splitlines():
        try:
            value: dict[str, Any] = json.loads(line)
            arms = {str(arm): Said(**said) for arm, said in value.pop("arms").items()}
            yield Transcript(**value, arms=arms)
        except (ValueError, TypeError, AttributeError, KeyError):
            continue
