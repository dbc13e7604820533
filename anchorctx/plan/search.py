"""The cheapest configuration that fits: all by their time for a token, traced one after another until one has room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from anchorctx.errors import UserError
from anchorctx.models.config import SMALLEST_TILE, ActivationStore, MemoryConfig
from anchorctx.models.tiled_mlp import routes
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.mesh import sequence_sizes
from anchorctx.plan.compute import Job
from anchorctx.plan.planner import Plan, Planner

PCIE, CPU_MEMORY = 25e9, 10e9
"""Bytes a second, for one GPU of eight: PCIe 4 x16, and its share of the CPU's memory."""


def search(planner: Planner) -> Plan:
    """The fastest of all configurations that fit; of equally fast ones the one that needs the fewest switches.

    Raises:
        UserError: none fits; says how much the smallest needs, and how many GPUs would do.
    """
    ranked = sorted(_candidates(planner), key=lambda found: found[0])
    smallest: Plan | None = None
    for _, parallel, memory in tqdm(ranked, desc="search", unit="configuration", leave=False):
        if planner.least(parallel, memory) > planner.config.usable and smallest is not None:
            continue
        plan = planner.plan(parallel, memory)
        if plan.fits:
            return plan
        if smallest is None or plan.parts.total < smallest.parts.total:
            smallest = plan
    raise UserError(_nothing_fits(planner, smallest))


def _candidates(planner: Planner) -> Iterator[tuple[tuple[float, int], ParallelConfig, MemoryConfig]]:
    """(seconds a token, number of switches) and the configuration, for all that exist on these GPUs."""
    config = planner.config
    text = planner.hf_config.get_text_config()
    sizes = [n for n in sequence_sizes(text.num_attention_heads, ulysses.key_heads(text)) if config.gpus % n == 0]
    tiles = (0,) if routes(text) else (0, max(text.hidden_size, SMALLEST_TILE))
    switches = itertools.product((1, 2, 3), sizes, (0, 2, 1), tiles, ActivationStore, (False, True))
    for stage, size, every, tile, store, offloaded in switches:
        if store is ActivationStore.folder or (store is ActivationStore.cpu and every != 1):
            continue
        parallel = replace(
            config.parallel,
            zero_stage=stage,
            sequence_parallel=size,
            offload_optimizer=offloaded,
            offload_parameters=False,
        )
        memory = replace(config.memory, checkpoint_every=every, mlp_tile=tile, offload_activations=store)
        try:
            job = planner.job(parallel, memory)
        except UserError:
            continue  # a batch that does not divide on this mesh
        found = planner.cost(job)
        seconds = (found.seconds + _offload_seconds(planner, job, memory)) / found.tokens
        count = sum((stage > 1, stage > 2, size > 1, every > 0, tile > 0, store is ActivationStore.cpu, offloaded))
        yield (seconds, count), parallel, memory


def _offload_seconds(planner: Planner, job: Job, memory: MemoryConfig) -> float:
    """What crosses PCIe in a step, and an optimizer that runs at the pace of the CPU's memory (28 bytes a weight)."""
    seconds, assume = 0.0, planner.config.assume
    if job.parallel.offload_optimizer:
        share = planner.weights.count / planner.config.gpus
        seconds += share * (2 * planner.weights.element / PCIE + 28 / CPU_MEMORY)
    if memory.offload_activations is not ActivationStore.device:
        seconds += (1 - assume.overlap) * 2 * planner.inputs(job.parallel) * job.accumulation / PCIE
    return seconds


def _nothing_fits(planner: Planner, smallest: Plan | None) -> str:
    config = planner.config
    if smallest is None:
        tokens = config.tokens_per_step
        return f"no configuration exists for {config.gpus} GPUs and tokens_per_step={tokens}: change one"
    need, have = smallest.parts.total / 2**30, smallest.usable / 2**30
    parallel = smallest.parallel
    return (
        f"no configuration of {config.gpus} {config.gpu} fits rows of {planner.row_length:,} tokens: the smallest "
        f"(ZeRO {parallel.zero_stage}, sequence_parallel={parallel.sequence_parallel}, layers recomputed) needs "
        f"{need:.1f} GiB of {have:.1f}: use at least {_enough(planner, smallest)} GPUs, or rows of about "
        f"{_shorter(planner, smallest):,} tokens"
    )


def _enough(planner: Planner, smallest: Plan) -> int:
    """GPUs on which the smallest configuration's kind would fit, doubling; an estimate from what shrinks with them."""
    parts, gpus = smallest.parts, planner.config.gpus
    fixed = parts.runtime + parts.gathered
    while fixed + (parts.total - fixed) * planner.config.gpus / gpus > smallest.usable and gpus < 2**20:
        gpus *= 2
    return gpus


def _shorter(planner: Planner, smallest: Plan) -> int:
    parts = smallest.parts
    growing = parts.activations + parts.working + parts.logits
    room = max(smallest.usable - (parts.total - growing), 0.0)
    return max(int(planner.row_length * room / growing) // 1024 * 1024, 0)
