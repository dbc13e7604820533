"""A configuration on 1 to 1,024 GPUs, on paper: bytes sent and the time of a step as DP x SP grows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from anchorctx.errors import UserError
from anchorctx.parallel import ulysses
from anchorctx.parallel.mesh import sequence_sizes
from anchorctx.plan.planner import Plan, Planner

LARGEST = 1024


@dataclass(frozen=True, slots=True)
class Point:
    """One mesh; every group of processes that shares a row has one micro-batch (weak scaling)."""

    gpus: int
    sequence: int
    data: int
    tokens_per_second: float
    """Of all GPUs."""
    efficiency: float
    """Tokens a second and GPU over those of one GPU that does not communicate."""
    sequence_bytes: float
    """That each GPU sends in a step for sequence parallelism."""
    zero_bytes: float
    """That each GPU sends in a step for ZeRO."""
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
    found = planner.cost(job)
    return Point(
        gpus,
        sequence,
        gpus // sequence,
        found.tokens / found.seconds,
        found.compute_seconds / found.seconds,
        found.sequence_bytes,
        found.zero_bytes,
        found.compute_seconds,
        found.seconds,
    )
