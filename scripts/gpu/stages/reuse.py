"""Time to first token in the geometry of KVCOMM's figures, by `benchmarks/kvcomm.py`, with Llama-3.1-8B's shape.

Random weights: time does not depend on them. One small request of every arm comes first and is not counted, so that no
figure has the loading of kernels in it.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from anchorctx.kvcomm.decoder import Decoder
from stages.stage import Stage, benchmark, free_memory

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16_384,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEOMETRY = {"agents": 5, "question": 1024, "prefix": 512, "output": 512, "rounds": 3, "exemplars": 4}
TINY_GEOMETRY = {"agents": 3, "question": 64, "prefix": 32, "output": 16, "rounds": 1, "exemplars": 2}
PAPER = {
    "the paper's dense, H100": {"agent 1, ms": 125.8, "agent 5, ms": 428.6},
    "the paper's kvcomm, H100": {"agent 1, ms": 113.5, "agent 5, ms": 54.8},
}
"""arXiv 2510.12872: times to first token of the first and the fifth agent."""
CROSSOVER_SECONDS = 8.0
"""Of one length."""


def run(stage: Stage) -> None:
    """The arms first, then the length from which reuse pays."""
    bench = benchmark("kvcomm")
    settings = bench.Settings(
        **(TINY_GEOMETRY if stage.tiny else GEOMETRY),
        first=8,
        hidden=128,
        layers=2,
        lengths=(16, 64) if stage.tiny else (64, 256, 1024, 4096),
        seed=0,
        device=str(stage.device),
        dtype=str(stage.dtype).removeprefix("torch."),
    )
    config = bench.small_llama(settings) if stage.tiny else LlamaConfig(**LLAMA_8B)
    decoder = Decoder(bench.random_model(config, settings))
    bench.measure(dataclasses.replace(settings, rounds=1, exemplars=1), decoder)
    free_memory()
    stage.measure("floors", lambda: arms(stage, bench, settings, decoder))
    for name, cells in PAPER.items():
        stage.row("time to first token", {"arm": name, **cells})
    for length in settings.lengths:
        stage.measure(
            "two agents read one text, ms to the first token of both",
            lambda length=length: crossover(bench, dataclasses.replace(settings, lengths=(length,)), decoder),
            needs=0.0 if stage.tiny else CROSSOVER_SECONDS,
            tokens=length,
        )


def arms(stage: Stage, bench: Any, settings: Any, decoder: Decoder) -> dict[str, object]:
    """A row for each arm, medians over the rounds; returns what no arm can undercut, and the most memory held."""
    result = bench.measure(settings, decoder)
    summary = bench.summary(result)
    for name, seconds in result["ttft_seconds"].items():
        own, last = 1e3 * np.median(np.array(seconds), axis=0), f"agent {settings.agents}"
        cells: dict[str, object] = {f"agent {number}, ms": float(ms) for number, ms in enumerate(own, 1)}
        cells["request, ms"] = 1e3 * summary[name]["request"]
        cells[f"{last}, times faster"] = summary[name]["last / dense"]
        cells["request, times faster"] = summary[name]["request / dense"]
        stage.row("time to first token", {"arm": name, **cells, "kept, MiB": result["kept_bytes"][name] / 2**20})
    found: dict[str, object] = {
        "one token, ms": 1e3 * statistics.median(result["floor_seconds"]),
        "one pass over the offsets, ms": 1e3 * statistics.median(result["offset_pass_seconds"]),
    }
    if stage.device.type == "cuda":
        found["peak, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def crossover(bench: Any, settings: Any, decoder: Decoder) -> dict[str, object]:
    """Milliseconds to the first token of both of two agents that read one text of one length."""
    found = bench.measure_crossover(settings, decoder)["seconds"]
    return {name: 1e3 * seconds[0] for name, seconds in found.items()}
