"""One evaluation over several processes: each takes some of the batches, and all get all results.

Batches are the same whatever the number of processes, so the numbers are too. Every process makes equally many calls
of the model, repeating its last batch where they run out: under ZeRO-3 each call gathers parameters from all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as torch_dist

from anchorctx.evals.base import Progress

Batch = TypeVar("Batch")
Found = TypeVar("Found")


def place() -> tuple[int, int]:
    """(rank, processes); (0, 1) outside of any process group."""
    if not torch_dist.is_initialized():
        return 0, 1
    return torch_dist.get_rank(), torch_dist.get_world_size()


def is_first() -> bool:
    """Does this process write files and talk to the user? Also before and after there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def spread(
    batches: Sequence[Batch], work: Callable[[Batch], Found], sizes: Sequence[int], progress: Progress
) -> list[Found]:
    """`[work(batch) for batch in batches]`, the calls divided over the processes; `sizes` are tokens, for progress."""
    rank, world = place()
    mine: dict[int, Found] = {}
    for first in range(0, math.ceil(len(batches) / world) * world, world):
        index = min(first + rank, len(batches) - 1)
        mine[index] = work(batches[index])
        progress(sum(sizes[first : first + world]), sum(sizes))
    found = {index: value for part in gather(mine) for index, value in part.items()}
    return [found[index] for index in range(len(batches))]


def same_everywhere(value: Found) -> Found:
    """The first process's `value`, on every process."""
    if place()[1] == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box)
    return box[0]


def by_first(work: Callable[[], Found]) -> Found:
    """What `work` gives on the first process, on every process."""
    return same_everywhere(work() if place()[0] == 0 else None)  # type: ignore[return-value]


def gather(part: Any) -> list[Any]:
    """Every process's `part`, in rank order."""
    if place()[1] == 1:
        return [part]
    parts: list[Any] = [None] * place()[1]
    torch_dist.all_gather_object(parts, part)
    return parts
