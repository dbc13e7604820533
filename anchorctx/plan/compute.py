"""Operations, communication and time of a step, from peak rates and the shares of them that are assumed to be reached.

Operations are `flops.ModelFlops`'s, which count no recomputation; what is recomputed costs time all the same: a
recomputed layer runs its forward pass (a third of forward + backward) again, a tiled MLP that of its matrices.

Bytes that a GPU sends in a step, P weights of e bytes, N GPUs, L layers, M micro-batches:

    sequence parallelism   M L (2 + recomputed share) x `ulysses.bytes_sent`, exposed: attention waits for it
    ZeRO 1, 2              2 e P (N-1)/N            gradients reduced, updated weights gathered
                                                    (ZeRO 2 reduces in every micro-batch: M + 1)
    ZeRO 3                 3 e P (N-1)/N M          weights gathered forward and backward, gradients reduced
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.plan.config import Assumptions
from anchorctx.plan.machines import Machine


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides its cost."""

    flops: ModelFlops
    weights: int
    element: int
    """Bytes of a weight and of an activation."""
    mlp_share: float
    """Of the matrices' operations, those of MLPs."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Job:
    """How a step is spread: `rows` of it over `gpus`, some of which share each."""

    gpus: int
    rows: int
    micro_rows: int
    parallel: ParallelConfig
    every: int
    """Every n-th layer is recomputed; 0 is none."""
    tiled_mlp: bool

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.rows * self.parallel.sequence_parallel // (self.gpus * self.micro_rows)


@dataclass(frozen=True, slots=True)
class Cost:
    """A step; operations are the whole step's, bytes and seconds one GPU's."""

    linear: float
    """Operations of matrices, forward and backward."""
    attention: float
    """Operations of attention."""
    saved: float
    """Share of full attention's operations that the layouts leave out."""
    sequence_bytes: float
    """Sent for sequence parallelism."""
    zero_bytes: float
    """Sent for ZeRO."""
    compute_seconds: float
    exchange_seconds: float
    """Waiting for sequence parallelism's exchanges."""
    zero_seconds: float
    """What of ZeRO's communication is not hidden."""
    tokens: int

    @property
    def seconds(self) -> float:
        """The step's time."""
        return self.compute_seconds + self.exchange_seconds + self.zero_seconds

    def utilisation(self, gpus: int, peak: float) -> float:
        """MFU: operations of the layouts over what the GPUs could do meanwhile."""
        return (self.linear + self.attention) / (gpus * peak * self.seconds)


def cost(shape: Shape, rows: Sequence[PackedLayout], job: Job, machine: Machine, assume: Assumptions) -> Cost:
    """The cost of a step of `job.rows` rows, of which `rows` are typical."""
    tokens = rows[0].length
    attention = sum(shape.flops.attention(row) for row in rows) / len(rows) * job.rows
    linear = shape.flops.per_token * tokens * job.rows
    again = 1 / job.every if job.every else 0.0
    again_linear = again + (shape.mlp_share if job.tiled_mlp else 0.0)
    rate = job.gpus * machine.peak
    compute = linear * (1 + again_linear / 3) / (rate * assume.linear)
    compute += attention * (1 + again / 3) / (rate * assume.attention)
    sequence_bytes, zero_bytes = _sequence_bytes(shape, tokens, job, again), _zero_bytes(shape, job)
    zero = zero_bytes / _rate(job.gpus, machine, assume)
    return Cost(
        linear,
        attention,
        shape.flops.attention_saved(rows),
        sequence_bytes,
        zero_bytes,
        compute,
        sequence_bytes / _rate(job.parallel.sequence_parallel, machine, assume),
        max((1 - assume.overlap) * zero, zero - compute),
        tokens * job.rows,
    )


def _sequence_bytes(shape: Shape, tokens: int, job: Job, again: float) -> float:
    once = ulysses.bytes_sent(
        tokens=tokens,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        element=shape.element,
        sequence=job.parallel.sequence_parallel,
        rows=job.micro_rows,
    )
    return once * shape.layers * (2 + again) * job.accumulation


def _zero_bytes(shape: Shape, job: Job) -> float:
    once = shape.weights * shape.element * (job.gpus - 1) / job.gpus
    by_stage = {1: 2, 2: job.accumulation + 1, 3: 3 * job.accumulation}
    return once * by_stage[job.parallel.zero_stage]


def _rate(group: int, machine: Machine, assume: Assumptions) -> float:
    """Bytes a second that a GPU sends within a group of so many neighbours."""
    inside = group <= assume.gpus_per_machine
    return assume.link * (machine.link if inside else min(machine.link, assume.network_gb * 1e9))
