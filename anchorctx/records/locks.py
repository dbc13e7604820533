"""Locks on folders: who waits, who is refused, and by whom.

Locks are the kernel's (`flock`): a killed process leaves none behind. The `filelock` package is not used: it has no
shared locks, cannot lock a folder, and on a file system without `flock` falls back to marker files, which outlive a
killed process. Here a file system without locks stops nobody: two processes may then do the same work, and the first to
finish wins.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from anchorctx.errors import UserError
from anchorctx.records.disk import Writing
from anchorctx.records.places import check_place

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The lock file inside a folder that is locked; it says who holds it, or held it last."""


def lock_folder(folder: Path, key: str = "out_dir") -> IO[str]:
    """Lock `folder`, made if needed, until the returned file is closed or the process dies.

    Raises:
        UserError: another process holds it; names that process and `key`, the setting that named the folder.
        DiskError: nothing can be written there.
    """
    with Writing("a lock", folder):
        return _lock(folder / LOCK, f"{key}={folder}", f"choose another {key}")


@contextmanager
def sole_command(folder: Path, key: str = "out_dir") -> Iterator[None]:
    """Hold `folder`, made if needed, as the only command that writes it; UserError as of `lock_folder`.

    A command that fails before it wrote anything leaves no folder behind.
    """
    made = missing_parents(folder / LOCK)
    with lock_folder(folder, key):
        try:
            yield
        finally:
            with suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
            remove_empty(made)


@contextmanager
def sole_writer(folder: Path, key: str | None = None) -> Iterator[None]:
    """Hold the right to make `folder`, which need not exist.

    Waits, and says so, while another process holds it. With `key`, the setting that named it, it raises UserError
    instead.
    """
    made = missing_parents(folder)
    path = folder.with_name(f".{folder.name}.lock")
    refusal = None if key is None else f"{key}={folder}"
    with _lock(path, refusal, f"choose another {key}"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # those who wait have it open, and see that it is another file by now
            remove_empty(made)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `remove_unused` from removing anything in `folder`; any number of processes may use it at a time."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        check_place(folder / LOCK)
        with (folder / LOCK).open("a+") as file:
            flock(file, fcntl.LOCK_SH)
            if (folder / LOCK).exists():  # else another process has just removed the folder
                yield
                return


def remove_unused(folder: Path, names: Iterable[str]) -> None:
    """Remove these sub-folders, and `folder` itself if nothing else is in it, unless another process uses it."""
    if not folder.is_dir():
        return
    with suppress(OSError), (folder / LOCK).open("a+") as file:  # in use, or no way to know
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        if [path.name for path in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)


def flock(file: IO[str] | int, kind: int) -> bool:
    """Lock the file; False where the file system has no locks, BlockingIOError when another process is in the way."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def missing_parents(path: Path) -> list[Path]:
    """The folders above `path` that do not exist, innermost first."""
    return [folder for folder in path.parents if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lock(path: Path, refusal: str | None, remedy: str) -> IO[str]:
    """Lock the file `path`, made if needed; waits where there is no `refusal`, which says what is locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # who fails first removes what it made
        check_place(path)
        file = path.open("a+")  # readable too, which network file systems ask for
        try:
            try:
                flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if refusal is not None:
                    raise UserError(
                        f"{refusal} is being written by {_holder(file)}: wait for it, end it, or {remedy}"
                    ) from None
                logger.info("waiting for %s, which makes %s", _holder(file), path.name[1:].removesuffix(".lock"))
                flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                _sign(file)
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # who had it has removed the file: the next one locks a new one


def _is_at(file: IO[str], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _sign(file: IO[str]) -> None:
    """Say in the lock file who holds it; a disk that is too full for that does not matter."""
    with suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()} {socket.gethostname()}\n".encode())


def _holder(file: IO[str]) -> str:
    with suppress(OSError, ValueError):
        file.seek(0)
        pid, host = file.read(1000).split()
        return f"process {int(pid)} on {host}"
    return "another process"
