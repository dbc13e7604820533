"""Requests to end: the first ends the work where it stands, or is noted; the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anchorctx import interrupt
from anchorctx.cli import commands
from anchorctx.cli.main import main
from anchorctx.errors import InterruptedRun, LostProcesses, UserError


def tell(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_ends_the_work_where_it_stands(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRun) as told, interrupt.listening():
        tell(number)
        raise AssertionError("went on")
    assert told.value.code == 128 + number and str(told.value) == f"ended by {number.name}"
    assert signal.getsignal(number) is before and not interrupt.requested()


def test_work_that_looks_for_requests_goes_on() -> None:
    with interrupt.listening():
        interrupt.defer()
        assert interrupt.requested() == 0
        tell(signal.SIGUSR1)
        tell(signal.SIGTERM)  # so soon that it is the same request on another way
        assert interrupt.requested() == 138


def test_a_block_that_must_be_whole_is_finished_first() -> None:
    done = False
    with pytest.raises(InterruptedRun), interrupt.listening():
        with interrupt.deferred():
            tell(signal.SIGINT)
            done = True
        raise AssertionError("went on")
    assert done


def test_what_is_ignored_stays_ignored() -> None:
    """nohup, and SIGINT of a script's background jobs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening():
            tell(signal.SIGHUP)
            assert not interrupt.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_limit_of_time_is_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with interrupt.listening():
        interrupt.limit(None)
        clock[0] += 1e9
        assert interrupt.requested() == 0
        interrupt.limit(0.5)
        clock[0] += 1799
        assert interrupt.requested() == 0
        clock[0] += 1
        assert interrupt.requested() == 124 and interrupt.reason(124) == "ended by max_hours"


@contextmanager
def child(code: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready."""
    whole = f"import os, signal, sys, time\nfrom anchorctx import interrupt\n{code}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", whole], **streams, **options) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process


def test_a_second_signal_ends_a_process_that_hears_nothing() -> None:
    """Its main thread takes no signal, as in a collective, where Python calls no handler."""
    code = (
        "interrupt.ONE_REQUEST_S = 1.0\n"
        "with interrupt.listening():\n"
        "    interrupt.defer()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, interrupt.SIGNALS)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with child(code) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # of torchrun, beside SLURM's
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.send_signal(signal.SIGINT)
        assert "left at once, at a second signal (SIGINT)" in process.communicate(timeout=10)[1]
    assert process.returncode == 143  # what it was told first


def test_a_forked_child_is_told_for_itself() -> None:
    """As multiprocessing's pools in other libraries end theirs."""
    with interrupt.listening():
        interrupt.defer()
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
        time.sleep(0.05)
        assert not interrupt.requested()


GRANDCHILD = (
    "import subprocess\n"
    "inner = '''import time\n"
    "from anchorctx import interrupt\n"
    "interrupt.end_with_launcher()\n"
    "print(1, flush=True)\n"
    "time.sleep(60)'''\n"
    "started = subprocess.Popen([sys.executable, '-c', inner], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
    "started.stdout.readline()\n"
    "print('ready', flush=True)\n"
    "print(started.pid, flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.mark.parametrize(
    ("environment", "ends"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, True),  # torchrun
        ({"CROSS_RANK": "0", "RANK": "0"}, True),  # DeepSpeed's launcher
        ({"RANK": "0"}, False),  # a shell that gave it its rank
        ({}, False),
    ],
)
def test_a_worker_ends_with_its_launcher_and_nobody_with_its_shell(environment: dict[str, str], ends: bool) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "TORCHELASTIC_RUN_ID")}
    with child(GRANDCHILD, env=kept | environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + (5 if ends else 0.3)
    while (alive := is_alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive is not ends
    if alive:
        os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_whose_launcher_is_gone_at_its_start_ends_too() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", interrupt.LAUNCHER: str(gone.pid)}
    code = "from anchorctx import interrupt; interrupt.end_with_launcher()"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 137


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("eval", "what was measured is kept, type the same command to go on"),
        ("prepare", "what was tokenised is kept, type the same command to go on"),
        ("train", "before training began, so that nothing is lost: type the same command again"),
        ("report", "type the same command again"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_command_says_how_to_go_on(
    command: str, how: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(commands, "run", lambda *_: tell(signal.SIGUSR1))
    assert main([command]) == 138
    assert capsys.readouterr().err == ("" if rank == "1" else f"anchorctx {command}: ended by SIGUSR1: {how}\n")


@pytest.mark.parametrize("deferred", [False, True])
def test_a_mistake_of_another_process_is_not_told_again(
    deferred: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends the processes that wait for the first to say what all have met."""

    def run(*_: object) -> int:
        if deferred:
            interrupt.defer()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise LostProcesses("rank 0 has ended", 2, told=True)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(commands, "run", run)
    began = time.monotonic()
    assert main(["train"]) == (2 if deferred else 143)
    assert time.monotonic() - began < 2 and not capsys.readouterr().err


@pytest.mark.parametrize("made", [UserError, RuntimeError])
def test_a_library_that_makes_its_own_error_of_the_end_does_not_hide_it(
    made: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pydantic's compiled code does while a signal arrives, and our reading of models, which takes any error."""

    def run(*_: Any) -> int:
        try:
            tell(signal.SIGTERM)
        except InterruptedRun as error:
            raise made("Error building validator") from error
        return 0

    monkeypatch.setattr(commands, "run", run)
    assert main(["eval"]) == 143
    said = capsys.readouterr().err
    assert "ended by SIGTERM" in said and "Error building" not in said


def test_an_error_of_nobodys_request_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> int:
        raise RuntimeError("a fault")

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["eval"])
