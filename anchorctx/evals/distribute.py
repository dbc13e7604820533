"""One evaluation over several processes: each takes some of the batches, and all get all results.

The batches do not depend on the number of processes, so neither do the numbers. Every process calls the model equally
often, and repeats the last batch when there are no more: under ZeRO-3 each call gathers parameters from all processes.
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


def rank_and_size() -> tuple[int, int]:
    """(rank, processes); (0, 1) outside of any process group."""
    if not torch_dist.is_initialized():
        return 0, 1
    return torch_dist.get_rank(), torch_dist.get_world_size()


def is_first() -> bool:
    """Whether this process writes files and talks to the user; works without a process group too."""
    return int(os.environ.get("RANK") or 0) == 0


def spread(
    batches: Sequence[Batch], work: Callable[[Batch], Found], sizes: Sequence[int], progress: Progress
) -> list[Found]:
    """`[work(batch) for batch in batches]`, the calls divided over the processes; `sizes` are tokens, for progress."""
    # 5 batches, 2 processes: rounds [0 1] [2 3] [4 4]. Both compute the last, and one of the equal results is kept.
    rank, world = rank_and_size()
    mine: dict[int, Found] = {}
    for first in range(0, math.ceil(len(batches) / world) * world, world):
        index = min(first + rank, len(batches) - 1)
        mine[index] = work(batches[index])
        progress(sum(sizes[first : first + world]), sum(sizes))
    found = {index: value for part in gather(mine) for index, value in part.items()}
    return [found[index] for index in range(len(batches))]


def same_everywhere(value: Found) -> Found:
    """The first process's `value`, on every process."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box)
    return box[0]


def by_first(work: Callable[[], Found]) -> Found:
    """Run `work` on the first process alone; its result, on every process."""
    return same_everywhere(work() if rank_and_size()[0] == 0 else None)  # type: ignore[return-value]


def gather(part: Any) -> list[Any]:
    """Every process's `part`, in rank order."""
    if rank_and_size()[1] == 1:
        return [part]
    parts: list[Any] = [None] * rank_and_size()[1]
    torch_dist.all_gather_object(parts, part)
    return parts
