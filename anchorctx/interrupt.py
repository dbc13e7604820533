"""Being told to end, by a signal or by a limit of time, and ending with the process that started this one.

The first signal ends the work where it stands, with `InterruptedRun`, unless that is put off: training finishes its
step, a file of results its rows. A second one, two seconds later or more, ends the process at once. What comes sooner
is the same request on another way: SLURM tells every process of a job, and torchrun tells its workers again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anchorctx.errors import InterruptedRun

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGUSR1 is what SLURM's users ask for as an early warning. Whatever is ignored at the start, as SIGHUP under nohup,
stays ignored."""
OUT_OF_TIME = 124
"""Exit code after `max_hours`, as that of timeout(1); after a signal it is 128 and the signal's number."""
EXIT_CODES = (OUT_OF_TIME, *(128 + number for number in SIGNALS))
ONE_REQUEST_S = 2.0
"""Seconds within which further signals belong to the first."""
LAUNCHER = "ANCHORCTX_LAUNCHER"
"""Environment variable in which our torchrun tells its workers its process id."""
PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _State:
    code: int = 0
    """The exit code of the first request."""
    deadline: float = float("inf")
    """Of `time.monotonic`."""
    deferrals: int = 0
    raised: bool = False
    bell: int = -1
    """The pipe through which signals reach the thread that counts them; -1 while nobody listens."""


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests to end while the block lasts; nothing within another such block or another thread."""
    global _state
    if _state.bell >= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    read, bell = os.pipe()
    os.set_blocking(bell, False)
    _state = _State(bell=bell)
    # The main thread may be in a collective for half an hour, and Python calls no handler meanwhile: a thread counts.
    threading.Thread(target=_count, args=(read, _state), name="signals", daemon=True).start()
    others = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _state.deferrals += 1
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(others)
        _state = _State()
        os.close(bell)


@contextmanager
def deferred() -> Iterator[None]:
    """Let the block finish before a request ends the work."""
    _state.deferrals += 1
    try:
        yield
    finally:
        _state.deferrals -= 1
    if _state.code and not _state.deferrals:
        _end()


def defer() -> None:
    """From now on only note requests: the work looks for `requested` and ends by itself."""
    _state.deferrals += 1


def limit(hours: float | None) -> None:
    """Count as a request that so many hours have passed from now on; None is no limit."""
    _state.deadline = float("inf") if hours is None else time.monotonic() + 3600 * hours


def requested() -> int:
    """The exit code with which to end, 0 while nobody has asked for it."""
    if not _state.code and time.monotonic() >= _state.deadline:
        _state.code = OUT_OF_TIME
    return _state.code


def swallowed() -> InterruptedRun | None:
    """The end that was asked for at once, where a library made an error of its own of it; None where nobody asked.

    pydantic's compiled code, for one, raises a SchemaError in its place.
    """
    return InterruptedRun(reason(_state.code), _state.code) if _state.code and not _state.deferrals else None


def reason(code: int) -> str:
    """What such an exit code says: `ended by SIGTERM`."""
    return f"ended by {'max_hours' if code == OUT_OF_TIME else signal.Signals(code - 128).name}"


def end_with_parent() -> None:
    """Let the kernel kill this process as soon as the one that started it is gone, however that ended (on Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """`end_with_parent` for workers of torchrun and of DeepSpeed's launcher, which would train on by themselves.

    A process that a shell started goes on without it, as under nohup.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and not {"RANK", "CROSS_RANK"} <= os.environ.keys():
        return
    end_with_parent()
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and not os.path.exists(f"/proc/{launcher}") and os.path.exists("/proc/self"):
        os._exit(128 + signal.SIGKILL)  # gone before the kernel was asked


def ignore_all() -> None:
    """For a process of a pool: the one that started it is told to end, and ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _on_signal(number: int, _: Any) -> None:
    # asyncio, in some libraries, takes the descriptor for its own loop and leaves none behind
    if signal.set_wakeup_fd(_state.bell, warn_on_full_buffer=False) != _state.bell:
        os.write(_state.bell, bytes([number]))
    _state.code = _state.code or 128 + number
    if not _state.deferrals:
        _end()


def _end() -> None:
    if not _state.raised:
        _state.raised = True
        raise InterruptedRun(reason(_state.code), _state.code)


def _count(read: int, state: _State) -> None:
    """Leave at the second request; ends when the pipe is closed."""
    first = float("inf")
    while numbers := os.read(read, 64):
        for number in (number for number in numbers if number in SIGNALS):
            first, now = min(first, time.monotonic()), time.monotonic()
            state.code = state.code or 128 + number
            if now - first >= ONE_REQUEST_S:
                os.write(2, f"\nleft at once, at a second signal ({signal.Signals(number).name})\n".encode())
                os._exit(state.code)
    os.close(read)


def _forget() -> None:
    """In a forked child, which shares the pipe: what it is told concerns it alone."""
    global _state
    if _state.bell >= 0:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _on_signal:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
        _state = _State()


os.register_at_fork(after_in_child=_forget)
