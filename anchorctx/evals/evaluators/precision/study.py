"""`study`: every arm, length and shift, a unit at a time; units that are done are not measured again.

OUT/units/NAME.jsonl   a unit's rows, written when it is whole
OUT/results.jsonl      the rows of all units so far, in order
OUT/manifest.json      what the study is; another study needs another folder
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from anchorctx.data.sources.documents import Reading
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError
from anchorctx.evals.corpus import open_corpus
from anchorctx.evals.evaluators.precision import arms
from anchorctx.evals.evaluators.precision.bfloat16 import emulates
from anchorctx.evals.evaluators.precision.config import Arithmetic, PrecisionConfig
from anchorctx.evals.evaluators.precision.cost import time_steps
from anchorctx.evals.evaluators.precision.measure import Instrument
from anchorctx.evals.evaluators.precision.random_scores import random_score_changes
from anchorctx.evals.evaluators.precision.rows import mean_result
from anchorctx.evals.evaluators.precision.texts import Texts
from anchorctx.evals.evaluators.precision.units import Setting, dropped_unit, packed_unit, shift_unit
from anchorctx.evals.evaluators.precision.verdict import Question, verdict
from anchorctx.records.manifest import FILE as MANIFEST
from anchorctx.records.manifest import build_manifest, manifest_hash, read_manifest, write_manifest
from anchorctx.records.results import FILE, Result, append_results, read_results

LONGEST = 32_768
"""Tokens: the longest row unless `lengths` says otherwise."""
SHORTEST = 16
RANDOM = {"head_dim": 128, "theta": 5e5, "length": 1024}
"""Shape of the random queries and keys: Llama 3's."""
RANDOM_SHIFTS = (16, 256, 4096, 32768, 130_000)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the study that is measured and written at once."""

    name: str
    measure: Callable[[], Iterator[Result]]
    tokens: int = 0
    """Tokens that `measure` reports to the progress bar."""
    title: str = ""


def study(config: PrecisionConfig) -> list[Result]:
    """Run (or finish) the study; returns all rows, which are in `out_dir`/results.jsonl."""
    disable_progress_bar()  # ours are enough
    subject = arms.open_subject(config.model, config.config, config.device)
    setting = check(config, subject)
    texts = Texts(_read(config.corpus), subject.tokenizer)
    for length in setting.lengths:
        texts.rows(length, config.texts)  # raises before anything is written
    if config.packed:
        texts.packed_rows(setting.lengths[-1], config.texts)
    log = StudyLog(Path(config.out_dir), config, setting)
    with tqdm(unit="tok", unit_scale=True, desc="precision", dynamic_ncols=True) as bar:
        units = list(_units(config, setting, subject, texts, bar))
        bar.total = sum(unit.tokens for unit in units)
        for unit in units:
            bar.set_postfix_str(unit.title)
            if log.add(unit.name, unit.measure):
                bar.update(unit.tokens)  # was there already
    closing = verdict(log.rows, Question(setting.label, setting.shift, setting.lengths))
    if closing is not None:
        log.add("verdict", lambda: iter([closing]))
    return log.rows


def check(config: PrecisionConfig, subject: arms.Subject) -> Setting:
    """What is measured, with defaults filled in; UserError for what the model cannot do."""
    lengths = sorted(set(config.lengths)) or [min(subject.reach, LONGEST) // part for part in (8, 4, 2, 1)]
    if lengths[0] < SHORTEST:
        raise UserError(f"lengths={lengths} must each be at least {SHORTEST} tokens: raise {lengths[0]}")
    if lengths[-1] > subject.reach:
        raise UserError(
            f"lengths={lengths} exceed the {subject.reach} positions that {config.model} reaches: lower them, or read "
            "past the limit with config='{max_position_embeddings: ...}'"
        )
    layers = config.layers or sorted({i * subject.layers // 8 for i in range(8)})
    outside = [layer for layer in layers if not 0 <= layer < subject.layers]
    if outside:
        raise UserError(f"layers={layers} has {outside[0]}, but the model's layers are 0 to {subject.layers - 1}")
    shifts = sorted({*config.shifts, config.shift})
    if shifts[0] < 1:
        raise UserError(f"shifts={config.shifts} and shift={config.shift} must be at least 1 token: leave 0 out")
    for name in ("texts", "queries", "rows_per_pass"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1: leave it out for the default")
    if not config.arithmetics:
        raise UserError("arithmetics=[] leaves nothing to study: name bfloat16, float32_rotation or float32")
    return Setting(
        label=config.label or Path(config.model).name,
        lengths=tuple(lengths),
        shifts=tuple(shifts),
        shift=config.shift,
        layers=frozenset(layers),
        queries=config.queries,
        end_to_end=config.end_to_end,
    )


@dataclass(slots=True)
class StudyLog:
    """The study's rows on disk, a file a unit."""

    folder: Path
    config: PrecisionConfig
    setting: Setting
    manifest: str = ""

    def __post_init__(self) -> None:
        # The folder does not change what is measured, and a study may be moved.
        settings = dataclasses.asdict(self.config) | {"out_dir": None, "lengths": list(self.setting.lengths)}
        manifest = build_manifest("precision", settings)
        if (self.folder / MANIFEST).is_file():
            manifest = self._same(read_manifest(self.folder), manifest)
            self.manifest = manifest_hash(manifest)
        else:
            self.manifest = write_manifest(self.folder, manifest)
        (self.folder / "units").mkdir(exist_ok=True)

    _names: list[str] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[Result]:
        """All rows of the units so far, in order."""
        return [row for name in self._names for row in read_results(self._path(name))]

    def add(self, name: str, measure: Callable[[], Iterator[Result]]) -> bool:
        """Measure a unit unless it is there, and write the rows of all so far; was it there?"""
        path = self._path(name)
        if not (there := path.exists()):
            rows = [dataclasses.replace(row, manifest=self.manifest) for row in measure()]
            beside = path.with_suffix(".partial")
            beside.unlink(missing_ok=True)
            append_results(beside, rows)
            os.replace(beside, path)
        self._names.append(name)
        beside = self.folder / f".{FILE}"
        beside.write_text("".join(self._path(unit).read_text() for unit in self._names))
        os.replace(beside, self.folder / FILE)
        return there

    def _path(self, name: str) -> Path:
        return self.folder / "units" / f"{name}.jsonl"

    def _same(self, there: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        """The manifest that is there, if this study is the one that it describes."""
        for key in ("command", "config", "versions"):
            if there.get(key) != wanted[key]:
                raise UserError(
                    f"out_dir={self.folder} holds another study (its manifest has another {key}): "
                    "name another out_dir, or remove that folder"
                )
        return there


def _units(config: PrecisionConfig, setting: Setting, subject: arms.Subject, texts: Texts, bar: Any) -> Iterator[Unit]:
    yield Unit("random", lambda: _random_rows(config))
    if config.cost:
        yield Unit("cost", lambda: _cost_rows(config, setting, subject, texts), title="timing training steps")
    copies = config.texts * (1 + len(setting.shifts)) * (1 + setting.end_to_end)
    longest = texts.rows(setting.lengths[-1], config.texts)
    packed = texts.packed_rows(setting.lengths[-1], config.texts) if config.packed else []
    for weights, arithmetic in arms.arms(config.control, config.arithmetics):
        context = {"model": setting.label, "weights": weights.value, "arithmetic": arithmetic.value}
        tool = _Lazy(config, setting, subject, weights, arithmetic)
        name = f"{weights.value}-{arithmetic.value}"
        for length in setting.lengths:
            measure = partial(_shift_rows, config, setting, texts, length, tool, bar, context)
            title = f"{weights.value} weights, {arithmetic.value}, {length:,} tokens"
            yield Unit(f"{name}-{length}", measure, copies * length, title)
        yield Unit(f"{name}-dropped", partial(_with_tool, dropped_unit, tool, setting, longest, context))
        if config.packed:
            yield Unit(f"{name}-packed", partial(_with_tool, packed_unit, tool, setting, packed, context))


def _shift_rows(
    config: PrecisionConfig, setting: Setting, texts: Texts, length: int, tool: _Lazy, bar: Any, context: dict[str, Any]
) -> Iterator[Result]:
    return shift_unit(tool.get(), setting, texts.rows(length, config.texts), bar.update, context)


def _with_tool(unit: Callable[..., Iterator[Result]], tool: _Lazy, *args: Any) -> Iterator[Result]:
    return unit(tool.get(), *args)


@dataclass(slots=True)
class _Lazy:
    """An arm that is loaded when its first unit is measured."""

    config: PrecisionConfig
    setting: Setting
    subject: arms.Subject
    weights: arms.Weights
    arithmetic: Arithmetic
    _tool: Instrument | None = None

    def get(self) -> Instrument:
        """The loaded arm."""
        if self._tool is None:
            model = arms.load(self.subject, self.weights, self.arithmetic, self.config.seed)
            emulated = self.arithmetic is not Arithmetic.float32
            emulated = emulated and emulates(self.config.emulate, self.subject.device)
            self._tool = Instrument(model, self.setting.layers, self.config.rows_per_pass, emulated)
        return self._tool


def _random_rows(config: PrecisionConfig) -> Iterator[Result]:
    """`precision_score_change` of random queries and keys; the interval is over queries."""
    for arithmetic in config.arithmetics:
        changes = random_score_changes(
            arithmetic,
            RANDOM_SHIFTS,
            head_dim=int(RANDOM["head_dim"]),
            theta=RANDOM["theta"],
            length=int(RANDOM["length"]),
            seed=config.seed,
        )
        for shift, change in zip(RANDOM_SHIFTS, changes, strict=True):
            context = {"weights": "random", "arithmetic": arithmetic.value, "rows": "shift", "shift": shift} | RANDOM
            row = mean_result("precision_score_change", change.tolist(), "nats", context)
            yield dataclasses.replace(row, context=context)  # thousands of values would not help anybody


def _cost_rows(config: PrecisionConfig, setting: Setting, subject: arms.Subject, texts: Texts) -> Iterator[Result]:
    model = arms.load(subject, arms.Weights.trained, Arithmetic.bfloat16, config.seed)
    length = setting.lengths[-1]
    timings = time_steps(model, texts.rows(length, 1)[0])
    device = torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else "the CPU"
    yield from timings.rows({"model": setting.label, "length": length, "device": device})


def _read(corpus: SourceConfig) -> list[str]:
    return [document.text for document in open_corpus(corpus).texts(Reading(on_bad_row=corpus.on_bad_row))]
