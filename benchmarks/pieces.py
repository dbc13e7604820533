"""Rows computed in pieces: memory and time of real training steps as rows grow, balance, and what is exchanged.

    python benchmarks/pieces.py            about a quarter of an hour on two cores; writes benchmarks/pieces_cpu.*
    python benchmarks/pieces.py --quick    a minute, to see that it works

1. `anchorctx train` on rows of 16K to 1M tokens, one row a step, in processes of their own: peak memory and seconds a
   token. All rows hold the same documents, of at most 16K tokens and log-normal lengths: a row of 64K is four rows of
   16K joined. The longest is a real step of a row of 1,048,576 tokens from start to end.
2. Eight processes, one row of 1M with documents of any length: each one's pieces are run here one after the other and
   timed. The slowest over the mean is what they would wait for each other.
3. Bytes that each of 8 GPUs sends inside attention for LLaMA-3-8B, against Ulysses' formula for whole rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import processor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from anchorctx.data.loader import make_batch, row_layouts
from anchorctx.data.packed_set import PackedSet, ShardWriter
from anchorctx.data.packing.shard import Row
from anchorctx.data.pieces import Cutting, deal_pieces
from anchorctx.flops import ModelFlops
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models import ModelConfig, load_model
from anchorctx.models.loss import CausalLMLoss
from anchorctx.models.presets import planned_config
from anchorctx.parallel.ulysses import exchanged_bytes
from anchorctx.records.manifest import build_manifest, write_json
from anchorctx.records.table import text_table

VOCABULARY, MEDIAN, SPREAD = 1024, 800, 1.2
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PROCESSES = 8
TALL = MODEL | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 2560}
"""A token costs as much besides attention as in a model of some billion weights (16,600 pairs of attention; LLaMA-3-8B:
28,600). In `MODEL` it is 1,040: the longest document alone then costs more than a process's share."""
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""glibc by default keeps freed blocks of ever other sizes, a third of the memory here, which no piece needs."""


def main() -> None:
    """Measure, print the tables, write JSON and picture."""
    arguments = parse_arguments()
    unit = 1024 if arguments.quick else 16_384
    lengths = [unit * n for n in (1, 4, 16, 64)]
    manifest = build_manifest("benchmarks/pieces", {"lengths": lengths, "model": MODEL}, **processor())
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        runs = [
            train(Path(scratch), length, unit, max(lengths[-2] // length, 1))
            for length in tqdm(lengths, desc="rows", unit="run")
        ]
        balance = eight_processes(Path(scratch), lengths[-1], 2 * unit)
    result = {"manifest": manifest, "runs": runs, "balance": balance, "exchanged": exchanged(lengths, unit)}
    print(report(result))
    path = arguments.out / "pieces_cpu.json"
    write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    parser.add_argument("--scratch", type=Path, help="folder for packed rows and runs (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="rows of 1K to 64K, a minute: to see that it works")
    return parser.parse_args()


# -- rows -------------------------------------------------------------------------------------------------------------


def boundaries(length: int, longest: int) -> tuple[int, ...]:
    """An anchor, then documents of log-normal lengths; one ends at each multiple of `longest`."""
    rng, offsets = np.random.default_rng(0), [0, 1]
    while offsets[-1] < length:
        size = max(int(rng.lognormal(np.log(MEDIAN), SPREAD)), 1)
        block = (offsets[-1] // longest + 1) * longest
        offsets.append(min(offsets[-1] + size, block, length))
    return tuple(offsets)


def packed_set(folder: Path, length: int, longest: int, rows: int) -> Path:
    """A packed set of random tokens, the same ones and the same documents whatever the length of the rows."""
    offsets = np.array(boundaries(rows * length, longest))
    ids = np.random.default_rng(1).integers(3, VOCABULARY, rows * length)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2")
    with ShardWriter(folder, length, VOCABULARY, 1) as writer:
        for first in range(0, rows * length, length):
            own = offsets[(offsets > first + 1) & (offsets <= first + length)] - first
            layout = PackedLayout((0, 1, *own.tolist()), 1)
            weights = np.ones(length, np.float32)
            weights[list(layout.doc_offsets[:-1])] = 0
            tokens = ids[first : first + length].copy()
            tokens[0] = 1
            writer.add(Row(tokens, weights, layout), layout.num_documents)
        tokenizer.save_pretrained(writer.folder / "tokenizer")
        facts = {"fingerprint": f"{length:012x}", "row_length": length, "anchor_len": 1, "vocab_size": VOCABULARY}
        writer.close({**facts, "tokenizer_fingerprint": "random"})
    return folder


# -- real training ----------------------------------------------------------------------------------------------------


def train(scratch: Path, length: int, unit: int, steps: int) -> dict[str, Any]:
    """Real steps of one row each, in pieces of `unit` tokens and a few copies, in a process of its own."""
    packed = packed_set(scratch / f"packed_{length}", length, unit, steps)
    run = scratch / f"run_{length}"
    command = [sys.executable, "-m", "anchorctx", "train", f"out_dir={run}", f"data.train={packed}", f"steps={steps}"]
    command += [f"tokens_per_step={length}", f"micro_tokens={unit + unit // 256}", "data.shuffle=false"]
    config = MODEL | {"max_position_embeddings": 64 * unit}
    command += ["model.config={" + ", ".join(f"{k}: {v}" for k, v in config.items()) + "}", "validate_every=0"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "checkpoint.every=0"], capture_output=True, text=True, env=os.environ | FIXED_MALLOC
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "perf/step_seconds" in row]
    return {
        "row_length": length,
        "steps": len(rows),
        "documents": rows[0]["data/documents_per_row"],
        "step_seconds": [row["perf/step_seconds"] for row in rows],
        "peak_gib": max(row["memory/peak_gib"] for row in rows),
        "microseconds_a_token": 1e6 * sum(row["perf/step_seconds"] for row in rows) / (length * len(rows)),
        "exchanged_bytes": sum(row["perf/exchanged_bytes"] for row in rows),
        "seconds_from_start_to_end": time.perf_counter() - began,
    }


# -- eight processes --------------------------------------------------------------------------------------------------


def eight_processes(scratch: Path, length: int, micro_tokens: int) -> dict[str, Any]:
    """Seconds that each process's pieces of one row take, forward and backward, run one after the other."""
    packed = PackedSet.open(packed_set(scratch / "packed_any", length, length, 1))
    module = CausalLMLoss(load_model(ModelConfig(config=TALL | {"max_position_embeddings": length})))
    flops, rows = ModelFlops.of(module.model), np.arange(1)
    layouts = row_layouts(packed, rows, Pattern.anchor)
    seconds, operations, passes = [], [], []
    for rank in tqdm(range(-1, PROCESSES), desc="processes", unit="process"):  # the first time is to warm up
        cutting = Cutting(micro_tokens, max(rank, 0), PROCESSES, token_cost=flops.token_cost)
        pieces = deal_pieces(layouts, cutting).pieces
        batches = [make_batch(packed, rows, piece, 1, cutting) for piece in pieces]
        began = time.perf_counter()
        for batch in batches[: 1 if rank < 0 else None]:
            positions = torch.stack([layout.position_ids() for layout in batch.layouts])
            module(batch.input_ids, positions, batch.layouts, batch.targets, batch.loss_weights).backward()
        if rank >= 0:
            seconds.append(time.perf_counter() - began)
            operations.append(flops.step([layout for batch in batches for layout in batch.layouts]))
            passes.append(len(pieces))
    longest = max(np.diff(layouts[0].doc_offsets))
    return {
        "row_length": length,
        "documents": layouts[0].num_documents,
        "longest": int(longest),
        "micro_tokens": micro_tokens,
        "passes": passes,
        "token_cost": flops.token_cost,
        "seconds": seconds,
        "slowest_of_mean_seconds": max(seconds) / statistics.mean(seconds),
        "slowest_of_mean_operations": max(operations) / statistics.mean(operations),
    }


# -- bytes ------------------------------------------------------------------------------------------------------------


def exchanged(lengths: list[int], unit: int) -> list[dict[str, Any]]:
    """Gigabytes that each of 8 GPUs sends for LLaMA-3-8B in a step of one row, every layer recomputed, bfloat16."""
    config = planned_config(ModelConfig(path="meta-llama/Meta-Llama-3-8B"))
    found = []
    for length in lengths:
        layout = PackedLayout(boundaries(length, unit), 1)
        cutting = Cutting(unit * 17 // 16, 0, PROCESSES, PROCESSES)
        pieces = deal_pieces([layout], cutting).pieces
        spread = [document.length + 1 for piece in pieces if piece.spread for _, document in piece.documents]
        found.append(
            {
                "row_length": length,
                "pieces_gb": sum(exchanged_bytes(config, tokens, 2, PROCESSES, 1.0) for tokens in spread) / 1e9,
                "whole_row_gb": exchanged_bytes(config, length, 2, PROCESSES, 1.0) / 1e9,
            }
        )
    return found


# -- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """Three tables in text."""
    first = result["runs"][0]
    rows = [
        [
            f"{run['row_length']:,}",
            f"{run['steps']}",
            f"{run['peak_gib']:.3f} GiB ({run['peak_gib'] / first['peak_gib']:.3f})",
            f"{run['microseconds_a_token']:.0f} us ({run['microseconds_a_token'] / first['microseconds_a_token']:.3f})",
            f"{sent['pieces_gb']:.1f} GB",
            f"{sent['whole_row_gb']:.1f} GB",
        ]
        for run, sent in zip(result["runs"], result["exchanged"], strict=True)
    ]
    heads = ["row", "steps", "peak memory", "time a token", "sent (pieces)", "sent (Ulysses, whole rows)"]
    balance = result["balance"]
    return "\n".join(
        [
            f"{result['manifest']['cpu']}, {result['manifest']['threads']} threads",
            *text_table([heads, *rows], ">"),
            "",
            f"{PROCESSES} processes, a row of {balance['row_length']:,} tokens, {balance['documents']} documents, the "
            f"longest {balance['longest']:,}: slowest / mean {balance['slowest_of_mean_seconds']:.3f} in seconds, "
            f"{balance['slowest_of_mean_operations']:.3f} in operations",
            f"the longest row: {result['runs'][-1]['seconds_from_start_to_end']:.0f} s from start to end",
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Peak memory and time a token over the length of the row, and the seconds of each process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, sent, shares) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    lengths = [run["row_length"] for run in result["runs"]]
    memory.plot(lengths, [run["peak_gib"] for run in result["runs"]], "o-", color="#0072B2", label="peak memory, GiB")
    times = [run["microseconds_a_token"] / 1000 for run in result["runs"]]
    memory.plot(lengths, times, "s-", color="#D55E00", label="time a token, ms")
    memory.set(xscale="log", xlabel="tokens of a row", ylim=(0, None), title="a training step, in pieces")
    memory.legend(frameon=False, fontsize=8)
    sent.plot(lengths, [row["whole_row_gb"] for row in result["exchanged"]], "o-", color="#D55E00", label="Ulysses")
    sent.plot(lengths, [row["pieces_gb"] for row in result["exchanged"]], "s-", color="#0072B2", label="pieces")
    sent.set(xscale="log", xlabel="tokens of a row", title="GB sent by each of 8 GPUs, LLaMA-3-8B")
    sent.legend(frameon=False, fontsize=8)
    balance = result["balance"]
    shares.bar(range(1, PROCESSES + 1), balance["seconds"], color="#0072B2")
    shares.axhline(statistics.mean(balance["seconds"]), color="black", linewidth=0.8)
    ratio = balance["slowest_of_mean_seconds"]
    shares.set(xlabel="process", ylabel="seconds", title=f"one row of {balance['row_length']:,}: {ratio:.2f} of mean")
    for axes in (memory, sent, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(9)
    figure.suptitle(f"{result['manifest']['cpu']}, {result['manifest']['threads']} threads", fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
