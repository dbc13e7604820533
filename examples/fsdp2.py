"""AnchorAttention in a loop of one's own, the model sharded by FSDP2 (`fully_shard`).

torchrun --nproc_per_node 2 examples/fsdp2.py           some seconds on a CPU, with no network

On GPUs the same: gloo becomes nccl, and the model is built on its device.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from anchorctx.integrations import attach
from anchorctx.testing.tiny import text_model, word_tokenizer

WORDS, BOS, ROW, DOCUMENTS, STEPS = 64, 1, 96, 8, 20
"""Vocabulary, its BOS (the anchor), positions of a row, documents of a step, steps."""


def build() -> PreTrainedModel:
    """The same small model on every process."""
    return text_model(word_tokenizer(WORDS), ROW)


def documents(step: int) -> list[torch.Tensor]:
    """Token ids of a step's documents, of different lengths: every other token follows from the one before."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for length in torch.randint(6, 24, (DOCUMENTS,), generator=generator).tolist():
        ids = torch.randint(3, WORDS, (length,), generator=generator)
        ids[1::2] = ids[: length - length % 2 : 2] * 7 % (WORDS - 3) + 3
        made.append(ids)
    return made


def flattened(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Documents as one row, (1, T); their positions restart, and nothing predicts their first tokens."""
    labels = torch.cat([torch.cat([torch.tensor([-100]), ids[1:]]) for ids in texts])
    positions = torch.cat([torch.arange(len(ids)) for ids in texts])
    return {"input_ids": torch.cat(texts)[None], "labels": labels[None], "position_ids": positions[None]}


def main() -> list[float]:
    """Train, print and return the loss of each step: a mean over the tokens of all processes."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build()
    attach(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = flattened(documents(step)[rank::world])
        tokens = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(tokens)
        # the sum of this process's losses over everybody's tokens; FSDP averages gradients, hence world
        loss = model(**batch, num_items_in_batch=tokens).loss
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    if rank == 0:
        print("losses: " + ", ".join(f"{loss:.7f}" for loss in losses))
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
