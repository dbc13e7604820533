"""Bytes on one process's device, by part, at the moments of a training step that hold most.

States follow ZeRO (arXiv 1910.02054, section 3): with P weights, N processes and weights of `e` bytes,

    stage   parameters   gradients   float32 copy and Adam's moments
    1       eP           eP          12 P/N
    2       eP           4P/N        12 P/N
    3       eP/N         4P/N        12 P/N

plus what DeepSpeed 0.19 needs to move them (its code read, and measured on a CPU: docs/scaling.md): buckets, gathered
parameters, and at the update a float32 copy of the gradients and AdamW's temporary (none on CUDA, where it is fused).
Gradients of ZeRO 2 exist twice while pieces accumulate. Activations come from `plan.trace`: of the pass that holds
most, a piece of `micro_tokens` or the longest document; a row is never held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchorctx.parallel.config import BUCKET, LIVE, SUBGROUP, ParallelConfig
from anchorctx.plan.trace import Traced

MASTER, MOMENTS, SUMMED = 4, 8, 4
"""Bytes for each weight: DeepSpeed's float32 copy (also of float32 weights), Adam's two moments, and the sum of the
pieces' gradients at ZeRO 2 and 3 (`train.engine` asks for float32)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes at the worst moment of a step, on each device; `host` comes on top, in CPU memory or files."""

    parameters: float
    """Weights that stay on the device."""
    gradients: float
    """Held between pieces, or being reduced."""
    optimizer: float
    """The float32 copy, the moments, and during the update its temporaries."""
    gathered: float
    """Parameters that ZeRO 3 has gathered, and buckets in transit."""
    activations: float
    """What the model keeps for the backward pass."""
    logits: float
    """A tile's logits, their gradients and the head's gradient, where the loss is the worst moment."""
    working: float
    """Temporaries of the layer (or update) at work."""
    runtime: float
    """CUDA context, communication buffers and fragmentation; on a CPU the process itself."""
    host: float = 0.0
    """What is offloaded, for each process."""
    moment: str = ""
    """The worst moment: forward, loss, backward or update."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        parts = self.parameters, self.gradients, self.optimizer, self.gathered, self.activations
        return sum(parts) + self.logits + self.working + self.runtime


@dataclass(frozen=True, slots=True)
class Weights:
    """How many weights a model has."""

    count: int
    """All of them."""
    largest: int
    """Those of the largest module, which ZeRO 3 gathers at once."""
    element: int
    """Bytes of one."""


def worst_moment(
    weights: Weights,
    traced: Traced,
    parallel: ParallelConfig,
    *,
    world: int,
    pieces: int,
    runtime: float,
    cuda: bool,
) -> Parts:
    """The parts at the moment of a step that holds most.

    Args:
        weights, traced: the model, and one pass of it.
        parallel: ZeRO stage and offloads.
        world: processes.
        pieces: passes of a process in a step.
        runtime: bytes that are there before any tensor.
        cuda: communication overlaps with computation, which takes a second bucket, and AdamW is fused.
    """
    states, held = _states(weights, parallel, world), _gradients(weights, parallel, world, pieces)
    bucket = min(weights.count, BUCKET) * weights.element * (2 if cuda else 1)
    spread = parallel.zero_stage == 3
    # of what ZeRO 3 has gathered, DeepSpeed keeps `LIVE` weights for the next use, and gathers one more module
    whole = weights.element * min(weights.count, LIVE + weights.largest) if spread and world > 1 else 0.0
    resident = bucket if spread else 0.0  # ZeRO 3 keeps its bucket
    transit = 2 * bucket / world if spread else bucket  # gradients on their way to the process that keeps them
    kept, update = traced.kept, _update(weights, parallel, world, cuda)

    def at(moment: str, gradients: float, gathered: float, working: float, *, logits: float = 0.0) -> Parts:
        updating = moment == "update"
        return Parts(
            parameters=states.parameters,
            gradients=gradients,
            optimizer=states.optimizer + (working if updating else 0.0),
            gathered=gathered,
            activations=0.0 if updating else kept,
            logits=logits,
            working=0.0 if updating else working,
            runtime=runtime,
            host=states.host + traced.moved,
            moment=moment,
        )

    # `traced` has the most that exists at a time; `kept` of it is in `activations`, the rest is the layer's at work
    moments = [
        at("forward", held.before, whole + resident + (bucket if whole else 0.0), traced.forward - kept),
        at("loss", held.before, whole + resident, 0.0, logits=traced.loss - kept),
        at("backward", held.most, whole + resident + transit, traced.backward - kept),
        at("update", held.after, resident, update),
    ]
    return max(moments, key=lambda found: found.total)


@dataclass(frozen=True, slots=True)
class _States:
    parameters: float
    optimizer: float
    host: float


def _states(weights: Weights, parallel: ParallelConfig, world: int) -> _States:
    """What lies between steps, by ZeRO stage: see the table above."""
    share = weights.count / world
    # 7 billion bfloat16 weights, 8 processes: parameters 14 GB, in stage 3 1.75 GB; master and moments 12 x 7 / 8 GB
    parameters = weights.element * (share if parallel.zero_stage == 3 else weights.count)
    master, host = (MASTER + MOMENTS) * share, 0.0
    if parallel.offload_optimizer:
        spread = parallel.zero_stage == 3  # which holds a float32 buffer for gradients there too
        master, host = 0.0, host + master + (MASTER + SUMMED * spread) * share
    if parallel.offload_parameters:
        parameters, host = 0.0, host + parameters
    return _States(parameters, master, host)


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of gradients held in the last pass: before its backward pass, at most during it, and after it."""

    before: float
    most: float
    after: float


def _gradients(weights: Weights, parallel: ParallelConfig, world: int, pieces: int) -> _Held:
    whole, share = weights.element * weights.count, SUMMED * weights.count / world
    several = pieces > 1
    # offloaded, gradients leave for the CPU as they come (the buckets they pass through are in `gathered`)
    if parallel.offload_optimizer and parallel.zero_stage > 1:
        return _Held(0.0, 0.0, 0.0)
    # stage 1 adds all gradients up on every process, and keeps its share when the last piece is reduced
    if parallel.zero_stage == 1:
        return _Held(whole if several else 0.0, whole, whole / world)
    # stage 2 reduces every piece: its share exists twice while one is added to the sum of those before
    if parallel.zero_stage == 2:
        return _Held(share if several else 0.0, share * (2 if several else 1), share)
    return _Held(share, share, share)


def _update(weights: Weights, parallel: ParallelConfig, world: int, fused: bool) -> float:
    """Gradients in float32 and the temporary of an AdamW that is not fused.

    For all of this process's weights, or ZeRO 3's subgroup of them.
    """
    if parallel.offload_optimizer:
        return 0.0
    share = weights.count / world
    return (1 if fused else 2) * MASTER * (min(share, SUBGROUP) if parallel.zero_stage == 3 else share)
