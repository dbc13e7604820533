"""The evaluation `precision`: every arm and length under all shifts, on packed rows, and what float32 rotation costs.

A unit is an arm at one length, an arm on packed rows, the random queries and keys, or the cost. Of several processes
each takes some of the texts. The verdict follows from the rows of all units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.evals.base import Candidate, Progress, Subject, Unit, settings_of
from anchorctx.evals.corpus import Corpus
from anchorctx.evals.distribute import by_first
from anchorctx.evals.evaluators.precision import arms
from anchorctx.evals.evaluators.precision.bfloat16 import emulates
from anchorctx.evals.evaluators.precision.config import Arithmetic, StudyConfig
from anchorctx.evals.evaluators.precision.cost import time_steps
from anchorctx.evals.evaluators.precision.measure import Instrument
from anchorctx.evals.evaluators.precision.random_scores import random_score_changes
from anchorctx.evals.evaluators.precision.rows import mean_result
from anchorctx.evals.evaluators.precision.texts import Texts
from anchorctx.evals.evaluators.precision.units import Setting, dropped_unit, packed_unit, shift_unit
from anchorctx.evals.evaluators.precision.verdict import Question, verdict
from anchorctx.records.results import Result
from anchorctx.settings import check_ranges

LONGEST = 32_768
"""Tokens: the longest row unless `lengths` says otherwise."""
SHORTEST = 16
RANDOM = {"head_dim": 128, "theta": 5e5, "length": 1024}
"""Shape of the random queries and keys: Llama 3's."""
RANDOM_SHIFTS = (16, 256, 4096, 32768, 130_000)


class Precision:
    """See the module. Making one reads the corpus, and raises UserError for whatever the model cannot do."""

    name = "precision"
    counts = "tok"

    def __init__(self, config: StudyConfig, candidate: Candidate, corpus: Corpus, seed: int, device: str) -> None:
        subject = arms.open_subject(candidate.path, candidate.changes, device)
        self.config, self._label, self._seed = config, candidate.label, seed
        self._subject = dataclasses.replace(subject, config=candidate.config.get_text_config())
        self.setting = check(config, self._subject, candidate.label)
        self._texts = Texts(corpus, subject.tokenizer)
        for length in self.setting.lengths:
            self._texts.rows(length, config.texts)  # raises before anything is written
        if config.packed:
            self._texts.packed_rows(self.setting.lengths[-1], config.texts)
        self._arm, self._tool = "", None

    def longest(self) -> int:
        """0: lengths were checked against the model when the evaluation was made."""
        return 0

    def settings(self) -> dict[str, Any]:
        """All, with the lengths and layers that were chosen for the model."""
        chosen = {"lengths": list(self.setting.lengths), "layers": sorted(self.setting.layers)}
        return settings_of(self.config, StudyConfig) | chosen

    def units(self) -> list[Unit]:
        """Random queries and keys, the cost, and each arm: its lengths, the longest also without its first token."""
        found: list[Unit] = [{"weights": "random"}]
        if self.config.cost:
            found.append({"device": self._device()})
        for weights, arithmetic in arms.arms(self.config.control, self.config.arithmetics):
            arm = {"weights": weights.value, "arithmetic": arithmetic.value}
            found += [arm | {"rows": "shift", "length": length} for length in self.setting.lengths]
            found += [arm | {"rows": "intra_doc"}] if self.config.packed else []
        return found

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Everything was checked when the evaluation was made."""

    def run(self, subject: Subject | None, unit: Unit, progress: Progress) -> Iterator[Result]:
        """The rows of a unit; the arms are loaded here, so that no `subject` is needed."""
        if "rows" not in unit:
            work = self._cost_rows if "device" in unit else self._random_rows
            yield from by_first(lambda: list(work()))
            return
        arm = {name: unit[name] for name in ("weights", "arithmetic")}
        tool, setting, count = self._instrument(**arm), self.setting, self.config.texts
        if unit["rows"] == "intra_doc":
            yield from packed_unit(tool, setting, self._texts.packed_rows(setting.lengths[-1], count), progress, arm)
        else:
            texts = self._texts.rows(unit["length"], count)
            yield from shift_unit(tool, setting, texts, progress, arm)
            if unit["length"] == setting.lengths[-1]:
                yield from dropped_unit(tool, setting, texts, arm)
        if unit == self.units()[-1]:
            self._tool = None  # its memory is needed

    def conclude(self, rows: Sequence[Result]) -> list[Result]:
        """The verdict, where bfloat16 was studied."""
        closing = verdict(rows, Question(self._label, self.setting.shift, self.setting.lengths))
        return [] if closing is None else [closing]

    def _instrument(self, weights: str, arithmetic: str) -> Instrument:
        """An arm; the last one stays loaded."""
        if self._tool is None or self._arm != f"{weights} {arithmetic}":
            self._tool = None
            kind = Arithmetic(arithmetic)
            model = arms.load(self._subject, arms.Weights(weights), kind, self._seed)
            emulated = kind is not Arithmetic.float32 and emulates(self.config.emulate, self._subject.device)
            self._tool = Instrument(model, self.setting.layers, self.config.rows_per_pass, emulated)
            self._arm = f"{weights} {arithmetic}"
        return self._tool

    def _device(self) -> str:
        device = self._subject.device
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
                yield dataclasses.replace(row, context=context)  # thousands of values would not help anybody

    def _cost_rows(self) -> Iterator[Result]:
        model = arms.load(self._subject, arms.Weights.trained, Arithmetic.bfloat16, self._seed)
        length = self.setting.lengths[-1]
        timings = time_steps(model, self._texts.rows(length, 1)[0])
        yield from timings.rows({"length": length, "device": self._device()})


def check(config: StudyConfig, subject: arms.Subject, label: str | None = None) -> Setting:
    """What is measured, with defaults filled in; UserError for what the model cannot do."""
    check_ranges(config)
    lengths = sorted(set(config.lengths)) or [min(subject.reach, LONGEST) // part for part in (8, 4, 2, 1)]
    if lengths[0] < SHORTEST:
        raise UserError(f"lengths={lengths} must each be at least {SHORTEST} tokens: raise {lengths[0]}")
    if lengths[-1] > subject.reach:
        raise UserError(
            f"lengths={lengths} exceed the {subject.reach} positions that {subject.path} reaches: lower them, or read "
            "past the limit with config='{max_position_embeddings: ...}'"
        )
    layers = config.layers or sorted({i * subject.layers // 8 for i in range(8)})
    outside = [layer for layer in layers if not 0 <= layer < subject.layers]
    if outside:
        raise UserError(f"layers={layers} has {outside[0]}, but the model's layers are 0 to {subject.layers - 1}")
    shifts = sorted({*config.shifts, config.shift})
    if not config.arithmetics:
        raise UserError("arithmetics=[] leaves nothing to study: name bfloat16, float32_rotation or float32")
    return Setting(
        label=label or Path(subject.path).name,
        lengths=tuple(lengths),
        shifts=tuple(shifts),
        shift=config.shift,
        layers=frozenset(layers),
        queries=config.queries,
        end_to_end=config.end_to_end,
    )
