"""Writes that the disk refuses: one sentence instead of a traceback, and space asked for before it is needed.

    need_space(folder, size, "the export")                                # refuses before anything is written
    with Writing("the export", folder, size, intact="the run is untouched"):
        ...                                                               # numpy, torch, safetensors, plain files

Libraries in C++ and Rust do not raise OSError: safetensors, tokenizers and pyarrow put the number into a text, torch
loses it. Both are recognised here (tried with torch 2.13, safetensors 0.8, tokenizers 0.23, pyarrow and numpy 2).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from anchorctx.errors import UserError

FREE = "free some there, or choose another folder, and run the same command again"
SHORT = "the disk took less than it was given, and is most likely full"
REASONS = {
    errno.ENOSPC: ("the disk is full", FREE),
    errno.EDQUOT: ("the quota is used up", FREE),
    errno.EFBIG: ("a file would be larger than `ulimit -f` or the file system allows", "raise that limit"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.EACCES: ("this user may not write there", "choose another folder, or change its rights"),
    errno.EPERM: ("this user may not write there", "choose another folder, or change its rights"),
    errno.EIO: ("the disk reports an input/output error", "look at the machine's log (dmesg), or choose another disk"),
}
"""What refuses a write, and the remedy."""
OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Those that no reading can meet."""
IN_TEXT = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
"""How Rust and Arrow write the number of an error."""
NO_NUMBER = re.compile(
    r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|basic_ios::clear|\d+ requested and \d+ written"
)
"""What torch and numpy say when a file takes less than it was given."""


class DiskError(UserError):
    """Something could not be written: says what, why, the bytes needed and free, what is intact, and the remedy."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A context whose failed writes become a DiskError; other errors pass. It may be entered many times.

    It is best put around the code that removes what was half-written, so that the bytes free are those of afterwards.
    """

    what: str
    """What is written, with its article."""
    folder: Path
    """Where; it need not exist yet."""
    needed: int | None = None
    """Bytes in all, where they are known."""
    intact: str = ""
    """What a user still has, as a sentence without its full stop."""

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and (found := self.error(error)) is not None:
            raise found from error

    def error(self, error: BaseException) -> DiskError | None:
        """The DiskError that `error` is, or None where it is something else."""
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return None  # Ctrl-C while a full disk was being dealt with stays Ctrl-C
        for link in _chain(error):
            number, name = _number(link), getattr(link, "filename", None)
            if number is None:
                continue
            if not isinstance(name, str | bytes) or self._is_here(name):
                return DiskError(self.sentence(*REASONS[number]))
            if number in OF_WRITES:  # elsewhere: a cache or a folder for temporary files
                return DiskError(_writing(name, self.intact).sentence(*REASONS[number]))
        if any(NO_NUMBER.search(str(link)) for link in _chain(error)):
            return DiskError(self.sentence(SHORT, FREE))
        return None

    def sentence(self, reason: str, remedy: str) -> str:
        """What the user reads."""
        needed, free = self.needed, free_space(self.folder)
        room = [f"{size(needed)} needed"] if needed else []
        room += [f"{size(free)} free"] if free is not None else []
        parts = [f"{self.what} cannot be written to {self.folder}: {reason}"]
        parts += [f" ({', '.join(room)})"] if room else []
        return "".join([*parts, f"; {self.intact}" if self.intact else "", f": {remedy}"])

    def _is_here(self, name: str | bytes) -> bool:
        """Whether the file is in this folder, in the hidden one that becomes it, or a folder above that is to be made.

        Input that may not be read is not.
        """
        path, folder = (Path(os.path.abspath(os.fsdecode(one))) for one in (name, self.folder))
        hidden = str(path).startswith(f"{folder.parent / f'.{folder.name}.'}")
        return hidden or path.is_relative_to(folder) or folder.is_relative_to(path)


def refused_write(error: BaseException) -> DiskError | None:
    """The DiskError of an error that came through to the command line; None where it is something else."""
    for link in _chain(error):
        number, name = _number(link), getattr(link, "filename", None)
        if number in OF_WRITES:
            reason, remedy = REASONS[number]
            if isinstance(name, str | bytes):
                return DiskError(_writing(name).sentence(reason, remedy))
            return DiskError(f"the standard output or a file cannot be written: {reason}: {remedy}")
    if any(NO_NUMBER.search(str(link)) for link in _chain(error)):
        return DiskError(f"a file cannot be written: {SHORT}: {FREE}")
    return None


def need_space(folder: Path, needed: int, what: str, intact: str = "") -> None:
    """DiskError unless `folder`, which need not exist yet, has room for so many bytes; nothing is written."""
    free = free_space(folder)
    if free is not None and free < needed:
        raise DiskError(Writing(what, folder, needed, intact).sentence("too little space is left", FREE))


def free_space(folder: Path) -> int | None:
    """Bytes that this user may still write in `folder` or its nearest parent that exists; None where nobody knows.

    A quota is seen only where the file system reports it so (XFS's project quotas, most network file systems).
    """
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network and FUSE file systems report nothing but zeros


def size(count: int) -> str:
    """Bytes for a reader: 812 bytes, 4.1 kB, 16.2 GB."""
    if count < 1000:
        return f"{count} bytes"
    # 999,949 bytes are 999.9 kB, 999,950 would be 1,000.0: the next unit
    power = next((power for power in (1, 2, 3) if count < 999.95 * 1000**power), 4)
    return f"{count / 1000**power:,.1f} {'kMGT'[power - 1]}B"


def _writing(name: str | bytes, intact: str = "") -> Writing:
    path = Path(os.fsdecode(name))
    return Writing(path.name, path.parent, intact=intact)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from: a context manager that closes a file may hide the first failure."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _number(error: BaseException) -> int | None:
    """The number of an error that is among REASONS."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is None and (found := IN_TEXT.search(str(error))):
        number = int(found[1] or found[2])
    return number if number in REASONS else None
