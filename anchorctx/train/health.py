"""Bad numbers: losses and gradients that are not finite, losses that jump, weights that went bad.

A step's loss and its gradient's norm are sums over all processes, so that all of them decide alike, before the update.
A process whose weights went bad otherwise than to NaN (a bit flipped in memory) shows in neither: `check_weights`
compares the bits of the weights that are the same on all processes under ZeRO 1 and 2.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from anchorctx.data.packed_set import PackedSet
from anchorctx.errors import UserError
from anchorctx.parallel import dist
from anchorctx.parallel.dist import Ranks
from anchorctx.records.files import write_bytes
from anchorctx.train.config import HealthConfig, OnNonfinite, OnSpike
from anchorctx.train.engine import discard, update

logger = logging.getLogger(__name__)

FILE = "suspicious.jsonl"
FEWEST = 8
"""Losses that a step is compared with, at least."""
LEAST_DEVIATION = 1e-3
"""Of the mean loss: the least standard deviation that is believed, so that a run that has converged has no spikes."""
BEGINNING = 12
"""Tokens of a document that are written down, to recognise it by."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a weight."""


class Health:
    """One run's: makes each update or leaves it out, and knows how many it left out."""

    def __init__(
        self,
        config: HealthConfig,
        engine: Any,
        packed: PackedSet,
        ranks: Ranks,
        out_dir: Path,
        *,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on after `step` steps with the `state` of then."""
        self._config, self._engine, self._packed, self._ranks = config, engine, packed, ranks
        self._path, self._checked = out_dir / FILE, None
        self._losses = deque((state or {}).get("losses", ()), maxlen=config.spike_window)
        self.skipped: int = (state or {}).get("skipped", 0)
        """Updates that were left out so far."""
        if ranks.is_main:
            _drop_after(self._path, step)

    @property
    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"losses": list(self._losses), "skipped": self.skipped}

    def update(self, loss: float, step: int, rows: Sequence[int]) -> dict[str, float]:
        """Make the update of a step, whose gradients are summed, unless its numbers are bad; returns metrics.

        Args:
            loss: over all processes.
            step: from 1.
            rows: of the packed set, of all processes.

        Raises:
            UserError: the loss or the gradient is not finite, or too many updates were left out; none was made.
        """
        if not math.isfinite(loss):
            discard(self._engine)
            return self._not_finite(f"the loss of step {step} is {loss}", step, rows, loss)
        deviations = self._deviations(loss)
        if deviations > self._config.spike_deviations and self._config.on_spike is not OnSpike.ignore:
            self._write(step, rows, reason="spike", loss=loss, deviations=deviations)
            if self._config.on_spike is OnSpike.skip:
                discard(self._engine)
                high = f"the loss of step {step} is {loss:.4g}, {deviations:.1f} standard deviations above those before"
                return {"train/loss": loss} | self._skip(high)
        norm = update(self._engine)
        if norm is None:
            return {"train/loss": loss} | self._not_finite(
                f"the gradient of step {step} is not finite", step, rows, loss
            )
        self._losses.append(loss)
        return {"train/loss": loss, "train/grad_norm": norm} | self._count()

    def check_weights(self, step: int, *, always: bool = False) -> None:
        """UserError for weights that went bad, where a check is due or `always`; the same on all processes."""
        every = self._config.weights_every
        if step == self._checked or not (always or (every and step % every == 0)):
            return
        self._checked = step
        sharded = self._engine.zero_optimization_stage() == 3
        names, found = checksums(self._engine.module.named_parameters(), self._ranks.device, shares=sharded)
        if fault := disagreement(names, dist.stacked(found)):
            raise UserError(f"after step {step} {fault}; the last checkpoint was made before")

    def allows(self, loss: float, step: int) -> bool:
        """Whether a validation loss is finite; UserError where that ends the run."""
        if not math.isfinite(loss) and self._config.on_nonfinite is OnNonfinite.fail:
            raise UserError(
                f"the validation loss after step {step} is {loss}: look at data.validation, lower optim.lr, or set "
                "health.on_nonfinite=skip to go on without it"
            )
        return math.isfinite(loss)

    def _deviations(self, loss: float) -> float:
        """How far the loss is above those before it, in standard deviations; 0 while there are too few."""
        if len(self._losses) < FEWEST:
            return 0.0
        mean = statistics.fmean(self._losses)
        spread = max(statistics.stdev(self._losses), LEAST_DEVIATION * abs(mean))
        return (loss - mean) / spread if spread else 0.0

    def _not_finite(self, said: str, step: int, rows: Sequence[int], loss: float) -> dict[str, float]:
        """Skip or end, after no update was made."""
        self._write(step, rows, reason="not finite", loss=loss)
        if self._config.on_nonfinite is OnNonfinite.skip:
            return self._skip(said)
        raise UserError(
            f"{said}, so the update was not made: look at the rows in {self._path}, lower optim.lr, or set "
            "health.on_nonfinite=skip; weights and checkpoints are as they were before it"
        )

    def _skip(self, said: str) -> dict[str, float]:
        self.skipped += 1
        most = self._config.max_skipped
        if self.skipped > most:
            raise UserError(
                f"{said}, and as many updates as health.max_skipped={most} were left out before: look at the rows in "
                f"{self._path}, lower optim.lr, or raise it"
            )
        if self._ranks.is_main:
            logger.warning("%s: its update is left out (%d of at most %d)", said, self.skipped, most)
        return self._count()

    def _count(self) -> dict[str, float]:
        return {"train/skipped": float(self.skipped)} if self.skipped else {}

    def _write(self, step: int, rows: Sequence[int], **facts: Any) -> None:
        """Append the step's rows with their documents to the file."""
        if not self._ranks.is_main:
            return
        # JSON has no NaN
        facts = {
            key: fact if isinstance(fact, str) or math.isfinite(fact) else str(fact) for key, fact in facts.items()
        }
        line = {"step": step} | facts | {"packed": self._packed.fingerprint}
        tokenizer = self._packed.tokenizer()
        line["rows"] = [{"row": row, "documents": _documents(self._packed, row, tokenizer)} for row in rows]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def checksums(
    named: Iterable[tuple[str, torch.nn.Parameter]], device: torch.device, *, shares: bool
) -> tuple[list[str], torch.Tensor]:
    """Of each weight its name, and (2,) int64: the sum of its bits, and whether all of it is finite.

    The sum does not depend on the order of its terms and changes with any single bit. `shares` looks at the part that
    this process has under ZeRO 3, and leaves the sum at 0, since every process has another part.
    """
    names, found = [], []
    for name, parameter in named:
        weight = (parameter.ds_tensor if shares else parameter).detach().reshape(-1)  # type: ignore[attr-defined]
        names.append(name)
        if not weight.numel():
            found.append(torch.tensor([0, 1], device=device))
            continue
        low, high = torch.aminmax(weight)  # both are NaN where any weight is
        finite = (low.isfinite() & high.isfinite()).long()
        bits = torch.zeros_like(finite) if shares else bit_sum(weight)
        found.append(torch.stack([bits, finite]).to(device))
    return names, torch.stack(found)


def bit_sum(values: torch.Tensor) -> torch.Tensor:
    """() int64: the sum of the bits of `values` (N,), modulo 2**64, as integers of eight bytes and the ends' own size.

    Memory's speed: 0.2 ns a float32 weight on a CPU, where integers of four bytes take 5.8.
    """
    # 4 bytes a value, which lie from value 3 of their storage: 1 up to the boundary of eight bytes, then pairs
    each = 8 // values.element_size()
    first = min(-values.storage_offset() % each, len(values))
    last = first + (len(values) - first) // each * each
    ends = torch.cat([values[:first], values[last:]]).view(BITS[values.element_size()]).sum(dtype=torch.int64)
    return ends + values[first:last].view(torch.int64).sum() if last > first else ends


def disagreement(names: Sequence[str], found: torch.Tensor) -> str | None:
    """What is wrong with the first weight that is bad, in words, from (W, N, 2) of W processes; None if all is well."""
    processes, bad = len(found), ~found[..., 1].bool()
    for index in torch.nonzero(bad.any(0) | (found[..., 0] != found[:1, :, 0]).any(0)).flatten().tolist()[:1]:
        if broken := torch.nonzero(bad[:, index]).flatten().tolist():
            where = "" if len(broken) == processes else f" on process {', '.join(map(str, broken))} of {processes}"
            remedy = "go on without that machine" if where else "go on with a lower optim.lr"
            return f"the weight {names[index]} is not finite{where}: {remedy}"
        sums = found[:, index, 0].tolist()
        usual, count = Counter(sums).most_common(1)[0]
        # of two processes nobody knows which is right
        odd = [rank for rank, bits in enumerate(sums) if bits != usual or 2 * count <= processes]
        who = " and ".join(map(str, odd))
        differs = f"the weight {names[index]} of process {who} of {processes} differs from the others'"
        return f"{differs}: go on without that machine"
    return None


def _documents(packed: PackedSet, row: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The documents (or pieces) of a row: number in the packed set, where they lie in the row, and how they begin."""
    # rows of 3 and 2 documents: those of row 1 are 3 and 4
    content, first = packed.row(row), int(packed.row_documents[:row].sum())
    found = []
    for number, document in enumerate(content.layout.documents(), start=first):
        start, stop = document.spans[0]
        begins = tokenizer.decode(content.input_ids[start : min(stop, start + BEGINNING)].tolist())
        found.append({"document": number, "tokens": document.spans, "begins": begins})
    return found


def _drop_after(path: Path, step: int) -> None:
    """Remove what was written about later steps, which are computed again, and a line that a crash cut off."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_bytes(path, "".join(kept).encode())
