"""Commands in forks of a process that has imported everything: a command line costs 30 ms instead of five seconds."""

from __future__ import annotations

import gc
import importlib
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TRACEBACK = "Traceback (most recent call last)"
MODULES = (
    "torch transformers pyarrow.parquet hydra pydantic anchorctx.cli.commands anchorctx.train.loop "
    "anchorctx.train.export anchorctx.evals.runner anchorctx.data.prepare anchorctx.report.page deepspeed"
)
"""What the commands import, in one process for all."""
MEMORY = 12 * 2**30
"""Bytes of address space of a command: a bomb ends it and not the machine. torch alone takes 3 GiB."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a command."""

    code: int
    """Exit code; -9 after SIGKILL."""
    text: str
    """Its output and errors."""
    seconds: float
    hung: bool
    """It had not ended at its limit."""
    peak: int = 0
    """Most bytes of memory that it had at once, the 0.7 GiB that it shares with all forks included."""

    @property
    def traceback(self) -> bool:
        """Whether it showed the user a traceback."""
        return TRACEBACK in self.text

    @property
    def sentence(self) -> bool:
        """Whether it refused in a sentence: code 2, `anchorctx COMMAND: ...`, no traceback."""
        return self.code == 2 and not self.traceback and "\nanchorctx " in f"\n{self.text}"

    @property
    def last(self) -> str:
        """The error behind a traceback, else the last line that says something."""
        errors = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt|Warning)\b.*", self.text, re.MULTILINE)
        lines = [line for line in self.text.splitlines() if line.strip()]
        return (errors or lines or [""])[-1][:200]


def load_everything() -> None:
    """Import what the commands import. Threads must not exist before a fork: torch starts none with one."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "0",
    }
    for name in MODULES.split():
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy every page


def run(
    words: Sequence[str],
    folder: Path,
    *,
    limit: float = 240,
    after: tuple[float, int] | None = None,
    inside: Callable[[], None] | None = None,
) -> Ended:
    """Run `anchorctx WORDS` in `folder`.

    Args:
        words: the command line.
        folder: working directory.
        limit: seconds until it counts as hanging, and is killed.
        after: seconds from the start until this signal is sent to it.
        inside: called in its process before the command.
    """
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _command(words, folder, output.fileno(), inside)
        code, hung, peak = _wait(pid, began, limit, after)
        seconds = time.monotonic() - began
        output.seek(0)
        return Ended(code, output.read(2**20).decode(errors="replace"), seconds, hung, peak)


def _command(words: Sequence[str], folder: Path, output: int, inside: Callable[[], None] | None) -> None:
    """The forked process; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if inside is not None:
            inside()
        from anchorctx.cli.main import main

        code = main(list(words))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, began: float, limit: float, after: tuple[float, int] | None) -> tuple[int, bool, int]:
    """Exit code of the process, whether it had to be killed at its limit, and its peak memory in bytes."""
    hung = False
    while True:
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), hung, used.ru_maxrss * 1024
        passed = time.monotonic() - began
        if after is not None and passed >= after[0]:
            os.kill(pid, after[1])
            after = None
        if passed >= limit and not hung:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
