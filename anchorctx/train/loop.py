"""The training loop: packed rows in, checkpoints and metrics out.

The loss of a step is the sum of all trained tokens' losses over the global number (weight) of them, whatever the
number of processes and pieces: never a mean of means. The global weight is known in advance from the
packed set's index, so it costs no communication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from anchorctx import interrupt
from anchorctx.data.loader import Batch, RowLoader, Step, check_trained, validation_batches
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.pieces import AnchorVisible, Cutting
from anchorctx.errors import InterruptedRun, UserError
from anchorctx.flops import ModelFlops, whole_shape
from anchorctx.models import check_attention, check_length, check_vocabulary
from anchorctx.models.loss import check_loss
from anchorctx.models.router import Routed
from anchorctx.parallel import dist, extension, presence, ulysses
from anchorctx.parallel.mesh import Mesh
from anchorctx.parallel.sharder import Shard, shard_batch
from anchorctx.parallel.ulysses import exchanged_bytes
from anchorctx.records.locks import sole_command
from anchorctx.records.manifest import build_manifest, write_manifest
from anchorctx.train.balance import Balance
from anchorctx.train.build import build_model, build_module
from anchorctx.train.callbacks import Callback, JsonlMetrics, Probe, ProgressBar
from anchorctx.train.checkpoints import folders, read, run
from anchorctx.train.config import TrainConfig
from anchorctx.train.dashboards import check_dashboards, dashboards
from anchorctx.train.determinism import deterministic
from anchorctx.train.engine import build_engine, set_lr
from anchorctx.train.health import Health
from anchorctx.train.meter import Meter
from anchorctx.train.model_folder import write_model_folder
from anchorctx.train.tokenizer import trained_tokenizer


def train(config: TrainConfig, probes: Sequence[Probe] = ()) -> Path:
    """Run (or resume) a training run in this process, one of those that torchrun started; returns `out_dir`.

    `probes` measure the live model on the way. Raises InterruptedRun after SIGTERM, SIGINT, SIGUSR1, SIGHUP or
    `max_hours`, once a checkpoint is written; or at once, where no step was begun. Raises LostProcesses where others of
    the job have failed or do not answer.
    """
    config.validate()
    with interrupt.listening():
        interrupt.limit(config.max_hours)
        if config.parallel.offload_optimizer:
            extension.folder()  # refuses what it would find out only behind the model's loading
        ranks = dist.start(config.parallel.timeout_s + presence.MARGIN_S)
        try:
            lock = sole_command(Path(config.out_dir)) if ranks.is_main else contextlib.nullcontext()
            with presence.presence(ranks, config.parallel.timeout_s), lock, deterministic(config.deterministic):
                trainer = Trainer(config, ranks, probes)
                try:
                    trainer.fit()
                finally:
                    trainer.writer.close()
        finally:
            ulysses.release()
            dist.stop()
    return Path(config.out_dir)


class Trainer:
    """One run: its model, data and place in both."""

    def __init__(self, config: TrainConfig, ranks: dist.Ranks, probes: Sequence[Probe] = ()) -> None:
        self.probes = [probe for probe in probes if probe.every]
        self.config, self.ranks, self.out_dir = config, ranks, Path(config.out_dir)
        if ranks.is_main:
            check_dashboards(config.logging)
        self.packed = PackedSet.open(config.data.train, verify=config.data.verify and ranks.is_main)
        self.validation = self._open_validation()
        check_trained(self.packed, "train")
        if self.validation is not None:
            check_trained(self.validation, "validation", config.validation_rows)
        self.mesh = Mesh.of(ranks, config.parallel.sequence_parallel)
        rows = config.rows_per_step(self.packed.row_length)
        tokens = config.piece_tokens(self.packed.row_length, int(self.packed.manifest["anchor_len"]))
        self.run_id = folders.run_id(self.out_dir)
        self.resumed = run.resume(config, self.packed, self.run_id, ranks)
        self.tokenizer = trained_tokenizer(config, self.packed)
        set_seed(config.seed)
        model = build_model(config, self.mesh)
        if self.resumed is not None:
            run.check_model(self.resumed, model)
        check_length(model.config, self.packed.row_length)
        check_vocabulary(model, self.packed.manifest["vocab_size"])
        check_attention(model, config.model.attention, ranks.device)
        check_loss(model, sharded=config.parallel.zero_stage == 3)
        for probe in self.probes:
            probe.check(model, self.tokenizer)
        if self.probes and self.mesh.sequence > 1:
            raise UserError(
                f"live evaluations cannot run with parallel.sequence_parallel={self.mesh.sequence}, which spreads "
                "long documents over processes: set live.every=0 and evaluate exported checkpoints"
            )
        flops = ModelFlops.of(model)
        self.meter = Meter(flops, ranks)
        self.cutting = Cutting(
            tokens,
            ranks.rank,
            ranks.world,
            config.parallel.sequence_parallel,
            flops.token_cost,
            shared_anchor=config.anchor_visible is AnchorVisible.always,
        )
        self.loader = RowLoader(
            self.packed,
            config.pattern,
            self.cutting,
            rows_per_step=rows,
            seed=config.seed,
            shuffle=config.data.shuffle,
            balance=config.data.balance,
        )
        state = self.resumed.state if self.resumed else None
        self.step, self.tokens = (state.step, state.tokens) if state else (0, 0)
        self.loader.resume_at(self.step, self.tokens, state.rows if state else None)
        self._write_run(model)
        self.engine = build_engine(
            build_module(config, model, self.mesh, tokens, self.packed.row_length),
            config.parallel,
            config.optim,
            ranks,
            dtype=model.dtype,
        )
        if self.resumed is not None:
            read.load(self.engine, self.resumed, ranks)
        self.writer = run.writer(config, self.run_id, ranks, self.resumed)
        found = state.health if state else None
        self.health = Health(config.health, self.engine, self.packed, ranks, self.out_dir, step=self.step, state=found)
        router = self.engine.module.router
        self.balance = Balance(router, ranks.device, state.router_fractions if state else None) if router else None
        self.callbacks = self._callbacks()
        self.stopping = False  # all processes agreed to end

    def fit(self) -> None:
        """Train to the last step, with validation, metrics and checkpoints on the way."""
        if self.step == 0:
            self._report(self.validate() | self.probe(always=True))
        interrupt.defer()
        self._steps()
        if self.step < self.config.steps:
            code = int(dist.highest(interrupt.requested(), self.ranks.device))  # that of the ranks that were told
            raise InterruptedRun(
                f"{interrupt.reason(code)} after step {self.step} of {self.config.steps}, with a checkpoint in "
                f"{self.out_dir}",
                code,
                "type the same command to go on",
            )

    def _steps(self) -> None:
        """Train to the last step, or until somebody asks for the end."""
        while self.step < self.config.steps and not self.stopping:
            presence.begin(f"step {self.step + 1}")
            row = self.train_step()
            presence.begin(f"what follows step {self.step}")
            last = self.step == self.config.steps
            if last or self._due(self.config.validate_every):
                row |= self.validate()
            row |= (probed := self.probe(always=last))
            if last or self._due(self.config.logging.every) or "val/loss" in row or probed:
                self._report(row)
            if last or self.stopping or self._due(self.config.checkpoint.every):
                presence.begin(f"the checkpoint of step {self.step}")
                self.save()
            self.meter.go()
        for callback in self.callbacks:
            callback.close()
        dist.barrier()  # nobody leaves, which makes torchrun end the others, before all have closed

    def train_step(self) -> dict[str, float]:
        """One step, whose update `health` makes or leaves out; returns its metrics."""
        waited = time.perf_counter()
        step = self.loader.step(self.step)
        self.loading = time.perf_counter() - waited
        set_lr(self.engine, lr := self.config.optim.lr_at(self.step, self.config.steps))
        loss, row = self._forward_backward(step)
        row |= {"train/lr": lr} | self.health.update(loss, self.step + 1, step.rows)
        self.step += 1
        self.tokens += step.trained_tokens
        self.health.check_weights(self.step)
        row |= self.meter.row(step, self.loading)
        return row | {"perf/waiting_seconds": self.waiting, "perf/exchanged_bytes": self.exchanged}

    def _exchanged(self, batch: Batch) -> float:
        """Bytes that this process sends inside attention for a batch."""
        if not batch.spread:
            return 0.0
        model, every = self.engine.module.model, self.config.memory.checkpoint_every
        again = 1 / every if every else 0.0
        return exchanged_bytes(model.config, batch.layouts[0].length, model.dtype.itemsize, self.mesh.sequence, again)

    def _forward_backward(self, step: Step) -> tuple[float, dict[str, float]]:
        """Accumulate the step's gradients; returns its loss and metrics. The caller makes the update."""
        if self.balance is not None:
            self.balance.begin(step.layouts)
            if self.balance.fractions is None:
                self.balance.measure(self._routed(step))
        weight = step.weight or 1.0  # rows without a trained token have a loss of 0 and no gradient
        scale = self.ranks.world / weight  # DeepSpeed averages gradients over all processes
        self.waiting = self.exchanged = 0.0
        summed = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        batches = iter(step.micro_batches)
        for index in range(len(step.micro_batches)):
            began = time.perf_counter()
            batch = next(batches)
            self.loading += time.perf_counter() - began
            self.exchanged += self._exchanged(batch)
            self.engine.set_gradient_accumulation_boundary(index == len(step.micro_batches) - 1)
            loss = self._loss_sum(self._shard(batch))
            self.waiting += dist.wait(self.ranks.device)
            objective = loss * scale
            if self.balance is not None:
                objective = objective + self.balance.loss(self.engine.module.routed) * self.ranks.world
            self.engine.backward(objective, scale_wrt_gas=False)
            summed += loss.detach()
            if index < len(step.micro_batches) - 1:
                self.engine.step()  # counts the piece, no update yet
        total, stops = dist.total([summed.item() / weight, float(self.interrupted)], self.ranks.device)
        self.stopping = stops > 0  # decided together, so that no rank saves alone
        return total, {"train/router_loss": self.balance.end()} if self.balance else {}

    @torch.no_grad()
    def _routed(self, step: Step) -> list[Routed]:
        """What the routers do with each piece: a forward pass for nothing else."""
        routed = []
        for batch in step.micro_batches:
            self._loss_sum(self._shard(batch))
            routed.append(self.engine.module.routed)
        return routed

    def validate(self) -> dict[str, float]:
        """Loss over the validation rows, `{}` without a validation set."""
        if self.validation is None:
            return {}
        self.engine.eval()
        sums = [0.0, 0.0]
        ranks, rows = self.ranks, self.config.validation_rows
        with torch.no_grad():
            for batch in validation_batches(self.validation, self.config.pattern, self.cutting, rows):
                mine = self._shard(batch)
                sums[0] += float(self._loss_sum(mine))
                sums[1] += float(mine.loss_weights.sum())
        self.engine.train()
        loss, weight = dist.total(sums, ranks.device)
        if not self.health.allows(loss / weight, self.step):
            return {}
        return {"val/loss": loss / weight, "val/perplexity": math.exp(min(loss / weight, 700.0))}

    def probe(self, *, always: bool) -> dict[str, float]:
        """What the probes that are due (or all, `always`) measure of the live model."""
        found: dict[str, float] = {}
        root = self.engine.module
        for probe in self.probes:
            if always or self._due(probe.every):
                self.engine.eval()
                found |= probe.measure(root, root.model, self.tokenizer)
                self.engine.train()
        return found

    def save(self) -> None:
        """Write a checkpoint from every rank, of weights that are checked; the last one is there on return."""
        self.health.check_weights(self.step, always=True)
        state = run.state_of(
            self.config,
            self.packed,
            self.engine.module.model,
            step=self.step,
            tokens=self.tokens,
            rows=self.loader.rows_before(self.step),
            processes=self.ranks.world,
            router_fractions=self.balance.fractions if self.balance else None,
            health=self.health.state,
        )
        self.writer.save(self.engine, state, wait=self.stopping or self.step == self.config.steps)

    def _shard(self, batch: Batch) -> Shard:
        mesh = self.mesh if batch.spread else Mesh(self.ranks, 1)
        return shard_batch(batch.input_ids, batch.targets, batch.loss_weights, batch.layouts, mesh)

    def _loss_sum(self, mine: Shard) -> torch.Tensor:
        return self.engine(**mine.arguments(self.ranks.device))

    def _report(self, row: dict[str, float]) -> None:
        if "memory/peak_gib" in row:  # a step's row: on every process or on none
            row["memory/peak_gib"] = dist.highest(row["memory/peak_gib"], self.ranks.device)
        row = {name: value for name, value in row.items() if math.isfinite(value)}  # JSON has no NaN
        for callback in self.callbacks:
            callback.log({"step": self.step, "tokens": self.tokens, **row})

    def _callbacks(self) -> list[Callback]:
        if not self.ranks.is_main:
            return []
        callbacks: list[Callback] = [JsonlMetrics(self.out_dir, self.step), ProgressBar(self.config.steps, self.step)]
        parameters = sum(math.prod(whole_shape(parameter)) for parameter in self.engine.module.parameters())
        known = ("fingerprint", "rows", "row_length", "documents", "trained_tokens", "accounting")
        packed = {name: self.packed.manifest[name] for name in known if name in self.packed.manifest}
        facts = {"parameters": parameters, "processes": self.ranks.world, "packed": packed}
        return callbacks + dashboards(self.out_dir, self.config.logging, dataclasses.asdict(self.config), facts)

    def _open_validation(self) -> PackedSet | None:
        if self.config.data.validation is None:
            return None
        packed = PackedSet.open(self.config.data.validation, verify=self.config.data.verify and self.ranks.is_main)
        for key in ("tokenizer_fingerprint", "row_length", "anchor_len"):
            ours, theirs = self.packed.manifest[key], packed.manifest[key]
            if ours != theirs:
                raise UserError(
                    f"data.validation has {key}={theirs}, but data.train has {ours}: prepare both with the same {key}"
                )
        return packed

    def _write_run(self, model: PreTrainedModel) -> None:
        """The manifest, and what the export needs beside the weights; before the first step."""
        if not self.ranks.is_main:
            return
        config = dataclasses.asdict(self.config)
        first, self.run_id = self.run_id is None, self.run_id or folders.new_run_id()
        facts = {"run": self.run_id, "data": self.packed.manifest, "resumed_step": self.step or None}
        manifest = build_manifest("train", config, **facts)
        # the run's own manifest names its checkpoints, also where it begins with another run's
        if first or not self.step:
            write_manifest(self.out_dir, manifest)
        if self.step:
            write_manifest(self.out_dir / f"resumed_{self.step:08d}", manifest)
        write_model_folder(self.out_dir, model, self.tokenizer)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def interrupted(self) -> bool:
        """Was this process asked to finish the step, write a checkpoint and end?"""
        return interrupt.requested() > 0
