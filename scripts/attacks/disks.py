"""A disk that fills up: a sentence that says so, or all is there; with space again, the same command finishes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from attacks.attack import Attack, Scene
from attacks.forks import Ended
from attacks.world import COMMANDS


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Inside it `folder` is a file system of its own with room for `size` bytes; needs root."""
    option = f"size={-(-size // 4096) * 4096}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def more_room(folder: Path) -> None:
    """The disk of `small_disk` has room again."""
    subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True, capture_output=True)


def used_by(command: str, scene: Scene) -> int:
    """Bytes that the undisturbed command left."""
    folder = scene.world.folder / command
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def full(command: str, scene: Scene) -> str | None:
    """Room for 0 to 110 % of what the command writes. Without root, no file may be longer than a part of that."""
    room = int(used_by(command, scene) * scene.rng.uniform(0.0, 1.1))
    if os.geteuid() != 0:
        return _ended(command, scene, scene.command(command, inside=partial(short_files, max(room // 4, 1))))
    with small_disk(scene.out, max(room, 4096)):
        done = scene.command(command)
        more_room(scene.out)
        return _ended(command, scene, done)


def short_files(size: int) -> None:
    """For `forks.run(inside=...)`: a file of more than `size` bytes fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(command: str, scene: Scene) -> str | None:
    """A disk that takes nothing."""
    if os.geteuid() != 0:
        os.chmod(scene.out, 0o555)
        done = scene.command(command)
        os.chmod(scene.out, 0o755)
        return _ended(command, scene, done)
    with small_disk(scene.out, 2**20):
        subprocess.run(["mount", "-o", "remount,ro", str(scene.out)], check=True, capture_output=True)
        done = scene.command(command)
        subprocess.run(["mount", "-o", "remount,rw,size=1g", str(scene.out)], check=True, capture_output=True)
        return _ended(command, scene, done)


def _ended(command: str, scene: Scene, done: Ended) -> str | None:
    if done.code == 0:
        return scene.whole(command)
    if not done.sentence:
        return f"ended with {done.code}: {done.last}"
    return scene.finishes(command)


ATTACKS = [
    *(Attack("disks", f"{c}: full", partial(full, c), int(c in ("train", "eval")), 14, 4.0) for c in COMMANDS),
    *(Attack("disks", f"{c}: read-only", partial(read_only, c), 0, 2, 4.0) for c in COMMANDS),
]
