"""The process group: joined from torchrun's environment, or made for one process alone; nccl on CUDA, gloo on CPU."""

from __future__ import annotations

import datetime
import os
import socket
import time
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

T = TypeVar("T")

SHARED_MEMORY = "deepspeed_shm_comm"
"""DeepSpeed's extension for reductions on a CPU."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among all of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Does this process write files and talk to the user?"""
        return self.rank == 0


def start(timeout_s: float = 1800.0) -> Ranks:
    """Join the process group that torchrun announces in the environment, or make one for this process alone.

    `timeout_s` bounds every collective, so that a lost rank ends the job instead of hanging it. DeepSpeed is told
    which accelerator there is before it is first imported.
    """
    # Started without torchrun: a group of one, so that no code below asks whether there is a group.
    if not os.environ.get("RANK"):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19 still calls torch's older names: nothing that a user could mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*deprecated", FutureWarning)
    if not torch_dist.is_initialized():
        import deepspeed

        # On a CPU DeepSpeed compiles an extension that reduces over shared memory, under a lock that outlives a killed
        # process and then stops every later run, in silence. gloo reduces as well, and needs no compiler.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
        timeout = datetime.timedelta(seconds=timeout_s)
        deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    return Ranks(torch_dist.get_rank(), torch_dist.get_world_size(), device)


def stop() -> None:
    """Leave the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    torch_dist.barrier()


def wait(device: torch.device) -> float:
    """Wait for every process, after this one's computation is done; the seconds that passed in waiting.

    With one process there is nobody to wait for, and nothing is synchronised.
    """
    if torch_dist.get_world_size() == 1:
        return 0.0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    torch_dist.barrier()
    return time.perf_counter() - began


def total(values: list[float], device: torch.device) -> list[float]:
    """Sum of each value over all processes, in float64: the same on every one of them."""
    # float64: the sum of many processes' losses keeps all digits that each of them has
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch_dist.all_reduce(tensor)
    return tensor.tolist()


def highest(value: float, device: torch.device) -> float:
    """The largest value over all processes."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return tensor.item()


def gathered(value: T, ranks: Ranks) -> list[T]:
    """Every process's value, in the order of ranks."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    torch_dist.all_gather_object(values, value)
    return values


def stacked(values: torch.Tensor) -> torch.Tensor:
    """(W, ...): `values`, on this process's device, of each of the W processes."""
    found = [torch.empty_like(values) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(found, values.contiguous())
    return torch.stack(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
