"""Training on two processes under torchrun: one of them dies or freezes, the launcher dies, or is asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from attacks.attack import Attack, Scene
from attacks.forks import Ended
from attacks.world import leftovers, trained

LAUNCH = [sys.executable, "-m", "anchorctx.cli.torchrun", "--standalone", "--nproc_per_node", "2", "-m", "anchorctx"]
PATIENCE = 10.0
"""Seconds within which workers without a launcher are gone."""
Disturb = Callable[[int, list[int]], None]
"""Called with the launcher's and its workers' process ids, while they train."""


def launch(scene: Scene, out: Path, disturb: Disturb | None = None, *more: str, limit: float = 240) -> Ended:
    """Train under torchrun; `disturb` is called when the first step is done, or a moment later."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        process = subprocess.Popen(
            [*LAUNCH, *scene.world.words("train", out), *more],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        if disturb is not None:
            _until(lambda: process.poll() is not None or _rows(out) >= 2, limit)
            time.sleep(scene.rng.uniform(0, 0.5))
            disturb(process.pid, _children(process.pid))
        hung = False
        try:
            process.wait(max(limit - (time.monotonic() - began), 1))
        except subprocess.TimeoutExpired:
            hung = True
            for pid in (*_children(process.pid), process.pid):
                _send(pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read(2**20).decode(errors="replace")
        done = Ended(process.returncode, text, time.monotonic() - began, hung)
        scene.ended.append(done)
        return done


def one(what: int, scene: Scene) -> str | None:
    """One of the two workers gets this signal; the other must not wait for ever."""
    chosen = scene.rng.randrange(2)

    def disturb(_: int, workers: list[int]) -> None:
        _send(workers[chosen % len(workers)] if workers else 0, what)

    done = launch(scene, scene.out, disturb, "parallel.timeout_s=15")
    return _again(scene) if done.code != 0 else _whole(scene)


def launcher(scene: Scene) -> str | None:
    """SIGKILL of torchrun alone: its workers end by themselves."""
    alive: list[int] = []

    def disturb(pid: int, workers: list[int]) -> None:
        alive.extend(workers)
        _send(pid, signal.SIGKILL)

    launch(scene, scene.out, disturb)
    _until(lambda: not any(map(_runs, alive)), PATIENCE)
    left = [pid for pid in alive if _runs(pid)]
    for pid in left:
        _send(pid, signal.SIGKILL)
    if left:
        return f"{len(left)} workers went on for {PATIENCE:.0f} seconds without their launcher"
    return _again(scene)


def asked(scene: Scene) -> str | None:
    """SIGTERM to torchrun, as a scheduler sends it: saved, and 143."""
    done = launch(scene, scene.out, lambda pid, _: _send(pid, signal.SIGTERM))
    if done.code not in (0, 143):
        return f"SIGTERM ended with {done.code}, not 143: {done.last}"
    return _again(scene) if done.code else _whole(scene)


def _again(scene: Scene) -> str | None:
    done = launch(scene, scene.out)
    return f"the same command again ended with {done.code}: {done.last}" if done.code else _whole(scene)


def _whole(scene: Scene) -> str | None:
    """None when the run is as an undisturbed one of two processes, which is made once."""
    undisturbed = scene.world.folder / "train_on_two"
    if not undisturbed.is_dir() or _rows(undisturbed) < 7:
        launch(scene, undisturbed)
    if trained(scene.out) != trained(undisturbed):
        return "the curve differs from that of an undisturbed run"
    left = leftovers(scene.out)
    return f"left over: {left[0]}" if left else None


def _rows(out: Path) -> int:
    with suppress(OSError):
        return (out / "metrics.jsonl").read_text().count("\n")
    return 0


def _until(done: Callable[[], bool], limit: float) -> None:
    end = time.monotonic() + limit
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    """The launcher's workers."""
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _send(pid: int, what: int) -> None:
    with suppress(ProcessLookupError):
        if pid > 1:
            os.kill(pid, what)


ATTACKS = [
    Attack("ranks", "train on two: one is killed", partial(one, signal.SIGKILL), 0, 10, 45.0),
    Attack("ranks", "train on two: one freezes", partial(one, signal.SIGSTOP), 0, 4, 70.0),
    Attack("ranks", "train on two: torchrun is killed", launcher, 0, 10, 45.0),
    Attack("ranks", "train on two: SIGTERM to torchrun", asked, 0, 10, 45.0),
]
