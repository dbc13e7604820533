"""Whether a program that a model wrote passes its tests, told by a process that the program cannot reach.

What the program may want, and what stands against it:

1. A pass without solving the task. In one interpreter nothing is safe from it: whatever may be done once the tests have
   passed, it can do before. So the tests run in another process, the judge, which calls the program's function through
   a pipe. Only plain values come back (numbers, strings, lists, ...: no object whose `__eq__` is always true), and the
   program sees neither the tests nor the descriptor and the nonce with which the judge reports.
2. Harm to this machine, or to the judge. A list of system calls allows what Python needs to compute and to import:
   memory, reading files, writing to descriptors that are open already; no sockets, processes, threads, signals, mounts,
   shared memory, nor opening for writing. Landlock, where the kernel has it, leaves the programs' folders readable, and
   neither home folders nor /proc. No privileges: as root another uid, no capabilities, a PID namespace.
3. To hold up the evaluation. Limits on CPU, memory and time; any exit status or signal is its own failure alone.

What it can do: use its time and memory, and read programs' folders (without Landlock, whatever its user may read), of
which nothing gets out but one bit. Weak tests stay weak: a program that knows the expected answers passes.

A list of calls that is put into BPF by hand works without root and without further packages; bubblewrap and nsjail are
rarely installed, and need user namespaces, which many machines forbid.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import Limits

CHILD = Path(__file__).with_name("child")
NOT_CONFINED, NOT_PLAIN = 97, 98
"""The judge's exit statuses where the processes could not be confined, and where a test's argument is no plain
value."""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""For programs that import numpy, whose threads cannot be made here."""


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """What the tests need."""

    prompt: str
    """Imports, signature and docstring."""
    test: str
    """Defines `check(candidate)`."""
    entry_point: str
    """The function's name."""


def passes(program: str, problem: CodeProblem, limits: Limits, *, unsafe: bool = False) -> bool:
    """Whether the program's function passes the tests; UserError where it cannot be run safely.

    Args:
        program: Python that defines `problem.entry_point`. Arguments reach it, and results come back, as copies, so
            that a test does not see what it changes in place.
        problem: the prompt, which the tests may take helpers from, and the tests. They run confined as well.
        limits: of the program, and of the tests.
        unsafe: limits alone; the program may do what this user may.
    """
    nonce = secrets.token_hex(16)
    job = {**asdict(problem), "program": program, "nonce": nonce, "limits": asdict(limits), "unsafe": unsafe}
    job["evaluation"] = os.getpid()
    with tempfile.TemporaryDirectory(prefix="anchorctx-sandbox-") as folder:
        os.chmod(folder, 0o555)  # the program may have another uid, and finds an empty folder
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(job).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            said = _end(process)
        except BaseException:  # the evaluation itself is asked to end
            _end(process)
            raise
    if process.returncode == NOT_CONFINED:
        raise UserError(
            "generated code cannot be confined here, which needs Linux on x86-64 or aarch64 with seccomp (some "
            "containers forbid it): leave humaneval out of tasks, or set unsafe_code_execution=true to run it with "
            "limits on time and memory alone"
        )
    if process.returncode == NOT_PLAIN:
        raise UserError(
            f"the tests of {problem.entry_point} give it more than plain values (numbers, strings, lists, ...), which "
            "cannot be handed to another process: leave the problem out"
        )
    return process.returncode == 0 and said == nonce.encode()


def check_sandbox(limits: Limits, *, unsafe: bool = False) -> None:
    """Raise UserError where a right program would not pass here, before it counts as a model's failure."""
    example = CodeProblem("def f(x):\n", "def check(f):\n    assert f([1, 2]) == (2, 1)\n", "f")
    if not passes("import decimal, heapq\ndef f(x): return tuple(reversed(x))", example, limits, unsafe=unsafe):
        raise UserError(
            f"a right program of two lines fails within sandbox.cpu_seconds={limits.cpu_seconds}, sandbox.wall_seconds="
            f"{limits.wall_seconds} and sandbox.memory_bytes={limits.memory_bytes}: raise them"
        )


def _end(process: subprocess.Popen[bytes]) -> bytes:
    """Kill the judge, which leads a process group of its own, and its program; returns what the judge still said."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]
