"""Is there memory for a copy? Asked of the kernel, and of the control groups that bound this process."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 0.5
"""Of the memory that is left, at most so much is taken for a copy."""


def fits_twice(size: int) -> bool:
    """May each process of this machine hold `size` more bytes? Yes where there is no way to know."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    left = [value for value in (_available(), _group_left()) if value is not None]
    return not left or size * processes <= SHARE * min(left)


def _available() -> int | None:
    """Bytes that the machine can still give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _group_left() -> int | None:
    """Bytes that the narrowest control group (version 2), such as a batch system's, can still give."""
    try:
        group = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    here, left = Path("/sys/fs/cgroup") / group.lstrip("/"), []
    for folder in (here, *here.parents):
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        except OSError:
            continue
        if limit != "max":
            left.append(max(int(limit) - int(used), 0))
    return min(left, default=None)
