"""Sequence parallelism without DeepSpeed's engine, in float64: every architecture, padded rows, bytes counted.

    torchrun ... sequence.py

Each process computes its slice's loss and gradients, which are summed over processes and compared with the whole rows
in one process. Rank 0 writes a JSON line for each case: errors relative to the largest value, and bytes sent.
"""

import json
import sys

import torch
import torch.distributed

from anchorctx.flops import head_dims
from anchorctx.layout import PackedLayout
from anchorctx.models.loss import CausalLMLoss
from anchorctx.parallel import dist, ulysses
from anchorctx.parallel.mesh import Mesh
from anchorctx.parallel.sharder import shard_batch
from anchorctx.testing.tiny import ARCHITECTURES, true_float64

LENGTH = 21  # no multiple of 2 or 4: rows are padded
CPU = torch.device("cpu")


INPUT_IDS = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))
TARGETS = INPUT_IDS.roll(-1, 1).masked_fill((torch.arange(LENGTH) == 8) | (torch.arange(LENGTH) == LENGTH - 1), -100)
LAYOUTS = (PackedLayout((0, 1, 9, LENGTH), 1), PackedLayout((0, 1, 5, 12, LENGTH), 1, doc_ids=(0, 1, 2, 1)))
ROWS = [(INPUT_IDS[i, None], TARGETS[i, None], (TARGETS[i, None] != -100).float(), LAYOUTS[i : i + 1]) for i in (0, 1)]
"""Two batches of a row, as the training loop has them."""


class Counter:
    """Bytes that this process hands to all-to-alls for the others."""

    def __init__(self):
        self.bytes, self._real = 0, torch.distributed.all_to_all_single
        torch.distributed.all_to_all_single = self

    def __call__(self, output, input, *args, **kwargs):
        size = torch.distributed.get_world_size(kwargs.get("group"))
        self.bytes += input.nbytes * (size - 1) // size
        return self._real(output, input, *args, **kwargs)


def loss_and_gradients(name, mesh, counter=None):
    backend = "reference" if ARCHITECTURES[name].softcap or ARCHITECTURES[name].window else "cpu"
    model = ARCHITECTURES[name].build(torch.float64, attention=backend)
    ulysses.enable(model, mesh)
    try:
        with true_float64():
            module = CausalLMLoss(model)
            loss = sum(module(**shard_batch(*row, mesh).arguments(CPU)) for row in ROWS)
            forward = counter.bytes if counter else 0
            loss.backward()
    finally:
        ulysses.release()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [loss.detach().view(1), *grads], forward, model.config


def compare(name, ranks, sequence):
    whole, *_ = loss_and_gradients(name, Mesh(dist.Ranks(0, 1, CPU), 1))
    counter.bytes = 0
    mine, forward, config = loss_and_gradients(name, Mesh.of(ranks, sequence), counter)
    for tensor in mine:
        torch.distributed.all_reduce(tensor)
        tensor /= ranks.world // sequence  # groups compute the same rows here
    largest = max(x.abs().max().item() for x in whole[1:])
    return {
        "case": name,
        "loss": abs(mine[0] / whole[0] - 1).item(),
        "gradients": max((a - b).abs().max().item() for a, b in zip(mine[1:], whole[1:], strict=True)) / largest,
        "forward": forward // config.num_hidden_layers,
        "backward": (counter.bytes - forward) // config.num_hidden_layers,
        "formula": ulysses.bytes_sent(
            tokens=-(-LENGTH // sequence) * sequence,
            heads=config.num_attention_heads,
            kv_heads=ulysses.key_heads(config),
            head_dim=head_dims(config)[0],
            element=8,
            sequence=sequence,
            rows=2,
        ),
    }


ranks = dist.start(60.0)
counter = Counter()
names = sys.argv[2].split(",") if len(sys.argv) > 2 else list(ARCHITECTURES)
for name in names:
    row = compare(name, ranks, int(sys.argv[1]))
    if ranks.is_main:
        print(json.dumps(row), flush=True)
dist.stop()
