"""What a unit of an evaluation has given so far, so that one that was cut off goes on behind its last part.

A part is JSON of the evaluation's own making. It is on disk before the next one is begun, and the file goes once the
unit's rows are written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anchorctx.records.files import append_bytes

FOLDER = "parts"


class Parts:
    """The parts of one unit that are done, in order; without a file, in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.done: list[Any] = _read(path) if path is not None and path.is_file() else []

    def add(self, part: Any) -> None:
        """Keep one more."""
        self.done.append(part)
        if self._path is None:
            return
        self._path.parent.mkdir(exist_ok=True)
        append_bytes(self._path, json.dumps(part).encode() + b"\n")

    def remove(self) -> None:
        """The unit is done: its file goes, and the folder with the last one."""
        if self._path is None or not self._path.is_file():
            return
        self._path.unlink()
        if not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()


def _read(path: Path) -> list[Any]:
    """Whole lines; one that a crash left unfinished is cut off, since others will be written behind it."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
