"""Peak memory of real training steps on this machine's CPU, beside what `anchorctx plan` predicts for them.

    python benchmarks/memory.py            about fifteen minutes on two cores; writes benchmarks/memory_cpu.*; goes on
                                              where it was cut off
    python benchmarks/memory.py --quick    a minute, to see that it works

Every point is a run of `anchorctx train` in processes of its own (two steps of one row, float32), whose peak resident
memory is read from its metrics. The prediction is that of `anchorctx.plan`, with the memory of a run that is too small
to matter in place of CUDA's. The allocator gives freed memory back at once (MALLOC_MMAP_THRESHOLD_), so that resident
memory is what is in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import lognormal_documents, processor
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast

from anchorctx.attention.config import RopeDtype
from anchorctx.data.packed_set import Row, ShardWriter
from anchorctx.data.pieces import Cutting, deal_pieces, piece_tokens
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.models.config import LossKind, MemoryConfig
from anchorctx.parallel.config import ParallelConfig
from anchorctx.plan.memory import Parts, worst_moment
from anchorctx.plan.planner import weights_of
from anchorctx.plan.trace import meta_model, trace
from anchorctx.records.manifest import build_manifest, write_json
from anchorctx.report.figures.curves import memory_figure

VOCABULARY = 8192
MODEL = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704}
MODEL |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
TINY = MODEL | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
MIB = 2**20
LONG = {"checkpoint_every": 1, "mlp_tile": 1024}
HEAD = """# Peak memory of training steps

`benchmarks/memory.py` on two CPU cores: Llama of 4 layers of 256 (8,192 words), float32, one row a step, documents
of log-normal lengths (median 800). Measured: the most resident memory of a real run's process. Planned: what
`anchorctx plan`'s formulas say beforehand, given what a process takes that trains almost nothing. "Our switches":
`memory.checkpoint_every=1 memory.mlp_tile=1024`. Bytes a token: what is measured, less the process and the states.
A row is one piece unless pieces are named. SP 2: two processes share documents of more than 2,048 tokens.

"""


@dataclass(frozen=True)
class Arm:
    """One configuration, and the row lengths that it is run at."""

    name: str
    pattern: str
    lengths: tuple[int, ...]
    memory: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 2
    processes: int = 1
    """All of which share each document that is longer than a piece."""
    micro_tokens: int | None = None
    """Tokens of a piece; None is the whole row."""

    def cutting(self, tokens: int) -> Cutting:
        """How the main process's rows of so many tokens are cut."""
        held = piece_tokens(self.micro_tokens, tokens, Pattern(self.pattern), self.processes)
        return Cutting(held, world=self.processes, sequence=self.processes)


K = 1024
ARMS = (
    Arm("full, naive", "full", (2 * K, 4 * K, 8 * K, 16 * K), {"loss": "whole"}),
    Arm("full, our switches", "full", (4 * K, 8 * K, 16 * K, 32 * K), LONG),
    Arm("anchor, our switches", "anchor", (8 * K, 16 * K), LONG),
    Arm("anchor, pieces of 8,192", "anchor", (16 * K, 32 * K, 64 * K), LONG, micro_tokens=8 * K),
    Arm(
        "anchor, pieces of 2,048, ZeRO 3, SP 2, every 2nd layer",
        "anchor",
        (8 * K, 16 * K),
        {"checkpoint_every": 2},
        zero_stage=3,
        processes=2,
        micro_tokens=2 * K,
    ),
)
QUICK = (
    Arm("anchor, our switches", "anchor", (1 * K, 2 * K), LONG),
    Arm("anchor, pieces of 1,024", "anchor", (2 * K,), LONG, micro_tokens=1 * K),
)


def main() -> None:
    """Measure, predict, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder written to")
    parser.add_argument("--quick", action="store_true", help="two short rows")
    arguments = parser.parse_args()
    manifest = build_manifest("benchmarks/memory", {"quick": arguments.quick, "model": MODEL}, **processor())
    arms = QUICK if arguments.quick else ARMS
    path = arguments.out / "memory_cpu.json"
    beside = path.with_suffix(".partial")  # every row at once, so that a run that is cut off goes on
    known = json.loads(beside.read_text()) if beside.exists() else []
    rows, runtime = [], {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=sum(len(a.lengths) for a in arms), unit="run") as bar:
        for arm in arms:
            bar.set_description(arm.name)
            if arm.processes not in runtime:
                runtime[arm.processes] = measure(Path(folder), arm, 64, TINY)
            for tokens in arm.lengths:
                done = [found for found in known if (found["arm"], found["tokens"]) == (arm.name, tokens)]
                rows.append(done[0] if done else row(Path(folder), arm, tokens, runtime[arm.processes]))
                beside.write_text(json.dumps(rows))
                bar.update()
    print(table(rows))
    write_json(path, {"manifest": manifest, "runtime": runtime, "rows": rows})
    path.with_suffix(".md").write_text(HEAD + table(rows) + "\n")
    title = "Peak memory of a training step (CPU, 4 layers of 256, float32)"
    memory_figure(rows, title, path.with_suffix(".png"))
    beside.unlink()
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


def row(folder: Path, arm: Arm, tokens: int, runtime: float) -> dict[str, Any]:
    """One measured point and its prediction, in bytes."""
    parts = predict(arm, tokens, runtime)
    measured = measure(folder, arm, tokens, MODEL)
    return {
        "arm": arm.name,
        "tokens": tokens,
        "measured": measured,
        "predicted": parts.total,
        "runtime": runtime,
        "parts": dataclasses.asdict(parts),
        "states": parts.parameters + parts.gradients + parts.optimizer + parts.gathered,
    }


def layout(tokens: int) -> PackedLayout:
    """The row of every run: documents of log-normal length behind an anchor."""
    return lognormal_documents(tokens, seed=0)


def predict(arm: Arm, tokens: int, runtime: float) -> Parts:
    """What the planner says of the run."""
    fields = dict(arm.memory)
    loss = LossKind(fields.pop("loss", "tiled"))
    memory = MemoryConfig(loss=loss, **fields)
    config = AutoConfig.for_model(**MODEL)
    weights = weights_of(meta_model(config, config.num_hidden_layers, torch.float32))
    row, cutting = Pattern(arm.pattern).apply(layout(tokens)), arm.cutting(tokens)
    pieces = deal_pieces([row], cutting).pieces
    found = []
    for piece in pieces:
        traced = trace(
            config,
            (piece.layout(row.anchor_len, cutting),),
            dtype=torch.float32,
            rope_dtype=RopeDtype.float32,
            memory=memory,
            every=memory.checkpoint_every,
            sequence=arm.processes if piece.spread else 1,
            cuda=False,
        )
        parallel = ParallelConfig(zero_stage=arm.zero_stage)
        found.append(
            worst_moment(
                weights,
                traced,
                parallel,
                world=arm.processes,
                pieces=len(pieces),
                runtime=runtime,
                cuda=False,
            )
        )
    return max(found, key=lambda parts: parts.total)


def measure(folder: Path, arm: Arm, tokens: int, model: dict[str, Any]) -> float:
    """Peak resident bytes of the main process of a real run of two steps."""
    packed = make_packed(folder / f"packed_{tokens}", tokens)
    out = folder / f"run_{arm.name}_{tokens}_{model['hidden_size']}"
    fields = ", ".join(f"{k}: {v}" for k, v in (model | {"max_position_embeddings": tokens}).items())
    overrides = [f"model.config={{{fields}}}", f"out_dir='{out}'", f"data.train={packed}", f"tokens_per_step={tokens}"]
    overrides += [f"pattern={arm.pattern}", "steps=2", "checkpoint.every=0", "data.verify=false"]
    overrides += [f"parallel.zero_stage={arm.zero_stage}", f"parallel.sequence_parallel={arm.processes}"]
    overrides += [f"memory.{name}={value}" for name, value in arm.memory.items()]
    overrides += [f"micro_tokens={arm.cutting(tokens).max_tokens}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arm.processes)]
    command = [sys.executable, *launcher, "-m", "anchorctx", "train", *overrides]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | allocator)
    if done.returncode:
        raise RuntimeError(f"{arm.name} at {tokens} tokens failed: {done.stderr[-2000:]}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics[-1]["memory/peak_gib"] * 2**30


def make_packed(folder: Path, tokens: int) -> Path:
    """A packed set of two random rows."""
    if folder.exists():
        return folder
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), bos_token="t1", eos_token="t2"
    )
    rng = np.random.default_rng(0)
    with ShardWriter(folder, tokens, VOCABULARY, 1) as writer:
        for _ in range(2):
            weights = np.ones(tokens, np.float32)
            weights[list(layout(tokens).doc_offsets[:-1])] = 0
            writer.add(Row(rng.integers(3, VOCABULARY, tokens), weights, layout(tokens)), documents=1)
        tokenizer.save_pretrained(writer.folder / "tokenizer")
        facts = {"fingerprint": f"{tokens:012x}", "row_length": tokens, "anchor_len": 1, "vocab_size": VOCABULARY}
        writer.close({**facts, "tokenizer_fingerprint": "bench"})
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| run | tokens | measured MiB | planned MiB | off | bytes a token |",
        "|---|---|---|---|---|---|",
    ]
    for found in rows:
        off = found["predicted"] / found["measured"] - 1
        own = (found["measured"] - found["runtime"] - found["states"]) / found["tokens"]
        lines.append(
            f"| {found['arm']} | {found['tokens']:,} | {found['measured'] / MIB:,.0f} | "
            f"{found['predicted'] / MIB:,.0f} | {off:+.1%} | {own:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
