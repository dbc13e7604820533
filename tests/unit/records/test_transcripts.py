from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from anchorctx.records.transcripts import (
    ANSWER_CHARS,
    PROMPT_CHARS,
    Said,
    Transcript,
    append_transcript,
    read_transcripts,
    shortened,
)


def transcript(number: int = 0, answer: str = "4", prompt: str = "2+2?") -> Transcript:
    arms = {"dense": Said({"a": answer}, {"a": 0.0}, True), "rotate": Said({"a": "5\u2028\n"}, {"a": 0.5}, False)}
    return Transcript(model="m", task="t", kind="t", problem=number, problems="f", expected="4",
                      prompts={"a": prompt}, arms=arms)  # fmt: skip


def test_what_is_written_is_read_again_and_the_later_of_two_counts(tmp_path: Path) -> None:
    file = tmp_path / "transcripts.jsonl"
    assert read_transcripts(file) == []
    for one in (transcript(0), transcript(1), transcript(0, "four")):
        append_transcript(file, one)
    assert read_transcripts(file) == [transcript(0, "four"), transcript(1)]


def test_half_a_line_costs_no_other(tmp_path: Path) -> None:
    """At every byte where a process may be killed."""
    file = tmp_path / "transcripts.jsonl"
    append_transcript(file, transcript(0))
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        append_transcript(file, transcript(1))
        # A line that lacks nothing but its end counts.
        assert read_transcripts(file) == [transcript(0)] * (cut >= len(whole) - 1) + [transcript(1)], cut
    file.write_bytes(b'[1]\n{}\n"x"\n{"arms": {"dense": {}}}\n' + whole)
    assert read_transcripts(file) == [transcript(0)]


def test_long_texts_lose_their_middle(tmp_path: Path) -> None:
    file = tmp_path / "transcripts.jsonl"
    append_transcript(file, transcript(answer="ab" * ANSWER_CHARS, prompt="cd" * PROMPT_CHARS))
    (found,) = read_transcripts(file)
    said = found.arms["dense"].answers["a"]
    assert (
        said.startswith("abab") and said.endswith("abab") and f"[... {ANSWER_CHARS:,} characters left out ...]" in said
    )
    assert len(said) < ANSWER_CHARS + 50 and len(found.prompts["a"]) < PROMPT_CHARS + 50
    assert shortened("abc", 3) == "abc" and shortened("abcde", 4) == "ab [... 1 characters left out ...] de"
    lone = dataclasses.replace(transcript(), expected="\ud800")  # half a character, which UTF-8 does not have
    append_transcript(file, lone)
    assert json.loads(file.read_bytes().splitlines()[-1])["expected"] == "?"
