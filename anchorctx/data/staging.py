"""A folder that appears all at once: written under a hidden name of its own, then renamed.

Several processes may make the same folder at a time, each in its own hidden one; the first to finish gives it its name,
and what the others made, which is the same, is removed. A killed process's hidden folder is removed by the next writer:
a living one holds a lock on its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path


class StagedFolder:
    """A folder in the making; `folder` is where to write."""

    def __init__(self, final: Path, marker: str) -> None:
        """`final` is the name it will have; it is whole when it holds the file `marker`."""
        self._final, self._marker = final, marker
        self._made = [folder for folder in final.parents if not folder.exists()]
        for abandoned in final.parent.glob(f".{final.name}.*.partial"):
            _remove_unless_locked(abandoned)
        self.folder, self._lock = _create(final)

    def publish(self) -> Path:
        """Give the folder its name, unless another writer was first; returns the named folder."""
        if self._final.exists() and not (self._final / self._marker).is_file():
            shutil.rmtree(self._final)  # never whole, so nobody reads it
        try:
            os.rename(self.folder, self._final)
        except OSError:
            if not (self._final / self._marker).is_file():
                raise
        self.discard()
        return self._final

    def discard(self) -> None:
        """Remove what was written and not published, and folders made for it that are empty; may be called twice."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # not empty: something was published there
            for folder in self._made:
                folder.rmdir()


def _create(final: Path) -> tuple[Path, int | None]:
    """A new hidden folder and the descriptor that locks it; None where the file system has no locks."""
    while True:
        folder = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.partial")
        folder.mkdir(parents=True)
        descriptor = _lock(folder)
        if folder.exists():  # else another writer took it for an abandoned one before it was locked
            return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    descriptor = _lock(folder)
    if descriptor is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a lock on the folder until closed or the process dies; None if there is none to get."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
