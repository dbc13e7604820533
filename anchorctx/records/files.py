"""Files and folders that appear whole, and locks on folders.

Whatever takes long to write is written under a hidden name in the same folder and renamed at the end, so that no reader
sees half of it. Locks are the kernel's (`flock`): a killed process leaves none behind. The `filelock` package is not
used: it has no shared locks, cannot lock a folder, and on a file system without `flock` falls back to marker files,
which outlive a killed process. Here a file system without locks stops nobody: two processes may then do the same work,
and the first to finish wins.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The lock file inside a folder that is locked."""
BLOCK, BLOCKS = 2**16, 64
"""Bytes of a block, and how many of them, spread evenly over a file, stand for it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file under a temporary name in the same folder and rename it to `path`."""
    # renaming is atomic only within a file system, which another folder may not share
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def follow_umask(folder: Path) -> None:
    """Give the folder's files the rights that the umask leaves to new ones; safetensors writes for the owner alone."""
    umask = os.umask(0o077)  # which can only be read by setting it: meanwhile nothing becomes more open than it would
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def file_sha256(path: Path) -> str:
    """64 hex digits over the file's content; OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_digest(files: Iterable[Path]) -> str:
    """Sixteen hex digits over names, sizes and 64 blocks of 64 KiB spread over each file: quick for any size.

    Any step of training changes nearly every weight, so that two checkpoints cannot agree in all blocks.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in range(min(BLOCKS, -(-size // BLOCK))):
                # first, last and 62 blocks between them; small files from end to end
                file.seek(block * BLOCK if size <= BLOCK * BLOCKS else block * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


class StagedFolder:
    """A folder that is written under a hidden name and then renamed.

    Several processes may make the same folder at a time, each under a different hidden name: the first to finish gives
    its folder the final name, and the others, whose content is the same, remove theirs. A process locks the folder that
    it writes, so that the next writer can tell that of a killed process, and removes it.
    """

    def __init__(self, final: Path, marker: str) -> None:
        """`final` is the name it will have; the folder is whole when it holds the file `marker`."""
        self._final, self._marker = final, marker
        self._made = [folder for folder in final.parents if not folder.exists()]
        for abandoned in final.parent.glob(f".{final.name}.*.partial"):
            _remove_unless_locked(abandoned)
        self.folder, self._lock = _create(final)
        """`folder` is where to write."""

    def publish(self) -> Path:
        """Rename the folder, unless another writer was first; returns the folder under its final name."""
        if self._final.exists() and not (self._final / self._marker).is_file():
            shutil.rmtree(self._final)  # never whole, so nobody reads it
        try:
            os.rename(self.folder, self._final)
        except OSError:  # a folder that is not empty cannot be replaced: fine if it is another writer's whole one
            if not (self._final / self._marker).is_file():
                raise
        self.discard()
        return self._final

    def discard(self) -> None:
        """Remove what was not published, and the empty parents made for it; may be called twice."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        _remove_empty(self._made)


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` until the returned file is closed or the process dies; BlockingIOError when another holds it."""
    file = (folder / LOCK).open("a")
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the right to make `folder`, which need not exist; logs and waits while another process holds it."""
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("a") as file:
        try:
            _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", folder)
            _flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # those who wait have it open, and first look whether `folder` exists by now
            _remove_empty(made)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `remove_unused` from removing anything in `folder`; any number of processes may use it at a time."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a") as file:
            _flock(file, fcntl.LOCK_SH)
            if (folder / LOCK).exists():  # else another process has just removed the folder
                yield
                return


def remove_unused(folder: Path, names: Iterable[str]) -> None:
    """Remove these sub-folders, and `folder` itself if nothing else is in it, unless another process uses it."""
    if not folder.is_dir():
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or no way to know
            return
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        if [path.name for path in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)


def _flock(file: IO[str] | int, kind: int) -> bool:
    """Lock the file; False where the file system has no locks, BlockingIOError when another process is in the way."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _create(final: Path) -> tuple[Path, int | None]:
    """A new hidden folder and the descriptor that locks it; None where the file system has no locks."""
    while True:
        folder = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        folder.mkdir(parents=True)
        descriptor = _locked(folder)
        if folder.exists():  # else another writer took it for an abandoned one before it was locked
            return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    descriptor = _locked(folder)
    if descriptor is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or the process dies; None when there is none to get."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(BlockingIOError):
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return descriptor
        os.close(descriptor)
    return None


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
