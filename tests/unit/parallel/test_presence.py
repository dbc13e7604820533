"""Two processes' presence, side by side in this one, with a store of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.distributed import TCPStore

from anchorctx.errors import LOST, InterruptedRun, LostProcesses, UserError
from anchorctx.parallel import presence
from anchorctx.parallel.dist import Ranks
from anchorctx.parallel.presence import Presence

BEAT, LIMIT = 0.05, 0.4


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, int]]:
    """Who has left, with what sentence and code, in place of leaving."""
    found: list[tuple[int, str, int]] = []

    def leave(self: Presence, sentence: str, code: int) -> None:
        if not self._closed.is_set():
            found.append((self._ranks.rank, sentence, code))
            raise RuntimeError("left")  # the end of its thread

    monkeypatch.setattr(Presence, "_leave", leave)
    return found


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, left: object) -> Iterator[tuple[Presence, Presence]]:
    for name, value in {"BEAT_S": BEAT, "SILENCE_S": 6 * BEAT, "GRACE_S": 2 * BEAT}.items():
        monkeypatch.setattr(presence, name, value)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    both = [Presence(Ranks(rank, 2, torch.device("cpu")), LIMIT, "run") for rank in (0, 1)]
    yield both[0], both[1]
    for one in both:
        one.close()


def wait(until: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_frozen_process_is_named_with_what_it_began_last(two: tuple[Presence, Presence], left: list) -> None:
    for one in two:
        one.begin("step 5")
    time.sleep(3 * BEAT)
    two[1].close()  # as a stopped process writes no more
    wait(lambda: left)
    ((rank, sentence, code),) = left
    assert (rank, code) == (0, LOST)
    assert sentence.startswith("rank 0 waits at step 5, since ")
    assert "for rank 1 (pid " in sentence and "which does not answer any more and began step 5 last: see to" in sentence


def test_a_process_that_stays_behind_is_named(two: tuple[Presence, Presence], left: list) -> None:
    for one in two:
        one.begin("step 5")
    two[0].begin("the checkpoint of step 5")
    wait(lambda: left)
    first = left[0]
    assert first[0] == 0 and "rank 1 (pid " in first[1] and "which is still at step 5: see to" in first[1]


def test_long_work_of_all_is_not_waiting(two: tuple[Presence, Presence], left: list) -> None:
    """A step that takes longer than the limit: nobody is behind, all live."""
    time.sleep(LIMIT + 10 * BEAT)
    two[0].begin("step 1")  # a little ahead, while the other is looked at
    time.sleep(LIMIT / 2)
    two[1].begin("step 1")
    time.sleep(LIMIT)
    assert not left


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no such file"), 2), (OSError(28, "full"), 1), (InterruptedRun("ended", 143), 143)]
)
def test_a_process_that_waits_ends_as_the_one_that_failed(
    two: tuple[Presence, Presence], left: list, error: BaseException, code: int
) -> None:
    assert two[1].told(error) is error
    wait(lambda: left)
    assert left == [(0, "", code)]


def test_a_closed_connection_is_told_as_what_closed_it(two: tuple[Presence, Presence], left: list) -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    two[1].told(UserError("its disk is full"))
    error = two[0].told(closed)
    assert isinstance(error, LostProcesses) and error.code == 2 and str(error) == "rank 1 has ended, and said why"


def test_a_process_that_was_killed_is_named(two: tuple[Presence, Presence], left: list) -> None:
    two[1].close()  # it writes no more
    error = two[0].told(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
    assert isinstance(error, LostProcesses) and error.code == LOST
    assert "for rank 1 (pid " in str(error) and "does not answer any more and began loading last" in str(error)


def test_an_error_of_ones_own_is_no_lost_connection(two: tuple[Presence, Presence]) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert two[0].told(error) is error
