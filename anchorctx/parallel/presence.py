"""What each process of a training job does, where the others can read it, and the end of all when one has ended.

A process that is frozen or gone leaves the others in a collective, which ends after half an hour in the traceback of a
library, or, on CUDA, aborts. So each process writes into the job's store every two seconds that it lives and what it
began last, and one that fails writes that. A thread reads it, since the main one may be the one that waits.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as torch_dist

from anchorctx.errors import LOST, InterruptedRun, LostProcesses, UserError
from anchorctx.parallel.dist import Ranks

BEAT_S = 2.0
"""Seconds between two signs of life; a store of 1,000 processes gets 500 a second, of 100 bytes."""
SILENCE_S = 10.0
"""A process without a sign of life for so long is frozen or gone, where others wait for it beyond their limit."""
GRACE_S = 15.0
"""Seconds to end by itself after another process has failed, which most notice as their connection closes. Its
traceback and its end take their time, and torchrun takes the first to end for the one that failed."""
MARGIN_S = 30.0
"""By how much the collectives' own limit is beyond ours, so that the sentence comes first."""
SHOWN = 8
"""Processes that a sentence names at most."""
CONNECTION = re.compile(r"gloo|NCCL|Connection closed by peer|Connection reset by peer|Timed out waiting")
"""What torch says, in a RuntimeError, where a collective fails for want of another process."""

_starts = 0
_present: Presence | None = None


@contextmanager
def presence(ranks: Ranks, timeout_s: float) -> Iterator[None]:
    """Watch the other processes while the block lasts, and let them know how it ended here.

    Raises:
        LostProcesses: in place of a collective's error, where others have failed or do not answer.
    """
    global _present, _starts
    _starts += 1
    if ranks.world == 1:
        yield
        return
    _present = Presence(ranks, timeout_s, f"anchorctx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_starts}")
    try:
        yield
    except (Exception, InterruptedRun) as error:
        if (verdict := _present.told(error)) is error:
            raise
        raise verdict from error
    finally:
        _present.close()
        _present = None


def begin(what: str) -> None:
    """Note what this process does next, such as `step 5`; the same on every process, and in the same order."""
    if _present is not None:
        _present.begin(what)


class Presence:
    """This process's entry in the store, and the thread that writes it and reads the others'."""

    def __init__(self, ranks: Ranks, timeout_s: float, prefix: str) -> None:
        self._ranks, self._timeout, self._prefix = ranks, timeout_s, prefix
        self._place = f"pid {os.getpid()} on {socket.gethostname()}"
        self._count, self._what, self._since = 0, "loading", time.monotonic()
        # a connection of its own: that of the process group is taken as long as somebody waits at it
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = datetime.timedelta(seconds=30)
        self._store: Any = torch_dist.TCPStore(address, port, is_master=False, timeout=patience)
        self._beat = 0
        self._write()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="presence", daemon=True)
        self._thread.start()

    def begin(self, what: str) -> None:
        """Note what is done next, and write it down, which waits for no answer (some 20 microseconds)."""
        self._count, self._what, self._since = self._count + 1, what, time.monotonic()
        if self._thread.is_alive():  # it ends where the store is gone
            with suppress(RuntimeError):
                self._write()

    def close(self) -> None:
        """Nobody is watched any more."""
        self._closed.set()
        self._thread.join(BEAT_S)

    def told(self, error: BaseException) -> BaseException:
        """The error with which this process ends, after the others were told of it or have told theirs."""
        if isinstance(error, RuntimeError) and CONNECTION.search(str(error)):
            try:
                return self._lost(error)
            except RuntimeError:  # the store is gone as well
                return LostProcesses(self._nobody(error))
        code = error.code if isinstance(error, InterruptedRun) else 2 if isinstance(error, UserError) else 1
        self._fail(code)
        return error

    def _lost(self, error: RuntimeError) -> LostProcesses:
        """In place of a collective's error: what ended it."""
        deadline = time.monotonic() + BEAT_S
        while (failure := self._failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if failure is None:
            missing = self._missing()
            if self._fail(LOST):
                return LostProcesses(self._sentence(missing) if missing else self._nobody(error))
            failure = self._failure() or {"rank": -1, "code": LOST}
        return LostProcesses(f"rank {failure['rank']} has ended, and said why", failure["code"], told=True)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while not self._closed.wait(BEAT_S):
                self._write()
                if (failure := self._failure()) is not None and failure["rank"] != self._ranks.rank:
                    self._closed.wait(GRACE_S)
                    self._leave("", failure["code"])
                if time.monotonic() - self._since > self._timeout and (missing := self._missing()):
                    self._leave(self._sentence(missing) if self._fail(LOST) else "", LOST)
        except RuntimeError:  # the store is gone, with the process that had it: the collectives' own limit remains
            return

    def _leave(self, sentence: str, code: int) -> None:
        if self._closed.is_set():
            return
        if sentence:
            print(f"\nanchorctx train: {sentence}", file=sys.stderr, flush=True)
        os._exit(code)

    def _missing(self) -> dict[int, str]:
        """What those did last that do not answer, or else stay at something earlier; none if this process goes on."""
        at, before = self._count, self._entries()
        for _ in range(round(SILENCE_S / BEAT_S)):
            if self._closed.wait(BEAT_S):
                return {}
            self._write()
        now = self._entries()
        if self._count != at:
            return {}
        stays = [rank for rank in now if rank in before and now[rank][1] == before[rank][1]]
        gone = {r: f"does not answer any more and began {now[r][2]} last" for r in stays if now[r][0] == before[r][0]}
        behind = {r: f"is still at {now[r][2]}" for r in stays if now[r][1] < at}
        return {r: f"rank {r} ({now[r][3]}), which {what}" for r, what in sorted((gone or behind).items())}

    def _sentence(self, missing: dict[int, str]) -> str:
        seconds = time.monotonic() - self._since
        names = "; ".join(list(missing.values())[:SHOWN])
        more = f", and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        return (
            f"rank {self._ranks.rank} waits at {self._what}, since {seconds:.0f} s, for {names}{more}: see to these "
            "processes and their machines, then type the same command to go on from the last checkpoint"
        )

    def _nobody(self, error: BaseException) -> str:
        said = " ".join(str(error).split())[:200]
        return (
            f"rank {self._ranks.rank} lost its connections at {self._what} ({said}): see to the network, then "
            " type the same command to go on from the last checkpoint"
        )

    # -- the store --------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._beat += 1
        self._store.set(self._key(self._ranks.rank), json.dumps([self._beat, self._count, self._what, self._place]))

    def _entries(self) -> dict[int, list[Any]]:
        """(sign of life, how many things begun, the last of them, where) of each process that has begun."""
        keys = {rank: self._key(rank) for rank in range(self._ranks.world)}
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        return {r: json.loads(v) for r, v in zip(there, self._store.multi_get([keys[r] for r in there]), strict=True)}

    def _fail(self, code: int) -> bool:
        """Tell the others that the job ends; False where another process did so before."""
        mine = json.dumps({"rank": self._ranks.rank, "code": code})
        try:
            return self._store.compare_set(f"{self._prefix}/failure", "", mine).decode() == mine
        except RuntimeError:
            return True

    def _failure(self) -> dict[str, int] | None:
        key = f"{self._prefix}/failure"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"
