"""Many configurations of one planner: the fastest that fits, and one configuration on 1 to 1,024 GPUs.

Short pieces need little memory, so that layers need not be recomputed, but ZeRO communicates in each of them; documents
that are longer than a piece are shared, which exchanges keys. ZeRO 1 sums gradients in the weights' dtype: with several
pieces in bfloat16 it is left out.

The search ranks all configurations by their time for a token, which takes no tracing, and then traces one after another
until one fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from anchorctx.data.pieces import piece_tokens
from anchorctx.errors import UserError
from anchorctx.models.config import SMALLEST_TILE, ActivationStore, MemoryConfig
from anchorctx.models.tiled_mlp import routes
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.mesh import sequence_sizes
from anchorctx.plan.compute import Job
from anchorctx.plan.planner import Plan, Planner, shorter

SMALLEST = 1024
"""Tokens of a piece that the search tries, at least."""
PCIE, CPU_MEMORY = 25e9, 10e9
"""Bytes a second, for one GPU of eight: PCIe 4 x16, and its share of the CPU's memory."""
LARGEST = 1024
"""GPUs that are simulated, at most."""
DEALT = 64
"""GPUs that a simulated step is dealt out to, at most: more are taken to wait for each other as these do."""

Candidate = tuple[tuple[float, int], ParallelConfig, MemoryConfig, int]
"""(seconds a token, number of switches), and the configuration: the last is `micro_tokens`."""


def search(planner: Planner) -> Plan:
    """The fastest of all configurations that fit; of equally fast ones the one with the fewest switches on.

    Raises:
        UserError: none fits; says how much the smallest needs, and how many GPUs would do.
    """
    ranked = sorted(_candidates(planner), key=lambda candidate: candidate[0])
    smallest: Plan | None = None
    for _, parallel, memory, tokens in tqdm(ranked, desc="search", unit="configuration", leave=False):
        # what surely does not fit is not traced, except the first, so that the message has something to say
        job = planner.job(parallel, memory, tokens)
        if planner.least(job, memory) > planner.config.usable and smallest is not None:
            continue
        plan = planner.plan(parallel, memory, tokens)
        if plan.fits:
            return plan
        if smallest is None or plan.parts.total < smallest.parts.total:
            smallest = plan
    raise UserError(_nothing_fits(planner, smallest))


def _candidates(planner: Planner) -> Iterator[Candidate]:
    """All that exist on these GPUs."""
    config = planner.config
    text = planner.hf_config.get_text_config()
    sizes = [n for n in sequence_sizes(text.num_attention_heads, ulysses.key_heads(text)) if config.gpus % n == 0]
    # a mixture of experts has no MLP that could be tiled
    tiles = (0,) if routes(text) else (0, max(text.hidden_size, SMALLEST_TILE))
    switches = itertools.product(
        (1, 2, 3), sizes, (0, 2, 1), tiles, ActivationStore, (False, True), piece_sizes(planner)
    )
    for stage, size, every, tile, store, offloaded, tokens in switches:
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
            job = planner.job(parallel, memory, tokens)
        except UserError:
            continue  # full attention's row does not fit into pieces of so many tokens
        if stage == 1 and planner.dtype is not torch.float32 and max(planner.dealt(job).pieces) > 1:
            continue  # `train.engine` would sum the pieces' gradients in bfloat16
        cost = planner.cost(job)
        seconds = (cost.seconds + _offload_seconds(planner, job, memory)) / cost.tokens
        count = sum((stage > 1, stage > 2, size > 1, every > 0, tile > 0, store is ActivationStore.cpu, offloaded))
        yield (seconds, count), parallel, memory, tokens


def piece_sizes(planner: Planner) -> list[int]:
    """`micro_tokens` that the search tries: powers of two up to a GPU's share of the step, and the longest document."""
    # a row of 65,536 for each GPU, documents up to 20,000: 1,024 to 65,536, and 20,480
    row, documents = planner.row_length, planner.documents
    batch = planner.config.tokens_per_step or row * planner.config.gpus
    most = max(row, batch // planner.config.gpus)
    powers = {2**k for k in range(SMALLEST.bit_length() - 1, most.bit_length()) if 2**k <= most}
    longest = -(-(documents.longest + documents.shared) // SMALLEST) * SMALLEST
    return sorted(powers | {longest, piece_tokens(None, row, planner.config.pattern, 1)})


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
        seconds += (1 - assume.overlap) * 2 * planner.inputs(job.rows * planner.row_length / job.gpus) / PCIE
    return seconds


def _nothing_fits(planner: Planner, smallest: Plan | None) -> str:
    config = planner.config
    if smallest is None:
        tokens = config.tokens_per_step
        return f"no configuration exists for {config.gpus} GPUs and tokens_per_step={tokens}: change one"
    need, have = smallest.parts.total / 2**30, smallest.usable / 2**30
    parallel = smallest.parallel
    return (
        f"no configuration of {config.gpus} {config.gpu} fits {smallest.held}: the smallest (ZeRO "
        f"{parallel.zero_stage}, sequence_parallel={parallel.sequence_parallel}, micro_tokens="
        f"{smallest.job.micro_tokens}) needs {need:.1f} GiB of {have:.1f}: use at least {_enough(planner, smallest)} "
        f"GPUs{f', or {less}' if (less := shorter(smallest)) else ''}"
    )


def _enough(planner: Planner, smallest: Plan) -> int:
    """GPUs on which the smallest configuration's kind would fit, doubling; an estimate from what shrinks with them."""
    parts, gpus = smallest.parts, planner.config.gpus
    fixed = parts.runtime + parts.gathered  # does not shrink with the number of GPUs
    while fixed + (parts.total - fixed) * planner.config.gpus / gpus > smallest.usable and gpus < 2**20:
        gpus *= 2
    return gpus


@dataclass(frozen=True, slots=True)
class Point:
    """One mesh; a step has a row for each GPU (weak scaling)."""

    gpus: int
    sequence: int
    """GPUs that share a document which is longer than a piece."""
    data: int
    """Groups of them."""
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
    job = replace(plan.job, gpus=gpus, parallel=parallel, rows=gpus)
    few = replace(job, gpus=min(gpus, DEALT), rows=min(gpus, DEALT))
    cost = planner.cost(job, planner.dealt(few))
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
