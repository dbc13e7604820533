"""Our torchrun: silent after what was told, torchrun's own words after anything else. Its processes are stand-ins."""

from __future__ import annotations

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
    ("codes", "told"), [((2, 2), 2), ((2, -signal.SIGTERM), 2), ((143, 143), 143), ((143, -signal.SIGTERM), 143)]
)
def test_after_what_a_process_told_there_is_silence(
    codes: tuple[int, ...], told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ending(monkeypatch, *codes)() == told
    assert not caplog.records


@pytest.mark.parametrize("codes", [(1, 2), (2, 1), (-signal.SIGKILL, -signal.SIGTERM), (2, -signal.SIGSEGV)])
def test_everything_else_is_told_as_torchrun_tells_it(
    codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ChildFailedError):
        ending(monkeypatch, *codes)()
    assert caplog.messages == [f"failed (exitcode: {codes[0]})"]


def test_a_job_that_is_told_to_end_ends_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: list[str] | None) -> None:
        raise SignalException("told to end", signal.SIGTERM)

    monkeypatch.setattr(run, "main", main)
    assert torchrun.main() == 143
