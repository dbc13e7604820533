"""One process writes a set while the others wait for it."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the right to make `folder`; waits while another process holds it.

    Where the file system has no locks, nobody waits: two writers then do the same work, and the first to finish wins
    (`staging`).
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # whoever waits holds the file, and looks whether the set is there first
            with suppress(OSError):  # not empty: something was made
                for parent in made:
                    parent.rmdir()


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `folder`, which several processes may share, from losing what is in it to `remove_unused`."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a") as file:
            _try_lock(file, fcntl.LOCK_SH)
            if (folder / LOCK).exists():  # else another process has just removed the folder
                yield
                return


def remove_unused(folder: Path, names: Iterable[str]) -> None:
    """Remove those sub-folders, and the folder when nothing else is in it, unless another process uses it."""
    if not folder.is_dir():
        return
    with (folder / LOCK).open("a") as file:
        if not _try_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        if [path.name for path in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except OSError:
        return False
    return True
