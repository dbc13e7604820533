"""Operations, communication and time of a step, from peak rates and how much of each is assumed to be reached.

Operations are those of `flops.ModelFlops` for the rows as they were packed, which leave out recomputation and copies of
the anchor. Both take time all the same: a recomputed layer runs its forward pass again, a third of forward + backward;
a tiled MLP runs that of its matrices again. What is neither a matrix product nor attention is counted in bytes of the
GPU's memory. Processes wait for each other in every pass, so that a step lasts as long as the costliest piece of each
of its passes, and each of them at least as long as the CPU takes to issue its kernels.

Bytes that a GPU sends in a step, P weights of e bytes, N GPUs, L layers, M passes:

    sequence parallelism   L (2 + recomputed share) x `ulysses.bytes_sent` for each document that is longer than a
                           piece, 0 for all others; exposed: attention waits for it
    ZeRO 1, 2              2 e P (N-1)/N            gradients reduced, updated weights gathered
                                                    (ZeRO 2 reduces in every pass: M + 1)
    ZeRO 3                 3 e P (N-1)/N M          weights gathered forward and backward, gradients reduced
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from anchorctx.flops import Machine, ModelFlops, head_dims
from anchorctx.layout import PackedLayout
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.plan.config import Assumptions
from anchorctx.plan.passes import Dealt, Passes


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
    hidden: int
    """Size of the hidden states."""
    vocabulary: int
    layers: int
    heads: int
    """Query heads of a layer."""
    kv_heads: int
    """Key and value heads of a layer."""
    head_dim: int
    """Of queries and keys."""
    value_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """Read it off a whole model, which may be on the meta device."""
        config, flops = model.config.get_text_config(), ModelFlops.of(model)
        head_dim, value_dim = head_dims(config)
        mlp = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and p.ndim > 1)
        return cls(
            flops=flops,
            weights=sum(p.numel() for p in model.parameters()),
            element=model.dtype.itemsize,
            mlp_share=min(6 * mlp / flops.per_token, 1.0),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=ulysses.key_heads(config),
            head_dim=head_dim,
            value_dim=value_dim,
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """What rows cost that are like some typical ones, all of one length and as they were packed."""

    length: int
    """Tokens of a row."""
    attention: float
    """Operations of attention of a row, the mean."""
    saved: float
    """Share of full attention's operations that the layouts leave out."""

    @classmethod
    def of(cls, rows: Sequence[PackedLayout], flops: ModelFlops) -> Rows:
        """Count them."""
        attention = sum(flops.attention(row) for row in rows) / len(rows)
        return cls(rows[0].length, attention, flops.attention_saved(rows))


@dataclass(frozen=True, slots=True)
class Job:
    """How a step's rows are spread over GPUs."""

    gpus: int
    rows: int
    """Rows of a step, over all GPUs."""
    micro_tokens: int
    """Tokens that a GPU runs at once; `parallel.sequence_parallel` of them share a longer document."""
    parallel: ParallelConfig
    every: int
    """Every n-th layer is recomputed; 0 is none."""
    tiled_mlp: bool
    """Do MLPs run in tiles, which recomputes them?"""

    @property
    def again(self) -> float:
        """Share of the layers whose forward pass runs twice."""
        return 1 / self.every if self.every else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs; operations are those of the whole step, bytes and seconds those of one GPU on average."""

    linear: float
    """Operations of matrices, forward and backward."""
    attention: float
    """Operations of attention."""
    saved: float
    """Share of full attention's operations that the layouts leave out."""
    pieces: float
    """Passes of a GPU."""
    computed: float
    """Tokens that all GPUs compute, copies of the anchor included."""
    long_documents: float
    """Documents of the step that are longer than a piece."""
    sequence_bytes: float
    """Sent for sequence parallelism, by which GPUs share long documents."""
    zero_bytes: float
    """Sent for ZeRO."""
    compute_seconds: float
    """In matrix products and attention, recomputation and copies included."""
    waiting_seconds: float
    """Waiting for the GPU that has the costliest piece, or for the CPU that issues its kernels."""
    exchange_seconds: float
    """Waiting for sequence parallelism's exchanges."""
    zero_seconds: float
    """Waiting for ZeRO's communication, as far as computation does not hide it."""
    tokens: int
    """Tokens of the step as packed, over all GPUs."""

    @property
    def seconds(self) -> float:
        """The step's time."""
        return self.compute_seconds + self.waiting_seconds + self.exchange_seconds + self.zero_seconds

    def utilisation(self, gpus: int, peak: float) -> float:
        """MFU: operations of the layouts over what the GPUs could do meanwhile."""
        return (self.linear + self.attention) / (gpus * peak * self.seconds)


def cost(shape: Shape, rows: Rows, dealt: Dealt, job: Job, machine: Machine, assume: Assumptions) -> Cost:
    """The cost of a step of `job.rows` rows.

    Args:
        shape: the model.
        rows: what a row costs.
        dealt: typical steps of such rows, dealt out to the GPUs.
        job: how the step is spread.
        machine, assume: peak rates, and how much of them is reached.
    """
    sent, work, waits, exchange = np.mean([_passes(shape, step, job, machine, assume) for step in dealt.steps], axis=0)
    pieces = float(np.mean(dealt.pieces))
    zero_bytes = _zero_bytes(shape, job, pieces)
    zero = zero_bytes / _rate(job.gpus, machine, assume)
    return Cost(
        linear=shape.flops.per_token * rows.length * job.rows,
        attention=rows.attention * job.rows,
        saved=rows.saved,
        pieces=pieces,
        computed=float(np.mean([sum(passes.tokens.sum() for passes in step) for step in dealt.steps])),
        long_documents=dealt.long_documents,
        sequence_bytes=float(sent),
        zero_bytes=zero_bytes,
        compute_seconds=float(work),
        waiting_seconds=float(waits),
        exchange_seconds=float(exchange),
        # computation hides no more of ZeRO's communication than it lasts itself
        zero_seconds=max((1 - assume.overlap) * zero, zero - float(work)),
        tokens=rows.length * job.rows,
    )


def attention_of(flops: ModelFlops, tokens: np.ndarray) -> np.ndarray:
    """(n,) float64 operations of attention, forward and backward, of documents of so many tokens (n,)."""
    pairs = np.zeros(len(tokens))
    for window in set(flops.windows):  # as `PackedLayout.attention_pairs` has it
        seen = tokens if window is None else np.minimum(tokens, window)
        pairs += (seen * (seen + 1) / 2 + (tokens - seen) * seen) * flops.windows.count(window)
    return flops.per_pair * pairs


def _passes(
    shape: Shape, step: Sequence[Passes], job: Job, machine: Machine, assume: Assumptions
) -> tuple[float, float, float, float]:
    """Bytes that a GPU sends for sequence parallelism, seconds at work, waiting for others, and in exchanges."""
    sequence, link = job.parallel.sequence_parallel, _rate(job.parallel.sequence_parallel, machine, assume)
    least = assume.layer_ms / 1000 * shape.layers * (2 + job.again)
    sent = work = waits = exchange = 0.0
    token, pair = _seconds(shape, job, machine, assume)
    for passes in step:
        size = sequence if passes.spread else 1
        seconds = passes.tokens * token + passes.attention * pair
        mean, longest = seconds.mean(1) / size, np.maximum(seconds.max(1) / size, least)  # (M,)
        work, waits = work + mean.sum(), waits + (longest - mean).sum()
        if passes.spread:
            exchanged = _exchanged(shape, passes.tokens, sequence) * (2 + job.again)
            sent, exchange = sent + exchanged.mean(1).sum(), exchange + exchanged.max(1).sum() / link
    return sent, work, waits, exchange


def _seconds(shape: Shape, job: Job, machine: Machine, assume: Assumptions) -> tuple[float, float]:
    """Seconds of a GPU for a token, and for an operation of attention, forward and backward."""
    # with every layer recomputed 4/3 of the operations
    again, again_linear = 1 + job.again / 3, 1 + (job.again + (shape.mlp_share if job.tiled_mlp else 0.0)) / 3
    moved = shape.layers * shape.hidden * assume.layer_bytes * again + shape.vocabulary * assume.logit_bytes
    pair = again / min(machine.peak * assume.attention, assume.attention_tflops * 1e12)
    keys = shape.flops.per_pair * shape.layers * assume.attention_keys
    token = shape.flops.per_token * again_linear / (machine.peak * assume.linear) + moved / machine.bandwidth
    return token + keys * pair, pair


def _exchanged(shape: Shape, tokens: np.ndarray, sequence: int) -> np.ndarray:
    """(M, G) bytes that a GPU sends in all layers, one way, for long documents: q, k, v and the output."""
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "element": shape.element}
    # linear in the tokens, which are padded to a multiple of the group
    once = ulysses.bytes_sent(tokens=sequence, sequence=sequence, **sizes) * shape.layers
    return -(-tokens // sequence) * float(once)


def _zero_bytes(shape: Shape, job: Job, pieces: float) -> float:
    """Bytes that a GPU sends in a step: a reduce-scatter or all-gather in a ring sends (N-1)/N of all weights.

    ZeRO (arXiv 1910.02054), section 7: 2 P for stages 1 and 2, 3 P for stage 3, for each reduction of gradients.
    """
    all_weights = shape.weights * shape.element * (job.gpus - 1) / job.gpus
    by_stage = {1: 2, 2: pieces + 1, 3: 3 * pieces}
    return all_weights * by_stage[job.parallel.zero_stage]


def _rate(group: int, machine: Machine, assume: Assumptions) -> float:
    """Bytes a second that a GPU sends within a group of so many GPUs."""
    # a group that spans machines waits for its slowest link, the network
    inside = group <= assume.gpus_per_machine
    return assume.link * (machine.link if inside else min(machine.link, assume.network_gb * 1e9))
