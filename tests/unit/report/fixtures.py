"""Folders as training and the evaluations leave them, with made-up but likely numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.data.packed_set import Row, ShardWriter
from anchorctx.layout import PackedLayout
from anchorctx.records.manifest import write_manifest
from anchorctx.records.results import Result, append_results, wilson_interval
from anchorctx.records.transcripts import FILE as TRANSCRIPTS
from anchorctx.records.transcripts import Said, Transcript, append_transcript

LENGTHS = (4096, 8192, 16384, 32768)
TASKS = ("niah_multikey_2", "niah_multikey_3", "niah_single_1", "ruler_cwe", "ruler_fwe", "ruler_vt")
ARMS = {"dense": 0.0, "naive": 1.2, "rotate": 0.25, "rotate_glue": 0.2, "anchored": 0.15}
"""Divergence of each arm from dense, in nats."""
ARITHMETICS = {"bfloat16": 6e-3, "float32_rotation": 3.9e-3, "float32": 5e-6}


def manifest(command: str, created: str = "2026-11-20T10:00:00+00:00", **facts: Any) -> dict[str, Any]:
    return {
        "command": command,
        "created": created,
        "code": {"revision": "0123456789abcdef", "dirty": False},
        "versions": {"anchorctx": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "machine": {"devices": ["NVIDIA H100"]},
        **facts,
    }


def make_run(folder: Path, steps: int = 120, pattern: str = "anchor", seed: int = 0) -> Path:
    """A training run's metrics and manifest."""
    rng = np.random.default_rng(seed)
    write_manifest(folder, manifest("train", config={"pattern": pattern, "seed": seed}))
    lines = [{"step": 0, "tokens": 0, "val/loss": 2.31, "memory/peak_gib": 0.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 500_000 * step, "train/loss": 2.2 + 0.3 / step + 0.03 * rng.standard_normal()}
        row |= {"train/lr": 2e-5 * min(step / 10, 1), "train/grad_norm": 0.4 + 0.1 * rng.random()}
        row |= {"perf/tokens_per_second": 9000 + 300 * rng.random(), "perf/step_seconds": 55.0, "perf/mfu": 0.41}
        row |= {"perf/attention_flops_saved": 0.8 + 0.1 * rng.random(), "memory/peak_gib": 61.5}
        lines.append(row | ({"val/loss": 2.3 - 0.001 * step} if step % 30 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_packed(folder: Path, rows: int = 3) -> Path:
    """A packed set of two sources, with its account and mixture."""
    layout = PackedLayout((0, 1, 40, 100, 128), anchor_len=1)
    account = {"document_tokens": 400, "eos_tokens": 10, "trained": 360, "first_tokens": 9, "zero_weight": 5}
    account |= {"anchor": rows, "tags": 0, "padding": 128 * rows - 377, "rows": rows, "pieces": 9}
    account |= {"dropped": {"too short": 36}}
    realised = {
        "web": {"tokens": 300, "share": 0.8, "passes": 1.0},
        "books": {"tokens": 74, "share": 0.2, "passes": 2.1},
    }
    facts = {"fingerprint": folder.name, "row_length": 128, "documents": 9, "trained_tokens": 360}
    facts |= {"document_lengths": {"16": 3, "32": 5, "64": 1}, "anchor_id": 1, "pad_id": 0, "vocab_size": 50}
    facts |= {"accounting": account}
    facts |= {"mixture": {"by": "domain", "wanted": {"web": 0.75, "books": 0.25}, "realised": realised}}
    with ShardWriter(folder, 128, 50, 1) as writer:
        for _ in range(rows):
            writer.add(Row(np.ones(128, np.int64), np.ones(128, np.float32), layout), 3)
        return writer.close(manifest("prepare", **facts))


def make_evaluation(folder: Path, model: str, skill: float, created: str = "2026-11-21T10:00:00+00:00") -> Path:
    """Results of every evaluator for one model; the better the higher `skill` (0..1)."""
    mark = write_manifest(folder, manifest("eval", created, config={"model": model, "out_dir": str(folder)}))
    append_results(folder / "results.jsonl", (_stamped(row, mark) for row in evaluation_rows(model, skill)))
    return folder


def evaluation_rows(model: str, skill: float) -> Iterator[Result]:
    def row(metric: str, value: float, half: float | None, n: int, **context: Any) -> Result:
        ends = (None, None) if half is None else (value - half, value + half)
        return Result(metric=metric, value=value, unit="1", n=n, low=ends[0], high=ends[1],
                      context={"model": model} | context)  # fmt: skip

    yield row("perplexity", 12 - 3 * skill, 0.8, 200, documents=200, tokens=700_000, loss_nats=math.log(12 - 3 * skill))
    for start, stop in ((0, 1024), (1024, 4096), (4096, 16384), (16384, 32768)):
        yield row("perplexity_by_position", 12 - 3 * skill - stop / 20_000 * skill, 0.5, 200, start=start, stop=stop)
    for length in LENGTHS:
        yield row("perplexity_by_context", 11.5 - 3 * skill - length / 20_000 * skill, 0.4, 200, context_length=length)
        fade = length / LENGTHS[-1] * (1 - skill)
        hits = round(256 * (1 - fade))
        low, high = wilson_interval(hits, 256)
        yield Result(metric="retrieval_accuracy", value=hits / 256, unit="1", n=256, low=low, high=high,
                     context={"model": model, "length": length})  # fmt: skip
        for number, task in enumerate(TASKS):
            value = max(1 - fade - 0.05 * number, 0)
            yield row("lm_eval", value, 0.03, 100, task=task, length=length, measure="score")
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            found = 1 - fade * (1 - abs(depth - 0.5))
            yield row("needle_accuracy", found, 0.05, 16, length=length, depth=depth)
            yield row("needle_logprob", 3 * (found - 1), 0.2, 16, length=length, depth=depth)
    yield row("lm_eval", 0.44 + 0.02 * skill, 0.004, 0, task="mmlu", measure="acc")


def make_precision(folder: Path, model: str) -> Path:
    """A precision study's rows."""
    mark = write_manifest(folder, manifest("precision", "2026-11-23T10:00:00+00:00", config={"model": model}))
    append_results(folder / "results.jsonl", (_stamped(row, mark) for row in precision_rows(model)))
    return folder


def precision_rows(model: str) -> Iterator[Result]:
    def row(metric: str, value: float, **context: Any) -> Result:
        values = [value * f for f in (0.9, 1.0, 1.1)]
        return Result(metric=f"precision_{metric}", value=value, unit="1", n=3, low=0.8 * value, high=1.2 * value,
                      context={"model": model, "values": values} | context)  # fmt: skip

    for weights, size in (("trained", 1.0), ("control", 0.01)):
        for arithmetic, change in ARITHMETICS.items():
            at = {"weights": weights, "arithmetic": arithmetic, "rows": "shift", "layer": "all"}
            for length in LENGTHS:
                grown = size * change * (length / 4096) ** 0.4
                for shift in (1, 16, 4096, 131072):
                    here = at | {"length": length, "shift": shift}
                    for layer in ("all", 0, 16, 31):
                        yield row("attention_change", grown * shift**0.05, **here | {"layer": layer}, first="kept")
                    yield row("attention_change", 0.6 * grown * shift**0.05, **here, first="hidden")
                    yield row("first_score_change", 3 * grown, **here)
                    yield row("first_share", 0.31, **here)
                    yield row("first_attention", 0.42, **here)
            here = at | {"length": LENGTHS[-1], "shift": 16}
            yield row("attention_change", 0.7 * grown, **here, first="dropped")
            for start, stop in ((0, 1), (1, 2), (2, 4), (4, 64), (64, 32768)):
                yield row("key_change", grown / (stop * 30), **here, key_start=start, key_stop=stop)
            packed = {"weights": weights, "arithmetic": arithmetic, "rows": "intra_doc", "length": LENGTHS[-1]}
            yield row("attention_change", grown, **packed, layer="all", first="kept")
            for start in range(0, 32768, 8192):
                yield row(
                    "offset_change", grown * (1 + start / 1e5), **packed, layer="all", start=start, stop=start + 8192
                )
            yield row("logprob_change", 2 * grown, weights=weights, arithmetic=arithmetic, rows="shift",
                      length=LENGTHS[-1], shift=16)  # fmt: skip
    context = {"model": model, "sentence": f"{model}: what was found.", "recommendation": "Use rope_dtype=float32."}
    yield Result(metric="precision_verdict", value=0.35, unit="1", n=3, low=0.3, high=0.4, context=context)


def make_reuse(folder: Path, model: str) -> Path:
    """Rows of an evaluation of KV reuse: a task with answers, and one without."""
    mark = write_manifest(folder, manifest("kvcomm", "2026-11-24T10:00:00+00:00", config={"model": model}))
    append_results(folder / "results.jsonl", (_stamped(row, mark) for row in reuse_rows(model)))
    for number in range(3):
        append_transcript(folder / TRANSCRIPTS, transcript(model, number))
    return folder


def transcript(model: str, number: int) -> Transcript:
    """A problem of the retrieval task: dense is right; every other arm says something else, the later the worse."""
    arms = {}
    for place, arm in enumerate(ARMS):
        answers = {"solver": f"<b>{arm}</b> " + "x" * 300 * place, "judge": f"{number} {arm}"}
        arms[arm] = Said(answers, {"solver": place * number / 10, "judge": 0.0}, correct=place == 0 or number != 1)
    prompts = {"solver": "You are <i>a solver</i>.\n" + "y" * 300, "judge": "You decide."}
    return Transcript(model=model, task="retrieval", kind="single", problem=number, problems="", expected="7 & 8",
                      prompts=prompts, arms=arms)  # fmt: skip


def reuse_rows(model: str) -> Iterator[Result]:
    """Every arm's rows of two tasks, and how much a document's cache varies."""
    for task, kinds in (("retrieval", ("all", "single", "two_hop")), ("copy", ())):
        for arm, kl in ARMS.items():
            at = {"model": model, "task": task, "kind": "all", "arm": arm}
            yield from _arm_rows(kl, at)
            for kind in kinds:
                yield _reuse_row("accuracy", 0.9 - kl / 3, at | {"kind": kind})
                yield _reuse_row("accuracy_difference", -kl / 3, at | {"kind": kind})
            for shuffled in (False, True) if kinds else ():
                yield _reuse_row("judge_consistency", 1 - kl / 2, at, shuffled=shuffled)
    for cause, part, layer in itertools.product(("content", "shift"), ("key", "value"), range(4)):
        yield _reuse_row("variation", 0.1 * layer, {"model": model}, cause=cause, part=part, layer=layer, tokens=256)


def _arm_rows(kl: float, at: dict[str, Any]) -> Iterator[Result]:
    arm = at["arm"]
    yield _reuse_row("kl", kl, at, tokens="all")
    yield _reuse_row("agreement", 1 - kl / 3, at, tokens="all")
    for by in ("calls", "tokens", "flops"):
        # What `anchored` looks up costs more than it saves: a share below 0.
        saved = 0.0 if arm == "dense" else -0.2 if (arm, by) == ("anchored", "flops") else 0.7
        yield _reuse_row("reuse", saved, at, by=by, by_construction=arm == "naive")
    for quantile, seconds in (("p50", 0.08), ("p95", 0.11)):
        seconds *= 2 if arm == "dense" else 1
        yield _reuse_row("ttft", seconds, at, agent="request", quantile=quantile)
    yield _reuse_row("kept_bytes", 0.0 if arm in ("dense", "naive") else 2.0**20, at)
    for part, layer in itertools.product(("key", "value"), range(4)):
        yield _reuse_row("kv_error", kl * layer, at, part=part, layer=layer, measure="relative")


def _reuse_row(metric: str, value: float, at: dict[str, Any], **more: Any) -> Result:
    return Result(metric=f"kvcomm_{metric}", value=value, unit="1", n=12, low=value - 0.01, high=value + 0.01,
                  context=at | more)  # fmt: skip


def _stamped(row: Result, mark: str) -> Result:
    return dataclasses.replace(row, manifest=mark)


def make_project(root: Path) -> Path:
    """One project with everything."""
    make_run(root / "run")
    make_packed(root / "packed" / "abc123")
    make_evaluation(root / "eval" / "z_before", "before", 0.2)
    make_evaluation(root / "eval" / "after", "after", 0.9, "2026-11-22T10:00:00+00:00")
    make_precision(root / "precision", "after")
    make_reuse(root / "reuse", "after")
    return root
