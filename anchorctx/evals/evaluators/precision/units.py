"""The units of a study: a model at one length under all shifts, without its first token, on packed rows; and the cost.

The cost is that of `rope_dtype=float32`: whole training steps with either rotation, timed in turns.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.interface import implementation, register
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.evals.base import Progress
from anchorctx.evals.distribute import spread
from anchorctx.evals.evaluators.precision.measure import Instrument, TextRow, document_queries, late_queries
from anchorctx.evals.evaluators.precision.probe import Change, first_keys
from anchorctx.evals.evaluators.precision.rows import ALL, interval_half, key_rows, layer_rows, mean_result
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models.head import Parts
from anchorctx.records.results import Result

OFFSET_BINS = 4
"""Parts of a packed row that documents are sorted into by where they begin."""
PAIRS = 8
"""Pairs of steps that are timed, after an untimed one of each."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study measures, defaults filled in."""

    label: str
    lengths: tuple[int, ...]
    """Tokens, rising."""
    shifts: tuple[int, ...]
    """Tokens, rising; includes `shift`."""
    shift: int
    layers: frozenset[int]
    queries: int
    end_to_end: bool


def shift_unit(
    tool: Instrument,
    setting: Setting,
    texts: Sequence[TextRow],
    progress: Progress,
    context: dict[str, Any],
) -> Iterator[Result]:
    """Rows for every shift at the texts' length."""
    length = len(texts[0].ids)
    context = context | {"rows": "shift", "length": length}
    sizes = [length * (1 + len(setting.shifts)) * (1 + setting.end_to_end)] * len(texts)
    # changes[text][shift][layer]; spoken[text] has (N,) log-probabilities without a shift and with the main one.
    changes, spoken = zip(*spread(texts, lambda text: read_text(tool, setting, text), sizes, progress), strict=True)
    for i, shift in enumerate(setting.shifts):
        at, moved = context | {"shift": shift}, [change[i] for change in changes]
        main = shift == setting.shift
        yield from layer_rows(moved, at, layers=main or length == setting.lengths[-1])
        if main:
            yield from key_rows(moved, at)
        if main and setting.end_to_end:
            yield _spoken_row([(before, after) for before, after in spoken], at)


def read_text(tool: Instrument, setting: Setting, text: TextRow) -> tuple[list[dict[int, Change]], list[torch.Tensor]]:
    """Each layer's change under every shift, and (N,) log-probabilities without a shift and with the main one."""
    length = len(text.ids)
    layout, queries = PackedLayout((0, length)), late_queries(length, setting.queries)
    moved = tool.changes(text, layout, _shifted(length, setting.shifts), queries)
    if not setting.end_to_end:
        return moved, []
    return moved, tool.log_probabilities(text, layout, _shifted(length, (setting.shift,)), queries)


def dropped_unit(
    tool: Instrument, setting: Setting, texts: Sequence[TextRow], context: dict[str, Any]
) -> Iterator[Result]:
    """The main shift with the first token dropped from the text: does the next one take its place?"""
    # The row is one token shorter, but it is reported under the length of the rows that it was made from.
    dropped = [text.without_first() for text in texts]
    length = len(dropped[0].ids)
    layout, positions = PackedLayout((0, length)), _shifted(length, (setting.shift,))
    queries = late_queries(length, setting.queries)
    changes = spread(
        dropped, lambda text: tool.changes(text, layout, positions, queries)[0], [1] * len(dropped), lambda *_: None
    )
    context = context | {"rows": "shift", "length": len(texts[0].ids), "shift": setting.shift}
    for row in layer_rows(changes, context, layers=False):
        if row.context.get("first") != "hidden":  # hiding one more token is not what is asked here
            yield dataclasses.replace(row, context=row.context | {"first": "dropped"})


def packed_unit(
    tool: Instrument, setting: Setting, texts: Sequence[TextRow], progress: Progress, context: dict[str, Any]
) -> Iterator[Result]:
    """`intra_doc` against `intra_doc_reset`: the same rows, each document shifted by where it begins."""
    context = context | {"rows": "intra_doc", "length": len(texts[0].ids)}

    def read(text: TextRow) -> tuple[torch.Tensor, dict[int, Change], list[torch.Tensor]] | None:
        # intra_doc_reset counts positions from 0 in each document, intra_doc on through the row: as if every document
        # were shifted by where it begins. Who sees whom is the same in both.
        reset, running = (p.apply(text.layout) for p in (Pattern.intra_doc_reset, Pattern.intra_doc))
        queries = document_queries(running, setting.queries)
        if not len(queries):
            return None  # nothing but very short documents
        positions = [reset.position_ids(), running.position_ids()]
        starts = torch.from_numpy(first_keys(running))[queries]  # where each query's document begins
        changed = tool.changes(text, running, positions, queries)[0]
        return starts, changed, tool.log_probabilities(text, running, positions, queries) if setting.end_to_end else []

    sizes = [2 * len(text.ids) * (1 + setting.end_to_end) for text in texts]
    found = [read for read in spread(texts, read, sizes, progress) if read is not None]
    starts, changes, spoken = [s for s, _, _ in found], [c for _, c, _ in found], [logp for _, _, logp in found]
    if changes:
        yield from layer_rows(changes, context, layers=True)
        yield from _offset_rows(starts, changes, context)
    if changes and setting.end_to_end:
        yield _spoken_row([(before, after) for before, after in spoken], context)
        losses = [float((before - after).mean()) for before, after in spoken]
        yield mean_result("precision_loss_change", losses, "nats", context)


def _offset_rows(
    starts: Sequence[torch.Tensor], changes: Sequence[dict[int, Change]], context: dict[str, Any]
) -> Iterator[Result]:
    """`precision_offset_change`: the change in documents that begin (so are shifted by) between `start` and `stop`."""
    length = context["length"]
    # 4 bins of a row of 1,024: documents that begin at 0-255, 256-511, 512-767, 768-1023.
    for part in range(OFFSET_BINS):
        start, stop = part * length // OFFSET_BINS, (part + 1) * length // OFFSET_BINS
        values = []
        for at, change in zip(starts, changes, strict=True):
            inside = (at >= start) & (at < stop)
            moved = torch.stack([layer.attention for layer in change.values()]).mean(0)[inside]
            values += [float(moved.mean())] if len(moved) else []
        if values:
            yield mean_result(
                "precision_offset_change", values, "1", context | {"layer": ALL, "start": start, "stop": stop}
            )


def _spoken_row(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], context: dict[str, Any]) -> Result:
    """Mean absolute change of the next token's log-probability, all layers together."""
    values = [float((after - before).abs().mean()) for before, after in pairs]
    return mean_result("precision_logprob_change", values, "nats", context)


def _shifted(length: int, shifts: Sequence[int]) -> list[torch.Tensor]:
    """Positions 0..length-1, then those of every shift."""
    return [torch.arange(length) + shift for shift in (0, *shifts)]


# -- the cost of float32 rotation --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each timed step, paired."""

    bfloat16: list[float]
    float32: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """float32's time over bfloat16's, with its 95 % interval, from the pairs' logarithms."""
        # Paired, so that a machine that slows down in the middle slows both down; logarithms, since it is a ratio.
        logs = [math.log(b / a) for a, b in zip(self.bfloat16, self.float32, strict=True)]
        mean, half = statistics.fmean(logs), interval_half(logs) or 0.0
        return math.exp(mean), math.exp(mean - half), math.exp(mean + half)

    def rows(self, context: dict[str, object]) -> Iterator[Result]:
        """Median seconds with either rotation, and the ratio."""
        for name, seconds in (("bfloat16", self.bfloat16), ("float32", self.float32)):
            at = context | {"rope_dtype": name}
            yield Result(
                metric="precision_step_seconds", value=statistics.median(seconds), unit="s", n=len(seconds), context=at
            )
        value, low, high = self.ratio()
        yield Result(
            metric="precision_cost", value=value, unit="1", n=len(self.float32), low=low, high=high, context=context
        )


def time_steps(
    model: PreTrainedModel, rows: Sequence[TextRow], pairs: int = PAIRS, seconds: float = math.inf
) -> tuple[Timings, int]:
    """Forward and backward of one packed row of a bfloat16 `model` under AnchorAttention, with either rotation.

    Of `rows`, the longest first, the first is taken that all pairs take at most `seconds` with, else the last; its
    length in tokens is returned too.
    """
    register()
    model.set_attn_implementation(implementation())
    set_rope_dtype(model, RopeDtype.bfloat16)
    step = _step(model, rows[-1])
    step()  # warms up
    token = step() / len(rows[-1].ids)
    row = next((row for row in rows if 2 * (pairs + 1) * token * len(row.ids) <= seconds), rows[-1])
    step = _step(model, row)
    taken: dict[RopeDtype, list[float]] = {RopeDtype.bfloat16: [], RopeDtype.float32: []}
    for pair in range(pairs + 1):
        for dtype in sorted(taken, reverse=bool(pair % 2)):  # alternate who goes first
            set_rope_dtype(model, dtype)
            taken[dtype].append(step())
    # The first pair warms up kernels and caches.
    return Timings(taken[RopeDtype.bfloat16][1:], taken[RopeDtype.float32][1:]), len(row.ids)


def _step(model: PreTrainedModel, row: TextRow) -> Callable[[], float]:
    layout = Pattern.anchor.apply(row.layout)
    ids = torch.from_numpy(row.ids)[None].to(model.device)
    cuda, decoder = model.device.type == "cuda", Parts.of(model).base

    def step() -> float:
        if cuda:  # kernels are queued: wait, so that only this step is timed
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        hidden = decoder(
            input_ids=ids,
            position_ids=layout.position_ids(model.device)[None],
            layouts=(layout,),
            use_cache=False,
        ).last_hidden_state
        # Any loss will do: gradients flow through every layer. The head is left out, since it does not rotate anything.
        hidden.float().square().mean().backward()
        if cuda:
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    return step
