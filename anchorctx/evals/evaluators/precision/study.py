"""The evaluation `precision`: every model and length under all shifts, on packed rows, and what float32 rotation costs.

The models are the checkpoint and its control, each in several arithmetics. A unit is one of them at one length or on
packed rows, the random queries and keys, or the cost. With several processes, each takes some of the texts. The verdict
follows from the rows of all units.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Candidate, Progress, Subject, Unit, settings_of
from anchorctx.evals.corpus import Corpus
from anchorctx.evals.distribute import by_first
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision.budget import COST_SHARE, SHORTEST, Size, choose, measure, sizes
from anchorctx.evals.evaluators.precision.config import Arithmetic, StudyConfig
from anchorctx.evals.evaluators.precision.measure import Instrument, Texts, shares_states
from anchorctx.evals.evaluators.precision.models import emulates, random_score_changes
from anchorctx.evals.evaluators.precision.rows import mean_result
from anchorctx.evals.evaluators.precision.units import Setting, dropped_unit, packed_unit, shift_unit, time_steps
from anchorctx.evals.evaluators.precision.verdict import Question, verdict
from anchorctx.evals.forecast import duration
from anchorctx.records.results import Result
from anchorctx.settings import check_ranges

logger = logging.getLogger(__name__)
Begun = dict[str, Any] | None
"""Settings of a study of the same model in the same folder, which an earlier call has begun."""
RANDOM = {"head_dim": 128, "theta": 5e5, "length": 1024}
"""Shape of the random queries and keys: Llama 3's."""
RANDOM_SHIFTS = (16, 256, 4096, 32768, 130_000)


class Precision:
    """See the module. Making one reads the corpus, and raises UserError for whatever the model cannot do."""

    name = "precision"
    counts = "tok"

    def __init__(
        self, config: StudyConfig, candidate: Candidate, corpus: Corpus, seed: int, device: str, begun: Begun = None
    ) -> None:
        checkpoint = models.open_checkpoint(candidate.path, candidate.changes, device)
        self.config, self._label, self._seed = config, candidate.label, seed
        self._checkpoint = dataclasses.replace(checkpoint, config=candidate.config.get_text_config())
        self._texts = Texts(corpus, checkpoint.tokenizer)
        largest = next(sizes(config, self._checkpoint.reach))
        self.setting = check(config, self._checkpoint, largest, candidate.label)
        # Rows are made here once for their checks, and again when they are read: they take no time beside the model.
        for length in largest.lengths:
            self._texts.rows(length, largest.texts)  # raises before anything is written
        if config.packed:
            self._texts.packed_rows(largest.lengths[-1], largest.texts)
        self._size = by_first(lambda: self._fitting(begun))
        self.setting = check(config, self._checkpoint, self._size, candidate.label)
        self._variant, self._tool = "", None

    def longest(self) -> int:
        """0: lengths were checked against the model when the evaluation was made."""
        return 0

    def settings(self) -> dict[str, Any]:
        """All, with the lengths and layers that were chosen for the model."""
        return self._asked() | {"chosen": self._chosen()}

    def units(self) -> list[Unit]:
        """Random queries and keys, the cost, then each model: one unit a length, and one of packed rows.

        The unit of the longest length also measures it without its first token.
        """
        found: list[Unit] = [{"weights": "random"}]
        if self.config.cost:
            found.append({"device": self._device()})
        for weights, arithmetic in models.variants(self.config.control, self.config.arithmetics):
            variant = {"weights": weights.value, "arithmetic": arithmetic.value}
            found += [variant | {"rows": "shift", "length": length} for length in self.setting.lengths]
            found += [variant | {"rows": "intra_doc"}] if self.config.packed else []
        return found

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Everything was checked when the evaluation was made."""

    def run(self, subject: Subject | None, unit: Unit, progress: Progress) -> Iterator[Result]:
        """The rows of a unit; models are loaded here, so that no `subject` is needed."""
        # Without `rows`: the cost, which has the device, or the random queries and keys.
        if "rows" not in unit:
            work = self._cost_rows if "device" in unit else self._random_rows
            yield from by_first(lambda: list(work()))
            return
        variant = {name: unit[name] for name in ("weights", "arithmetic")}
        tool, setting, count = self._instrument(**variant), self.setting, self._size.texts
        if unit["rows"] == "intra_doc":
            yield from packed_unit(
                tool, setting, self._texts.packed_rows(setting.lengths[-1], count), progress, variant
            )
        else:
            texts = self._texts.rows(unit["length"], count)
            yield from shift_unit(tool, setting, texts, progress, variant)
            if unit["length"] == setting.lengths[-1]:
                yield from dropped_unit(tool, setting, texts, variant)
        if unit == self.units()[-1]:
            self._tool = None  # frees the model: another evaluation may be loaded next

    def conclude(self, rows: Sequence[Result]) -> list[Result]:
        """The verdict, where bfloat16 was studied."""
        closing = verdict(rows, Question(self._label, self.setting.shift, self.setting.lengths))
        return [] if closing is None else [closing]

    # -- how much is measured -----------------------------------------------------------------------------------------

    def _fitting(self, begun: Begun) -> Size:
        """What an earlier call chose for the same study, else what fits the budget, which is measured and logged."""
        config, reach = self.config, self._checkpoint.reach
        if begun is not None and {**begun, "chosen": None} == {**self._asked(), "chosen": None}:
            return Size(tuple(begun["chosen"]["lengths"]), begun["chosen"]["texts"])
        possible = list(sizes(config, reach))
        if len(possible) == 1:  # all of it was asked for
            return possible[0]
        speed = measure(self._checkpoint, config, self.setting, self._texts, self._seed)
        size = choose(config, reach, speed)
        more = ""
        if size != possible[0]:
            more = f"; {possible[0]} would take {duration(speed.study(config, possible[0]))}"
        logger.info(
            "precision of %s: %s take about %s of precision.budget_minutes=%g%s",
            self._label, size, duration(speed.study(config, size)), config.budget_minutes, more,
        )  # fmt: skip
        return size

    def _asked(self) -> dict[str, Any]:
        return settings_of(self.config, StudyConfig)

    def _chosen(self) -> dict[str, Any]:
        lengths, layers = list(self.setting.lengths), sorted(self.setting.layers)
        return {"lengths": lengths, "texts": self._size.texts, "layers": layers}

    # -- models -------------------------------------------------------------------------------------------------------

    def _instrument(self, weights: str, arithmetic: str) -> Instrument:
        """The model of a unit; it stays loaded until another one is asked for."""
        if self._tool is None or self._variant != f"{weights} {arithmetic}":
            self._tool = None  # before the next model is loaded, so that there is never memory for two
            kind = Arithmetic(arithmetic)
            model = models.load(self._checkpoint, models.Weights(weights), kind, self._seed)
            emulated = kind is not Arithmetic.float32 and emulates(self.config.emulate, self._checkpoint.device)
            shared = shares_states(model)
            self._tool = Instrument(model, self.setting.layers, self.config.rows_per_pass, emulated, shared)
            self._variant = f"{weights} {arithmetic}"
        return self._tool

    def _device(self) -> str:
        device = self._checkpoint.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"

    def _random_rows(self) -> Iterator[Result]:
        """`precision_score_change` of random queries and keys; the interval is over queries."""
        for arithmetic in self.config.arithmetics:
            changes = random_score_changes(
                arithmetic,
                RANDOM_SHIFTS,
                head_dim=int(RANDOM["head_dim"]),
                theta=RANDOM["theta"],
                length=int(RANDOM["length"]),
                seed=self._seed,
            )
            for shift, change in zip(RANDOM_SHIFTS, changes, strict=True):
                context = {
                    "weights": "random",
                    "arithmetic": arithmetic.value,
                    "rows": "shift",
                    "shift": shift,
                } | RANDOM
                row = mean_result("precision_score_change", change.tolist(), "nats", context)
                yield dataclasses.replace(row, context=context)  # without `values`: there are thousands

    def _cost_rows(self) -> Iterator[Result]:
        model = models.load(self._checkpoint, models.Weights.trained, Arithmetic.bfloat16, self._seed)
        rows = [self._texts.rows(length, 1)[0] for length in reversed(self.setting.lengths)]
        timings, length = time_steps(model, rows, seconds=60 * self.config.budget_minutes * COST_SHARE)
        yield from timings.rows({"length": length, "device": self._device()})


def check(config: StudyConfig, checkpoint: models.Checkpoint, size: Size, label: str | None = None) -> Setting:
    """What is measured, with defaults filled in; UserError for what the model cannot do."""
    check_ranges(config)
    lengths = list(size.lengths)
    if lengths[0] < SHORTEST:
        raise UserError(f"lengths={lengths} must each be at least {SHORTEST} tokens: raise {lengths[0]}")
    if lengths[-1] > checkpoint.reach:
        raise UserError(
            f"lengths={lengths} exceed the {checkpoint.reach} positions that {checkpoint.path} reaches: lower them, or "
            "read past the limit with config='{max_position_embeddings: ...}'"
        )
    # 32 layers: 0, 4, 8, ..., 28; 4 layers: all of them, each once.
    layers = config.layers or sorted({i * checkpoint.layers // 8 for i in range(8)})
    outside = [layer for layer in layers if not 0 <= layer < checkpoint.layers]
    if outside:
        raise UserError(f"layers={layers} has {outside[0]}, but the model's layers are 0 to {checkpoint.layers - 1}")
    shifts = sorted({*config.shifts, config.shift})
    if not config.arithmetics:
        raise UserError("arithmetics=[] leaves nothing to study: name bfloat16, float32_rotation or float32")
    return Setting(
        label=label or Path(checkpoint.path).name,
        lengths=size.lengths,
        shifts=tuple(shifts),
        shift=config.shift,
        layers=frozenset(layers),
        queries=config.queries,
        end_to_end=config.end_to_end,
    )
