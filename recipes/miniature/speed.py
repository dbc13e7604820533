"""Seconds of a training step by pattern and row length, as ratios to `full` within one run.

    python recipes/miniature/speed.py BASE OUT [--lengths 4096 8192 16384] [--turns 5] [--threads 2]

Forward and backward of the same packed rows with the weights of BASE, patterns in turns, so that a machine that slows
down does so for all. Writes OUT/results.jsonl: `step_seconds`, and `time_saved`: 1 - the pattern's seconds / full's,
paired by turn, with Student's 95 % interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from anchorctx.data.config import LossWeights, PrepareConfig
from anchorctx.data.loader import Batch, validation_batches
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.pieces import Cutting
from anchorctx.data.prepare import prepare
from anchorctx.data.sources.source import SourceConfig, SourceFormat
from anchorctx.data.sources.stdlib import StdlibConfig
from anchorctx.layout import Pattern
from anchorctx.models import ModelConfig, load_model
from anchorctx.models.config import RopeConfig
from anchorctx.models.loss import CausalLMLoss
from anchorctx.records.manifest import build_manifest, write_manifest
from anchorctx.records.results import FILE, Result, append_results, mean_interval

PATTERNS = (Pattern.full, Pattern.intra_doc, Pattern.intra_doc_reset, Pattern.anchor)


def measure(base: Path, out: Path, length: int, turns: int) -> dict[Pattern, list[float]]:
    """Seconds of each turn; the first turn of all warms up and is left out."""
    model = load_model(ModelConfig(path=str(base), rope=RopeConfig(theta=1e5), max_length=length))
    loss, packed = CausalLMLoss(model), corpus(base, out, length)
    batches = {pattern: next(validation_batches(packed, pattern, Cutting(2 * length), 1)) for pattern in PATTERNS}
    seconds: dict[Pattern, list[float]] = {pattern: [] for pattern in PATTERNS}
    for turn in tqdm(range(turns + 1), desc=f"{length:,} tokens", unit="turn"):
        for pattern in PATTERNS if turn % 2 else PATTERNS[::-1]:  # who goes first changes, so that none is favoured
            start = time.perf_counter()
            step(loss, batches[pattern])
            seconds[pattern].append(time.perf_counter() - start)
    return {pattern: times[1:] for pattern, times in seconds.items()}


def corpus(base: Path, out: Path, length: int) -> PackedSet:
    """The embedded corpus with facts, in rows of `length`."""
    source = SourceConfig(format=SourceFormat.stdlib, stdlib=StdlibConfig(facts=True))
    where = str(out / f"packed_{length}")
    return prepare(
        PrepareConfig(
            out_dir=where, sources=[source], tokenizer=str(base), row_length=length, weights=LossWeights.facts
        )
    )


def step(loss: CausalLMLoss, batch: Batch) -> None:
    """Forward and backward of one batch."""
    loss.zero_grad()
    positions = torch.stack([layout.position_ids() for layout in batch.layouts])
    loss(
        input_ids=batch.input_ids,
        position_ids=positions,
        layouts=batch.layouts,
        targets=batch.targets,
        loss_weights=batch.loss_weights,
    ).backward()


def rows_of(length: int, seconds: dict[Pattern, list[float]]) -> Iterator[Result]:
    """Median seconds, and the time saved against `full`."""
    for pattern, times in seconds.items():
        context = {"pattern": pattern.value, "length": length}
        yield Result(metric="step_seconds", value=statistics.median(times), unit="s", n=len(times), context=context)
        saved = [1 - mine / full for mine, full in zip(times, seconds[Pattern.full], strict=True)]
        low, high = mean_interval(saved) or (None, None)
        yield Result(
            metric="time_saved", value=statistics.fmean(saved), unit="1", n=len(saved), low=low, high=high,
            context=context,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", type=Path, help="model whose weights to step with")
    parser.add_argument("out", type=Path, help="folder for packed rows and results")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of a row")
    parser.add_argument("--turns", type=int, default=5, help="times that each pattern is measured")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {"lengths": options.lengths, "turns": options.turns, "threads": options.threads}
    stamp = write_manifest(options.out, build_manifest("miniature speed", settings))
    (options.out / FILE).unlink(missing_ok=True)
    for length in options.lengths:
        rows = list(rows_of(length, measure(options.base, options.out, length, options.turns)))
        append_results(options.out / FILE, [dataclasses.replace(row, manifest=stamp) for row in rows])
        for row in rows:
            ends = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
            print(f"{length:>7,} {row.context['pattern']:<16} {row.metric:<13} {row.value:.3f}{ends}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
