"""Plans one configuration: does it fit into the GPUs, and how long does a step take?

`plan.passes` cuts typical rows into the pieces of each GPU. `plan.trace` then counts activations, `plan.memory` states
by ZeRO stage and the worst moment, `plan.compute` operations, bytes sent and seconds."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from anchorctx.data.pieces import AnchorVisible, piece_tokens
from anchorctx.errors import UserError
from anchorctx.flops import GIB
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models.config import ActivationStore, MemoryConfig
from anchorctx.models.presets import planned_config
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.mesh import check_mesh
from anchorctx.plan.compute import Cost, Job, Rows, Shape, attention_of, cost
from anchorctx.plan.config import PlanConfig
from anchorctx.plan.memory import Parts, Weights, worst_moment
from anchorctx.plan.passes import Dealt, Documents, deal_steps
from anchorctx.plan.rows import typical_rows
from anchorctx.plan.trace import Traced, meta_model, trace


@dataclass(frozen=True, slots=True)
class Held:
    """A pass that may hold most."""

    tokens: int
    """Of the piece or the document, copies of the anchor included."""
    processes: int
    """That share them."""
    document: bool
    """Is it the longest document, which fits no piece?"""

    @property
    def each(self) -> int:
        """Tokens that a process holds."""
        return -(-self.tokens // self.processes)

    def __str__(self) -> str:
        """In words."""
        if not self.document:
            return f"a piece of {self.tokens:,} tokens"
        shared = f", {self.each:,} on each of {self.processes} GPUs" if self.processes > 1 else " on one GPU"
        return f"the longest document, {self.tokens:,} tokens{shared}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a configuration needs and costs."""

    parallel: ParallelConfig
    """ZeRO stage, sequence parallelism, offloading."""
    memory: MemoryConfig
    """Recomputation, tiles, offloading of activations."""
    job: Job
    """How the step is spread over the GPUs."""
    held: Held
    """The pass that holds most."""
    parts: Parts
    """Bytes of one GPU at the worst moment of that pass."""
    cost: Cost
    """Operations, bytes sent and seconds of a step."""
    usable: float
    """Bytes of a GPU that the parts may take."""

    @property
    def fits(self) -> bool:
        """Is there room for the worst moment?"""
        return self.parts.total <= self.usable


class Planner:
    """Plans configurations of one model, corpus and kind of GPU.

    Tracing takes seconds, so traces are kept: configurations that differ only in ZeRO stage or offloading share one.
    """

    def __init__(self, config: PlanConfig) -> None:
        """UserError for a model that cannot be planned, and for settings that contradict each other."""
        config.validate()
        self.config = config
        self.hf_config = planned_config(config.model)
        anchored = typical_rows(config.corpus, self._row_length())
        rows = tuple(config.pattern.apply(row) for row in anchored)
        self.row_length = rows[0].length
        shared = config.anchor_visible is AnchorVisible.always
        self.anchor_len = anchored[0].anchor_len
        self.documents = Documents.of(rows, shared, self._longest(self.anchor_len))
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        text = self.hf_config.get_text_config()
        model = meta_model(self.hf_config, text.num_hidden_layers, self.dtype)
        self.weights, self.shape = weights_of(model), Shape.of(model)
        self.rows = Rows.of(rows, self.shape.flops)
        self._trace, self._deal = functools.cache(self._traced), functools.cache(self._dealt)

    def plan(self, parallel: ParallelConfig, memory: MemoryConfig, micro_tokens: int | None = None) -> Plan:
        """Plan one configuration, with the configured `micro_tokens` unless others are given.

        UserError when it cannot exist on this many GPUs.
        """
        parallel.validate()
        memory.validate()
        job = self.job(parallel, memory, micro_tokens)
        found = [(held, self.parts(job, memory, held)) for held in self.held(job)]
        held, parts = max(found, key=lambda pair: pair[1].total)
        return Plan(parallel, memory, job, held, parts, self.cost(job), self.config.usable)

    def parts(self, job: Job, memory: MemoryConfig, held: Held) -> Parts:
        """Bytes of one GPU at the worst moment of a pass that holds these tokens."""
        return worst_moment(
            self.weights,
            self.traced(memory, held),
            job.parallel,
            world=job.gpus,
            pieces=max(self.dealt(job).pieces),
            runtime=self.config.assume.runtime_gib * GIB,
            cuda=True,
        )

    def held(self, job: Job) -> list[Held]:
        """The passes that may hold most: a full piece, and the longest document where it fits none."""
        # pieces of 8,192 and a document of 40,000 that 4 GPUs share: 8,192 tokens, or 10,000 of the document
        longest, most, sequence = self.documents.longest, self.dealt(job).most, job.parallel.sequence_parallel
        long = longest > job.micro_tokens - self.documents.shared
        found = [Held(longest + self.documents.shared, sequence, document=True)] if long else []
        if most and (not long or sequence > 1):
            found.append(Held(min(job.micro_tokens, most + self.documents.shared), 1, document=False))
        return found or [Held(1, 1, document=False)]

    def whole_row(self, job: Job) -> Held | None:
        """A document as long as a row, None where the longest is no shorter or would be a piece like others."""
        tokens = self.row_length
        if tokens <= max(self.documents.longest + self.documents.shared, job.micro_tokens):
            return None
        return Held(tokens, job.parallel.sequence_parallel, document=True)

    def job(self, parallel: ParallelConfig, memory: MemoryConfig, micro_tokens: int | None = None) -> Job:
        """How the step is spread; UserError for a mesh or batch that does not multiply out."""
        config, sequence = self.config, parallel.sequence_parallel
        check_mesh(config.gpus, sequence)
        ulysses.check_sizes(self.hf_config, sequence, config.gpus)
        wanted = micro_tokens or config.micro_tokens
        tokens = piece_tokens(wanted, self.row_length, config.pattern, sequence, self.anchor_len)
        every = memory.checkpoint_every
        return Job(config.gpus, self._rows_per_step(), tokens, parallel, every, bool(memory.mlp_tile))

    def dealt(self, job: Job) -> Dealt:
        """Typical steps, dealt out to the GPUs; of equal jobs only once."""
        return self._deal(job.rows, job.micro_tokens, job.gpus, job.parallel.sequence_parallel)

    def cost(self, job: Job, dealt: Dealt | None = None) -> Cost:
        """Operations, communication and time of a step, with the same passes as in `dealt` if given."""
        return cost(self.shape, self.rows, dealt or self.dealt(job), job, self.config.machine, self.config.assume)

    def inputs(self, tokens: float) -> float:
        """Bytes of the inputs of all layers for so many tokens."""
        text = self.hf_config.get_text_config()
        return text.num_hidden_layers * tokens * text.hidden_size * self.dtype.itemsize

    def least(self, job: Job, memory: MemoryConfig) -> float:
        """Bytes that a configuration needs at least, without tracing it: its states and the layers' inputs.

        A layer that is not recomputed keeps eight times as much as its input (q, k, v, o, two norms, the MLP's).
        """
        # checkpoint_every=2: half of the layers keep their input alone, the other half eight times as much
        again = 1 / memory.checkpoint_every if memory.checkpoint_every else 0.0
        held = again if memory.offload_activations is ActivationStore.device else 0.0
        kept = self.inputs(max(found.each for found in self.held(job))) * (held + (1 - again) * 8)
        nothing = Traced(kept, 0.0, kept, kept, kept)
        runtime = self.config.assume.runtime_gib * GIB
        return worst_moment(
            self.weights, nothing, job.parallel, world=job.gpus, pieces=1, runtime=runtime, cuda=True
        ).total

    def traced(self, memory: MemoryConfig, held: Held) -> Traced:
        """The trace of one pass; of equal settings only once."""
        # a dataclass with a default `eq` cannot be a key of the cache, its fields can
        fields = {name: getattr(memory, name) for name in memory.__dataclass_fields__ if name != "sharded_loading"}
        return self._trace(held.tokens, held.processes, tuple(fields.items()))

    def _traced(self, tokens: int, processes: int, fields: tuple[tuple[str, object], ...]) -> Traced:
        # activations of a GPU's kernels depend on the tokens and not on where documents begin
        shared = self.documents.shared
        offsets = (0, shared, tokens) if 0 < shared < tokens else (0, tokens)
        memory = dataclasses.replace(MemoryConfig(), **dict(fields))  # type: ignore[arg-type]
        return trace(
            self.hf_config,
            (PackedLayout(offsets, shared if len(offsets) > 2 else 0),),
            dtype=self.dtype,
            rope_dtype=self.config.model.rope_dtype,
            memory=memory,
            every=memory.checkpoint_every,
            sequence=processes,
            cuda=True,
        )

    def _dealt(self, rows: int, micro_tokens: int, gpus: int, sequence: int) -> Dealt:
        flops = self.shape.flops
        attention = functools.partial(attention_of, flops)
        spread = {"rows": rows, "micro_tokens": micro_tokens, "gpus": gpus, "sequence": sequence}
        return deal_steps(self.documents, attention, flops.token_cost, **spread)

    def _longest(self, anchor: int) -> int:
        """Tokens of the longest document that there may be, 0 where the rows' own count."""
        if self.config.pattern is Pattern.full or self.config.corpus.longest is None:
            return 0
        return min(self.config.corpus.longest, self.row_length - anchor)

    def _row_length(self) -> int | None:
        """The configured length; None leaves it to the packed set."""
        if self.config.row_length is not None:
            return self.config.row_length
        return None if self.config.corpus.packed is not None else self.config.model.max_length

    def _rows_per_step(self) -> int:
        """Rows of a step, as `TrainConfig.rows_per_step` has it."""
        tokens, length = self.config.tokens_per_step, self.row_length
        if tokens is None:
            return self.config.gpus
        if tokens % length:
            near = max(round(tokens / length), 1) * length
            raise UserError(f"tokens_per_step={tokens} must be a multiple of the row length, {length}: use {near}")
        return tokens // length


def shorter(plan: Plan) -> str | None:
    """How to make the pass that holds most smaller, in steps of 1,024 tokens; None where none of them would fit."""
    # activations and temporaries grow with the tokens, states do not
    parts, held = plan.parts, plan.held
    growing = parts.activations + parts.working + parts.logits
    tokens = int(held.tokens * max(plan.usable - parts.total + growing, 0.0) / growing) // 1024 * 1024
    if not tokens:
        return None
    if not held.document:
        return f"micro_tokens={tokens}"
    return f"documents of at most {tokens:,} tokens (anchorctx prepare cuts those longer than its row_length)"


def weights_of(model: PreTrainedModel) -> Weights:
    """Counts of a whole model, which may be on the meta device."""
    # by identity, since a tied head is the same parameter under a second name
    counts = {id(p): p.numel() for p in model.parameters()}
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return Weights(sum(counts.values()), max(own), model.dtype.itemsize)
