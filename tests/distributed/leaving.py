"""A process that leaves while gloo's thread is about to let go of a collective's tensor."""

import sys
import time

import torch
import torch.distributed as torch_dist

from anchorctx.cli.main import leave
from anchorctx.parallel import dist


class Slow:
    """Lets other threads run while the interpreter takes its module apart."""

    def __del__(self, sleep=time.sleep) -> None:
        sleep(1)


dist.start(60.0)
slow, group = Slow(), torch_dist.group.WORLD  # somebody keeps the group, as DeepSpeed's engine does
sys.setswitchinterval(1000)  # gloo's thread does not get its turn before the end
torch_dist.all_reduce(torch.ones(1), async_op=True)
dist.stop()
leave(0)
