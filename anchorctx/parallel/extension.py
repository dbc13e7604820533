"""DeepSpeed's CPU Adam, for offloading: compiled on first use, behind a lock file that outlives a killed process.

torch marks a build by a file called `lock`, which every start makes, for 50 ms where there is nothing to build, and for
which every other process waits without a limit or a word (pytorch/pytorch#189245). So processes of ours take turns by a
lock of the kernel's, which a killed process leaves to the next, and whoever has it removes a file that nobody holds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from anchorctx.errors import UserError

logger = logging.getLogger(__name__)

BUILD_S = 1800.0
"""Seconds after which another program's build on another machine is over: CPU Adam takes two minutes where there are
cores for it."""
NAME, ROOT = "cpu_adam", "TORCH_EXTENSIONS_DIR"
TURN, BATON = ".anchorctx.lock", "lock"


def load_cpu_adam() -> None:
    """Compile or load it, once and for all of this process.

    Raises:
        UserError: nothing can be written where torch compiles extensions.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder  # type: ignore[attr-defined]

    with turn(folder()):
        CPUAdamBuilder().load(verbose=False)


def folder() -> Path:
    """Where torch compiles the extension; made if needed."""
    from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

    # torch would take a ~ that stands for nothing literally, and make a folder of that name
    if root := os.environ.get(ROOT):
        os.environ[ROOT] = os.path.expanduser(root)
    homeless = os.path.expanduser("~") == "~" and not {ROOT, "XDG_CACHE_HOME"} & os.environ.keys()
    why = "there is no home folder to put it in"
    try:
        if not homeless:
            place = Path(_get_build_directory(NAME, verbose=False))
            (place / TURN).touch()
            return place
    except OSError as error:
        why = f"nothing can be written in {os.environ.get(ROOT) or get_default_build_root()} ({error.strerror})"
    raise UserError(
        f"parallel.offload_optimizer=true compiles DeepSpeed's CPU Adam, and {why}: set {ROOT} to a folder of your own"
    )


@contextmanager
def turn(place: Path) -> Iterator[None]:
    """Have the extension in `place` for this process alone; says so while it waits."""
    with (place / TURN).open("a+") as file:
        _take(file)
        file.seek(0)
        _take_over(place / BATON, died=bool(file.read()))
        file.write("at work")  # whoever finds this knows that its writer was killed, and that the baton was its
        file.flush()
        yield
        file.truncate(0)


def _take(file: IO[str]) -> None:
    with suppress(OSError):  # a file system without locks: nobody is kept out
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting while another process builds DeepSpeed's %s", NAME)
            fcntl.flock(file, fcntl.LOCK_EX)


def _take_over(baton: Path, *, died: bool) -> None:
    """Wait for the program that made the file, or remove it where that is gone."""
    said = False
    while (found := _stat(baton)) is not None:
        held = _is_open(found)
        if not held and (died or time.time() - found.st_mtime > BUILD_S):
            logger.warning("removed %s, which a killed process left", baton)
            baton.unlink(missing_ok=True)
        elif not said:
            alone = f"nobody here has it, so until it is {BUILD_S / 60:.0f} min old, unless you remove it"
            logger.warning("waiting for %s: %s", baton, "another program builds" if held else alone)
            said = True
        else:
            time.sleep(0.2)


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _is_open(file: os.stat_result) -> bool:
    """Does a process of this machine have the file open, as torch has while it builds?"""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            if os.path.samestat(link.stat(), file):
                return True
    return False
