"""JSON that is not as it was written: each fault is a sentence that names the file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.records.manifest import write_json
from anchorctx.records.typed import read_fields, read_typed


@dataclass
class Part:
    bytes: int


@dataclass
class Whole:
    name: str
    parts: dict[str, Part]
    note: str | None = None


GOOD = {"name": "a", "parts": {"x": {"bytes": 3}}, "more": [1, 2]}


def test_a_file_of_the_form_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", GOOD)
    assert read_typed(tmp_path / "f.json", Whole, "") == Whole("a", {"x": Part(3)})
    assert read_fields(tmp_path / "f.json", Whole, "") == GOOD  # with what the form does not ask for
    with pytest.raises(FileNotFoundError):
        read_typed(tmp_path / "none.json", Whole, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Invalid JSON: EOF"),
        (b'{"name": "a"', "Invalid JSON: EOF"),
        (b'{"name": "\xff\xfe", "parts": {}}', "Invalid JSON: invalid unicode"),
        (b"\0" * 100, "Invalid JSON: expected value"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b"[]", "Input should be an object"),
        (b"null", "Input should be an object"),
        (b'{"parts": {}}', "name: Field required"),
        (b'{"name": 1, "parts": {}}', "name: Input should be a valid string"),
        (b'{"name": "a", "parts": {"x": {"bytes": "3"}}}', "parts.x.bytes: Input should be a valid integer"),
        (b'{"name": "a", "parts": {"x": {"bytes": true}}}', "parts.x.bytes: Input should be a valid integer"),
        (b'{"name": "a", "parts": {"x": {"bytes": 3.5}}}', "parts.x.bytes: Input should be a valid integer"),
        (b'{"name": "a", "parts": []}', "parts: Input should be an object"),
    ],
)
def test_anything_else_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    for read in (read_typed, read_fields):
        with pytest.raises(UserError) as error:
            read(path, Whole, "make it again")
        text = str(error.value)
        assert text.startswith(f"{path} is not of the form that anchorctx writes ({reason}")
        assert text.endswith("): make it again") and "\n" not in text and len(text) < len(str(path)) + 200


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_not_opened(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "f.json")
    with pytest.raises(UserError, match="f.json is no regular file: make it again"):
        read_typed(tmp_path / "f.json", Whole, "make it again")
