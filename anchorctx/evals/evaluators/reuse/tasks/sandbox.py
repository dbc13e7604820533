"""Running code that a model wrote: a subprocess with limits on CPU, wall time, memory and files, and no network.

The child (`sandbox_child.py`) puts limits on itself before it runs the code: rlimits, and on Linux a seccomp filter
that refuses sockets, other programs, new processes and everything that changes a file. It starts in an empty folder
with an empty environment. Reading files is not prevented. Where the filter cannot be set, nothing is run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import Limits

CHILD = Path(__file__).with_name("sandbox_child.py")
DONE = b"anchorctx: the program ended normally\n"
"""Written by the child after a program that ran to its end; a program that exits early has not passed."""
NO_FILTER = 97
"""The child's exit status when it could not protect the machine."""


def passes(program: str, limits: Limits) -> bool:
    """Whether the program runs to its end without an exception; UserError where it cannot be run safely."""
    with tempfile.TemporaryDirectory(prefix="anchorctx-sandbox-") as folder:
        read, write = os.pipe()
        settings = [f"{name}={value}" for name, value in asdict(limits).items()] + [f"report={write}"]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)  # only the child has it now: reading ends when the child does
        try:
            process.communicate(program.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            # The child leads a process group of its own (start_new_session), which ends with it.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        with os.fdopen(read, "rb") as report:
            said = report.read(len(DONE) + 1)  # one byte more, so that nothing may follow the mark
    if process.returncode == NO_FILTER:
        raise UserError(
            "generated code cannot be run safely here: it needs Linux on x86-64 or aarch64 with seccomp; leave "
            "humaneval out of tasks"
        )
    return process.returncode == 0 and said == DONE
