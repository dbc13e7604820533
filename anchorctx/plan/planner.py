"""Plans one configuration: does it fit into the GPUs, and how long does a step take?

The three questions are answered by `plan.trace` (activations), `plan.memory` (states by ZeRO stage, the worst moment)
and `plan.compute` (operations, bytes sent, seconds)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.flops import GIB
from anchorctx.layout import PackedLayout
from anchorctx.models.config import ActivationStore, MemoryConfig
from anchorctx.models.presets import planned_config
from anchorctx.parallel import ulysses
from anchorctx.parallel.config import ParallelConfig
from anchorctx.parallel.mesh import check_mesh
from anchorctx.plan.compute import Cost, Job, Shape, cost
from anchorctx.plan.config import PlanConfig
from anchorctx.plan.memory import Parts, Weights, worst_moment
from anchorctx.plan.rows import typical_rows
from anchorctx.plan.trace import Traced, meta_model, trace


@dataclass(frozen=True, slots=True)
class Plan:
    """What a configuration needs and costs."""

    parallel: ParallelConfig
    """ZeRO stage, sequence parallelism, offloading."""
    memory: MemoryConfig
    """Recomputation, tiles, offloading of activations."""
    job: Job
    """How the step is spread over the GPUs."""
    parts: Parts
    """Bytes of one GPU at the worst moment."""
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
        rows = typical_rows(config.corpus, self._row_length())
        self.rows = tuple(config.pattern.apply(row) for row in rows)
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        text = self.hf_config.get_text_config()
        model = meta_model(self.hf_config, text.num_hidden_layers, self.dtype)
        self.weights, self.shape = weights_of(model), Shape.of(model)
        self._trace = functools.cache(self._traced)

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.rows[0].length

    def plan(self, parallel: ParallelConfig, memory: MemoryConfig) -> Plan:
        """Plan one configuration; UserError when it cannot exist on this many GPUs."""
        parallel.validate()
        memory.validate()
        job = self.job(parallel, memory)
        config, assume = self.config, self.config.assume
        parts = worst_moment(
            self.weights,
            self.traced(parallel, memory),
            parallel,
            world=config.gpus,
            accumulation=job.accumulation,
            runtime=assume.runtime_gib * GIB,
            overlap=True,
        )
        return Plan(parallel, memory, job, parts, self.cost(job), config.usable)

    def job(self, parallel: ParallelConfig, memory: MemoryConfig, gpus: int | None = None) -> Job:
        """How the step is spread; UserError for a mesh or batch that does not multiply out."""
        gpus = gpus or self.config.gpus
        check_mesh(gpus, parallel.sequence_parallel)
        ulysses.check_sizes(self.hf_config, parallel.sequence_parallel, gpus)
        groups = gpus // parallel.sequence_parallel
        # 8 GPUs of which 4 share a row, micro_rows=1: 2 groups, so a step is a multiple of 2 rows
        rows = self._rows_per_step(groups * self.config.micro_rows)
        return Job(gpus, rows, self.config.micro_rows, parallel, memory.checkpoint_every, bool(memory.mlp_tile))

    def cost(self, job: Job) -> Cost:
        """Operations, communication and time of a step."""
        return cost(self.shape, self.rows, job, self.config.machine, self.config.assume)

    def inputs(self, parallel: ParallelConfig) -> float:
        """Bytes of the inputs of all layers, (B, T, D) each, of one micro-batch in one process."""
        text = self.hf_config.get_text_config()
        tokens = self.config.micro_rows * self.row_length / parallel.sequence_parallel
        return text.num_hidden_layers * tokens * text.hidden_size * self.dtype.itemsize

    def least(self, parallel: ParallelConfig, memory: MemoryConfig) -> float:
        """Bytes that a configuration needs at least, without tracing it: its states and the layers' inputs.

        A layer that is not recomputed keeps eight times as much as its input (q, k, v, o, two norms, the MLP's).
        """
        # checkpoint_every=2: half of the layers keep their input alone, the other half eight times as much
        again = 1 / memory.checkpoint_every if memory.checkpoint_every else 0.0
        held = again if memory.offload_activations is ActivationStore.device else 0.0
        kept = self.inputs(parallel) * (held + (1 - again) * 8)
        nothing = Traced(kept, 0.0, kept, kept, kept)
        runtime = self.config.assume.runtime_gib * GIB
        return worst_moment(
            self.weights, nothing, parallel, world=self.config.gpus, accumulation=1, runtime=runtime, overlap=True
        ).total

    def traced(self, parallel: ParallelConfig, memory: MemoryConfig) -> Traced:
        """The trace of one micro-batch; of equal settings only once."""
        # a dataclass with a default `eq` cannot be a key of the cache, its fields can
        fields = {name: getattr(memory, name) for name in memory.__dataclass_fields__ if name != "sharded_loading"}
        return self._trace(memory.checkpoint_every, parallel.sequence_parallel, tuple(fields.items()))

    def _traced(self, every: int, sequence: int, fields: tuple[tuple[str, object], ...]) -> Traced:
        config = self.config
        # activations depend on a row's length and hardly on its documents, so that one row stands for all
        layouts: tuple[PackedLayout, ...] = (self.rows[0],) * config.micro_rows
        return trace(
            self.hf_config,
            layouts,
            dtype=self.dtype,
            rope_dtype=config.model.rope_dtype,
            memory=dataclasses.replace(MemoryConfig(), **dict(fields)),  # type: ignore[arg-type]
            every=every,
            sequence=sequence,
            cuda=True,
        )

    def _row_length(self) -> int | None:
        """The configured length; None leaves it to the packed set."""
        if self.config.row_length is not None:
            return self.config.row_length
        return None if self.config.corpus.packed is not None else self.config.model.max_length

    def _rows_per_step(self, unit: int) -> int:
        """Rows of a step, a multiple of `unit`, the rows that all GPUs run at once."""
        tokens = self.config.tokens_per_step
        if tokens is None:
            return unit
        if tokens % (unit * self.row_length):
            near = max(round(tokens / (unit * self.row_length)), 1) * unit * self.row_length
            raise UserError(
                f"tokens_per_step={tokens} must be a multiple of {unit * self.row_length} (row length "
                f"{self.row_length} x {unit} rows at once on {self.config.gpus} GPUs): use {near}"
            )
        return tokens // self.row_length


def weights_of(model: PreTrainedModel) -> Weights:
    """Counts of a whole model, which may be on the meta device."""
    # by identity, since a tied head is the same parameter under a second name
    counts = {id(p): p.numel() for p in model.parameters()}
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return Weights(sum(counts.values()), max(own), model.dtype.itemsize)
