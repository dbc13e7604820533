"""Operations, communication and time of a step, from peak rates and how much of each is assumed to be reached.

Operations are those of `flops.ModelFlops`, which leave recomputation out. It takes time all the same: a recomputed
layer runs its forward pass again, a third of forward + backward; a tiled MLP runs that of its matrices again.

Bytes that a GPU sends in a step, P weights of e bytes, N GPUs, L layers, M micro-batches:

    sequence parallelism   M L (2 + recomputed share) x `ulysses.bytes_sent`, exposed: attention waits for it
    ZeRO 1, 2              2 e P (N-1)/N            gradients reduced, updated weights gathered
                                                    (ZeRO 2 reduces in every micro-batch: M + 1)
    ZeRO 3                 3 e P (N-1)/N M          weights gathered forward and backward, gradients reduced
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from anchorctx.flops import Machine, ModelFlops
from anchorctx.layout import PackedLayout
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.plan.config import Assumptions


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model that decide its cost."""

    flops: ModelFlops
    """Operations of a token and of an attention score."""
    weights: int
    """All weights."""
    element: int
    """Bytes of a weight and of an activation."""
    mlp_share: float
    """Share of the matrices' operations that MLPs take, 0 to 1."""
    layers: int
    heads: int
    """Query heads of a layer."""
    kv_heads: int
    """Key and value heads of a layer."""
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """Read it off a whole model, which may be on the meta device."""
        config, flops = model.config.get_text_config(), ModelFlops.of(model)
        heads = config.num_attention_heads
        mlp = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and p.ndim > 1)
        return cls(
            flops=flops,
            weights=sum(p.numel() for p in model.parameters()),
            element=model.dtype.itemsize,
            mlp_share=min(6 * mlp / flops.per_token, 1.0),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=ulysses.key_heads(config),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """How a step's rows are spread over GPUs, `parallel.sequence_parallel` of which share each row."""

    gpus: int
    rows: int
    """Rows of a step, over all GPUs."""
    micro_rows: int
    """Rows of a micro-batch, in each group of GPUs that share them."""
    parallel: ParallelConfig
    every: int
    """Every n-th layer is recomputed; 0 is none."""
    tiled_mlp: bool
    """Do MLPs run in tiles, which recomputes them?"""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        # 16 rows on 8 GPUs that share rows by fours, one row at a time: 16 * 4 / (8 * 1) = 8 micro-batches in each of
        # the two groups
        return self.rows * self.parallel.sequence_parallel // (self.gpus * self.micro_rows)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs; operations are those of the whole step, bytes and seconds those of one GPU."""

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
    """In matrix products and attention, recomputation included."""
    exchange_seconds: float
    """Waiting for sequence parallelism's exchanges."""
    zero_seconds: float
    """Waiting for ZeRO's communication, as far as computation does not hide it."""
    tokens: int
    """Tokens of the step, over all GPUs."""

    @property
    def seconds(self) -> float:
        """The step's time."""
        return self.compute_seconds + self.exchange_seconds + self.zero_seconds

    def utilisation(self, gpus: int, peak: float) -> float:
        """MFU: operations of the layouts over what the GPUs could do meanwhile."""
        return (self.linear + self.attention) / (gpus * peak * self.seconds)


def cost(shape: Shape, rows: Sequence[PackedLayout], job: Job, machine: Machine, assume: Assumptions) -> Cost:
    """The cost of a step of `job.rows` rows.

    Args:
        shape: the model.
        rows: typical rows, all of the same length; attention costs their mean.
        job: how the step is spread.
        machine, assume: peak rates, and how much of them is reached.
    """
    tokens = rows[0].length
    attention = sum(shape.flops.attention(row) for row in rows) / len(rows) * job.rows
    linear = shape.flops.per_token * tokens * job.rows
    again = 1 / job.every if job.every else 0.0  # share of the layers whose forward pass runs twice
    again_linear = again + (shape.mlp_share if job.tiled_mlp else 0.0)
    # seconds = operations / (GPUs x peak x share reached); with every layer recomputed 4/3 of the operations
    rate = job.gpus * machine.peak
    compute = linear * (1 + again_linear / 3) / (rate * assume.linear)
    compute += attention * (1 + again / 3) / (rate * assume.attention)
    sequence_bytes, zero_bytes = _sequence_bytes(shape, tokens, job, again), _zero_bytes(shape, job)
    zero = zero_bytes / _rate(job.gpus, machine, assume)
    return Cost(
        linear=linear,
        attention=attention,
        saved=shape.flops.attention_saved(rows),
        sequence_bytes=sequence_bytes,
        zero_bytes=zero_bytes,
        compute_seconds=compute,
        exchange_seconds=sequence_bytes / _rate(job.parallel.sequence_parallel, machine, assume),
        # computation hides no more of ZeRO's communication than it lasts itself
        zero_seconds=max((1 - assume.overlap) * zero, zero - compute),
        tokens=tokens * job.rows,
    )


def _sequence_bytes(shape: Shape, tokens: int, job: Job, again: float) -> float:
    """Bytes that a GPU sends in a step: each layer exchanges q, k, v and its output, forward and backward."""
    one_pass = ulysses.bytes_sent(
        tokens=tokens,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        element=shape.element,
        sequence=job.parallel.sequence_parallel,
        rows=job.micro_rows,
    )
    return one_pass * shape.layers * (2 + again) * job.accumulation


def _zero_bytes(shape: Shape, job: Job) -> float:
    """Bytes that a GPU sends in a step: a reduce-scatter or all-gather in a ring sends (N-1)/N of all weights.

    ZeRO (arXiv 1910.02054), section 7: 2 P for stages 1 and 2, 3 P for stage 3, for each reduction of gradients.
    """
    all_weights = shape.weights * shape.element * (job.gpus - 1) / job.gpus
    by_stage = {1: 2, 2: job.accumulation + 1, 3: 3 * job.accumulation}
    return all_weights * by_stage[job.parallel.zero_stage]


def _rate(group: int, machine: Machine, assume: Assumptions) -> float:
    """Bytes a second that a GPU sends within a group of so many GPUs."""
    # a group that spans machines waits for its slowest link, the network
    inside = group <= assume.gpus_per_machine
    return assume.link * (machine.link if inside else min(machine.link, assume.network_gb * 1e9))
