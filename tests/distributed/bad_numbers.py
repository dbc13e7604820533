"""`anchorctx train` with numbers made bad on purpose: several runs in one process, or in each of torchrun's.

    bad_numbers.py '[{"faults": {"3": "loss"}, "rank": 0, "overrides": ["out_dir=a", ...]}, ...]'

Faults of a step: the `loss` is NaN, the `gradient` infinite, a `spike` is a loss times 100; after it one bit of a
weight flips (`flip`); before its update an optimizer's weight is NaN (`nan`). Rank 0 writes for each run its exit code,
its sentence, and which steps changed weights or the optimizer's states in any bit, as a JSON line.
"""

import contextlib
import io
import json
import math
import os
import sys

import torch

from anchorctx.cli import main as cli
from anchorctx.parallel import dist
from anchorctx.train.health import Health
from anchorctx.train.loop import Trainer

dist.stop = lambda: None  # DeepSpeed joins a process group once in a process's life
cli.PATIENCE_S = 0.0
plain_loss, plain_update = Trainer._loss_sum, Health.update
case, changed = {}, []


def fault_of(step):
    return case["faults"].get(str(step), "") if int(os.environ["RANK"]) == case["rank"] else ""


def loss_sum(self, mine):
    loss, fault = plain_loss(self, mine), fault_of(self.step + 1)
    if fault == "gradient" and loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * math.inf)
    return loss * {"loss": math.nan, "spike": 100.0}.get(fault, 1.0) if loss.requires_grad else loss


def weights(engine):
    """What this process updates: parts of the weights in float32, and all weights as the model has them."""
    groups = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    updated = next(getattr(engine.optimizer, name) for name in groups if hasattr(engine.optimizer, name))
    return updated, [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]


def tensors(engine):
    states = [state for states in engine.optimizer.optimizer.state.values() for state in states.values()]
    updated, own = weights(engine)
    return [tensor.detach().clone() for tensor in [*updated, *own, *filter(torch.is_tensor, states)]]


def update(self, loss, step, rows):
    updated, own = weights(self._engine)
    if fault_of(step) == "nan":
        updated[0].data[3] = math.nan
    before = tensors(self._engine)
    try:
        return plain_update(self, loss, step, rows)
    finally:
        after = tensors(self._engine)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            changed.append(step)
        if fault_of(step) == "flip":
            own[0].data.view(-1).view(torch.int32)[3] ^= 1


Trainer._loss_sum, Health.update = loss_sum, update
dist.start(60.0)  # without torchrun: a group of one
for case in json.loads(sys.argv[1]):
    changed.clear()
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = cli.main(["train", *case["overrides"]])
    if os.environ["RANK"] == "0":
        said = stderr.getvalue().rpartition("anchorctx train: ")[2].partition("\n")[0]  # a progress bar may follow
        print(json.dumps({"code": code, "said": said, "changed": changed}), flush=True)
