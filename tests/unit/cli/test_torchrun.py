"""Our torchrun: silent after what was told, torchrun's own words after anything else. Its processes are stand-ins."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Callable

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from anchorctx.cli import torchrun


def ending(monkeypatch: pytest.MonkeyPatch, *codes: int) -> Callable[[], int]:
    """Our torchrun with processes of these exit codes, in the order in which they end; it warns of the first."""

    def main(_: list[str] | None) -> None:
        logging.getLogger(torchrun.AGENT).error("failed (exitcode: %s)", codes[0])
        failures = {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in enumerate(codes) if code}
        for rank, failure in failures.items():
            failure.timestamp = rank
        if failures:
            raise ChildFailedError("anchorctx", failures)

    monkeypatch.setattr(run, "main", main)
    return torchrun.main


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        *[((2, 2), 2), ((2, -signal.SIGTERM), 2), ((143, 143), 143), ((143, -signal.SIGTERM), 143)],
        ((2, 143), 2),  # torchrun told the second to end
        *[((code, code), code) for code in (124, 129, 130, 138)],
        ((3, -signal.SIGKILL), 3),  # the second was frozen
    ],
)
def test_after_what_a_process_told_there_is_silence(
    codes: tuple[int, ...], told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ending(monkeypatch, *codes)() == told
    assert not caplog.records


@pytest.mark.parametrize("codes", [(1, 2), (2, 1), (-signal.SIGKILL, 3), (2, -signal.SIGSEGV), (143, 1)])
def test_everything_else_is_told_as_torchrun_tells_it(
    codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ChildFailedError):
        ending(monkeypatch, *codes)()
    assert caplog.messages == [f"failed (exitcode: {codes[0]})"]


def test_a_job_that_is_told_to_end_ends_as_that(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def main(_: list[str] | None) -> None:
        logging.getLogger(torchrun.SHUTDOWN).warning("Received a death signal")
        raise SignalException("told to end", signal.SIGUSR1)

    monkeypatch.setattr(run, "main", main)
    assert torchrun.main() == 138
    assert not caplog.records


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> argparse.Namespace:
    """What torchrun makes of our command line."""
    found: list[list[str]] = []
    monkeypatch.setattr(run, "main", found.append)
    assert torchrun.main([*argv, "train.py"]) == 0
    return run.parse_args(found[0])


def test_signals_are_handed_on_and_there_is_time_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(monkeypatch)
    assert arguments.signals_to_handle == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGHUP"
    assert arguments.shutdown_timeout == torchrun.PATIENCE_S
    arguments = parsed(monkeypatch, "--shutdown-timeout", "5", "--signals-to-handle=SIGTERM")
    assert (arguments.shutdown_timeout, arguments.signals_to_handle) == (5, "SIGTERM")


def test_under_nohup_the_terminal_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert parsed(monkeypatch).signals_to_handle == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"
    finally:
        signal.signal(signal.SIGHUP, before)
