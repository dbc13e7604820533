"""Standard streams that are closed, or that take nothing more: a command does its work without them."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


def mend_streams() -> None:
    """Open what is closed of the three on /dev/null, and let nothing that stderr does not take end the command. A sign
    that the terminal's encoding lacks is escaped."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # the next file would be opened under this number, and get what is printed
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)
            if descriptor != number:
                os.close(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _Lossy):
        sys.stderr = _Lossy(sys.stderr)


def drop_output() -> None:
    """What standard output, which may be a file on a full disk, does not take is not tried again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lossy:
    """A stream that forgets what does not fit: a log on a full disk must not end a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of the text, or nothing."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As far as it goes."""
        with suppress(OSError):
            self._stream.flush()
