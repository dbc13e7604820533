"""What lies where a file or folder is to be written, found before the work is done that would be written there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from anchorctx.errors import UserError

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""What a path may name, in words."""


def check_place(path: Path, *, folder: bool = False) -> None:
    """UserError where something else than a file (or a `folder`), or a link to one, is at `path`; nothing may be."""
    if not os.path.lexists(path):
        return
    wanted = stat.S_IFDIR if folder else stat.S_IFREG
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        what = KINDS.get(kind, "something else")
    except OSError:
        kind, what = 0, "a link that leads nowhere"
    if kind != wanted:
        raise UserError(
            f"{path} is {what}, where {KINDS[wanted]} is to be written: move it away, or choose another folder"
        )
