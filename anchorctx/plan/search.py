"""Many configurations of one planner: the fastest that fits, and one configuration on 1 to 1,024 GPUs.

The search ranks all configurations by their time for a token, which takes no tracing, and then traces one after another
until one fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

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
LARGEST = 1024
"""GPUs that are simulated, at most."""


def search(planner: Planner) -> Plan:
    """The fastest of all configurations that fit; of equally fast ones the one with the fewest switches on.

    Raises:
        UserError: none fits; says how much the smallest needs, and how many GPUs would do.
    """
    ranked = sorted(_candidates(planner), key=lambda candidate: candidate[0])
    smallest: Plan | None = None
    for _, parallel, memory in tqdm(ranked, desc="search", unit="configuration", leave=False):
        # what surely does not fit is not traced, except the first, so that the message has something to say
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
    # a mixture of experts has no MLP that could be tiled
    tiles = (0,) if routes(text) else (0, max(text.hidden_size, SMALLEST_TILE))
    switches = itertools.product((1, 2, 3), sizes, (0, 2, 1), tiles, ActivationStore, (False, True))
    for stage, size, every, tile, store, offloaded in switches:
        # files are slower than all else; what is kept is moved only where it is no more than the layers' inputs
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
        cost = planner.cost(job)
        seconds = (cost.seconds + _offload_seconds(planner, job, memory)) / cost.tokens
        count = sum((stage > 1, stage > 2, size > 1, every > 0, tile > 0, store is ActivationStore.cpu, offloaded))
        yield (seconds, count), parallel, memory


def _offload_seconds(planner: Planner, job: Job, memory: MemoryConfig) -> float:
    """Seconds of a step for what crosses PCIe, and for an optimizer that runs at the pace of the CPU's memory.

    AdamW reads float32 weight, gradient and two moments and writes all but the gradient: 7 x 4 = 28 bytes a weight.
    """
    seconds, assume = 0.0, planner.config.assume
    if job.parallel.offload_optimizer:
        share = planner.weights.count / planner.config.gpus
        # gradients go down and weights come back
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
    fixed = parts.runtime + parts.gathered  # does not shrink with the number of GPUs
    while fixed + (parts.total - fixed) * planner.config.gpus / gpus > smallest.usable and gpus < 2**20:
        gpus *= 2
    return gpus


def _shorter(planner: Planner, smallest: Plan) -> int:
    """Tokens of a row that would fit, in steps of 1,024: activations and temporaries grow with it, states do not."""
    parts = smallest.parts
    growing = parts.activations + parts.working + parts.logits
    room = max(smallest.usable - (parts.total - growing), 0.0)
    return max(int(planner.row_length * room / growing) // 1024 * 1024, 0)


@dataclass(frozen=True, slots=True)
class Point:
    """One mesh; every group of GPUs that shares a row has one micro-batch (weak scaling)."""

    gpus: int
    sequence: int
    """GPUs that share a row."""
    data: int
    """Groups of them, which train on different rows."""
    tokens_per_second: float
    """Of all GPUs."""
    efficiency: float
    """Tokens a second and GPU over those of one GPU that does not communicate."""
    sequence_bytes: float
    """Sent by each GPU in a step for sequence parallelism."""
    zero_bytes: float
    """Sent by each GPU in a step for ZeRO."""
    compute_seconds: float
    step_seconds: float


def simulate(planner: Planner, plan: Plan) -> list[dict[str, float]]:
    """Points for each sequence-parallel size of the model up to 64, over all powers of two GPUs that it divides."""
    text = planner.hf_config.get_text_config()
    sizes = sequence_sizes(text.num_attention_heads, ulysses.key_heads(text))
    points = []
    for sequence in (n for n in sizes if n <= 64 and LARGEST % n == 0):
        gpus = sequence
        while gpus <= LARGEST:
            points.append(asdict(_point(planner, plan, gpus, sequence)))
            gpus *= 2
    if not points:
        raise UserError(f"no sequence-parallel size of {sizes} divides {LARGEST} GPUs: simulate another model")
    return points


def _point(planner: Planner, plan: Plan, gpus: int, sequence: int) -> Point:
    parallel = replace(plan.parallel, sequence_parallel=sequence)
    job = replace(plan.job, gpus=gpus, parallel=parallel, rows=gpus // sequence * planner.config.micro_rows)
    cost = planner.cost(job)
    return Point(
        gpus=gpus,
        sequence=sequence,
        data=gpus // sequence,
        tokens_per_second=cost.tokens / cost.seconds,
        efficiency=cost.compute_seconds / cost.seconds,
        sequence_bytes=cost.sequence_bytes,
        zero_bytes=cost.zero_bytes,
        compute_seconds=cost.compute_seconds,
        step_seconds=cost.seconds,
    )
