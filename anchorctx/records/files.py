"""Files and folders that appear whole, and lines that are appended whole; all are on disk when they appear.

Whatever takes long to write is written under a hidden name in the same folder and renamed at the end, so that no reader
sees half of it. Errors are OSErrors that name the file; `records.disk` makes a sentence of them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anchorctx.records.locks import flock, missing_parents, remove_empty

BLOCK, BLOCKS = 2**16, 64
"""Bytes of a block, and how many of them, spread evenly over a file, stand for it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file under a temporary name in the same folder and rename it to `path`; it is on disk on return."""
    # renaming is atomic only within a file system, which another folder may not share
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _naming(path):
        try:
            with beside.open("wb", buffering=0) as file:
                _write_all(file.fileno(), content)
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def append_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Append to a file, made if needed, all of `content` or nothing; with `sync` it is on disk on return."""
    with _naming(path), path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            _write_all(file.fileno(), content)
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def sync_file(path: Path) -> None:
    """Have the file, or the names in the folder, on disk on return.

    A file system that promises space before it looks for it (NFS, btrfs) says here that there is none.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot for a folder
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """A disk that is nearly full takes a part of a write and says so by its length alone."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file: that of a write has no name, and that of a temporary file says little."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link the link alone. It need not be there."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


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
        self._made = missing_parents(final)
        for abandoned in final.parent.glob(f".{final.name}.*.partial"):
            _remove_unless_locked(abandoned)
        self.folder, self._lock = _create(final)
        """`folder` is where to write."""

    def publish(self) -> Path:
        """Rename the folder, unless another writer was first; returns the folder under its final name."""
        for path in [*self.folder.rglob("*"), self.folder]:
            sync_file(path)
        if self._final.exists() and not (self._final / self._marker).is_file():
            remove(self._final)  # never whole, so nobody reads it
        try:
            os.rename(self.folder, self._final)
        except OSError:  # a folder that is not empty cannot be replaced: fine if it is another writer's whole one
            if not (self._final / self._marker).is_file():
                raise
        with suppress(OSError):  # it is there and whole: only a power failure could undo the renaming
            sync_file(self._final.parent)
        self.discard()
        return self._final

    def discard(self) -> None:
        """Remove what was not published, and the empty parents made for it; may be called twice."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        remove_empty(self._made)


def _create(final: Path) -> tuple[Path, int | None]:
    """A new hidden folder and the descriptor that locks it; None where the file system has no locks."""
    while True:
        folder = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        folder.mkdir(parents=True)
        try:
            return folder, _locked(folder)
        except (BlockingIOError, FileNotFoundError):  # another writer takes it for an abandoned one, and removes it
            continue


def _remove_unless_locked(folder: Path) -> None:
    with suppress(OSError):
        descriptor = _locked(folder)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or the process dies; None where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: it was removed meanwhile.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            folder.stat()  # it may have been removed, by who thought it abandoned, before it was locked
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
