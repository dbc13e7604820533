"""Two processes: one runs a program that is not trusted, the other, the judge, its tests.

The judge reads its job only after it has made the program's process, whose memory therefore holds neither the tests nor
the nonce. They talk in frames over two pipes: eight bytes of length, then JSON.

    program -> judge: "confined", then "loaded" or "failed"
    judge -> program: the program, then arguments, one frame a call
    program -> judge: ["value", result] or ["error", class]
"""

from __future__ import annotations

import builtins
import json
import math
import os
import signal
import sys
from typing import Any, NoReturn

import confine
import values

NOT_CONFINED, NOT_PLAIN = 97, 98
FRAME = 2**26
"""Bytes of a frame, at most."""


class ProgramEnded(BaseException):
    """The program's process is gone, or says what is no reply."""


class NotPlain(BaseException):
    """A test's argument cannot be sent."""


def send(descriptor: int, content: Any) -> None:
    """Write one frame."""
    data = json.dumps(content).encode()
    left = memoryview(len(data).to_bytes(8, "big") + data)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int) -> Any:
    """Read one frame; ProgramEnded where there is none."""
    length = int.from_bytes(_read(descriptor, 8), "big")
    if length > FRAME:
        raise ProgramEnded
    return json.loads(_read(descriptor, length))


def _read(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            raise ProgramEnded
        data += part
    return bytes(data)


# -- the program's process --------------------------------------------------------------------------------------------


def serve(calls: int, replies: int) -> NoReturn:
    """Run the program, then its function once a call; never returns to the judge's code."""
    settings = receive(calls)
    if not confine.confine(settings["limits"], settings["unsafe"]):
        os._exit(NOT_CONFINED)
    send(replies, "confined")
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(receive(calls), "<program>", "exec"), space)
        send(replies, "loaded")
        while True:
            arguments, keywords = values.unpack(receive(calls))
            try:
                reply = ["value", values.pack(space[settings["entry_point"]](*arguments, **keywords))]
            except Exception as error:
                reply = ["error", type(error).__name__]
            send(replies, reply)
    finally:
        os._exit(1)  # also for SystemExit and the like: no way out of here leads on


# -- the judge --------------------------------------------------------------------------------------------------------


class Remote:
    """The program's function."""

    def __init__(self, calls: int, replies: int) -> None:
        self._calls, self._replies = calls, replies

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it there; a class of exception that Python has is raised here too."""
        try:
            call = values.pack((arguments, keywords))
        except TypeError:
            raise NotPlain from None
        send(self._calls, call)
        kind, content = receive(self._replies)
        if kind == "value":
            return values.unpack(content)
        error = getattr(builtins, str(content), None)
        # A StopIteration would end a loop of the tests as if all was well.
        if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, StopIteration):
            raise error("in the program")
        raise RuntimeError("in the program")


def judge(job: dict[str, Any], calls: int, replies: int, report: int) -> int:
    """Run the tests on the program; writes the nonce after they passed. Returns the exit status."""
    limits, unsafe = job["limits"], job["unsafe"]
    signal.alarm(math.ceil(limits["wall_seconds"]) + 1)  # also where the evaluation is gone
    send(calls, {"limits": limits, "unsafe": unsafe, "entry_point": job["entry_point"]})
    try:
        if receive(replies) != "confined" or not confine.confine(limits, unsafe):
            return NOT_CONFINED
    except ProgramEnded:
        return NOT_CONFINED
    if os.getppid() != job["evaluation"]:
        return 1  # killed before this process had asked to end with it
    try:
        send(calls, job["program"])
        if receive(replies) != "loaded":
            return 1
        space: dict[str, Any] = {"__name__": "tests"}
        # `pass` makes the prompt's signature a valid function; its imports and helpers are the tests' too.
        exec(compile(f"{job['prompt']}\n    pass\n", "<prompt>", "exec"), space)
        space[job["entry_point"]] = function = Remote(calls, replies)
        exec(compile(job["test"], "<tests>", "exec"), space)
        space["check"](function)
    except NotPlain:
        return NOT_PLAIN
    except BaseException:
        return 1
    os.write(report, job["nonce"].encode())
    return 0


def main() -> NoReturn:
    """Part in two, which keep only the descriptors that they need."""
    sys.path.pop(0)  # this folder
    sys.argv = [""]
    sys.set_int_max_str_digits(0)
    confine.own_processes()
    program_calls, calls = os.pipe()
    replies, program_replies = os.pipe()
    nothing, report = os.open(os.devnull, os.O_RDWR), os.dup(1)
    if os.fork() == 0:
        try:
            _keep(nothing, program_calls, program_replies)
            serve(program_calls, program_replies)
        finally:
            os._exit(1)
    job = json.loads(sys.stdin.buffer.read())
    _keep(nothing, calls, replies, report)
    os._exit(judge(job, calls, replies, report))


def _keep(nothing: int, *kept: int) -> None:
    """Close all descriptors but these, and point the standard ones to nothing.

    This process began with the standard ones alone: all others are the few that `main` opened.
    """
    for standard in range(3):
        os.dup2(nothing, standard)
    low = 3
    for descriptor in (*sorted(kept), 256):
        os.closerange(low, descriptor)
        low = descriptor + 1


if __name__ == "__main__":
    main()
