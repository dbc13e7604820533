"""Rows computed in pieces on one CUDA card: real training steps of rows of 64K to 1M tokens, peak memory and time.

`anchorctx train` (DeepSpeed, bfloat16, every layer recomputed) of Llama-3.2-1B's shape with random weights, one
row a step, in pieces of 64K tokens and some copies; documents of at most 64K and of log-normal lengths, the same in all
rows. Run in an environment with anchorctx and one card:

    python benchmarks/gpu/long_rows.py --out long_rows.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pieces import train

from anchorctx.records.manifest import build_manifest, write_json

MODEL = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SETTINGS = ("model.dtype=bfloat16", "memory.checkpoint_every=1")


def main() -> None:
    """Measure each row length and write one JSON file, after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu/long_rows.json"))
    parser.add_argument("--rows", type=int, nargs="*", default=[65_536, 1_048_576], help="tokens of a row")
    parser.add_argument("--unit", type=int, default=65_536, help="longest document, and tokens of a piece, about")
    parser.add_argument("--steps", type=int, default=2, help="steps of all but the longest rows")
    parser.add_argument("--zero", type=int, nargs="*", default=[2], choices=(1, 2, 3), help="ZeRO stages")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA card: benchmarks/pieces.py measures a CPU")
    facts = {"card": torch.cuda.get_device_name(), "model": MODEL, "settings": SETTINGS, "unit": arguments.unit}
    runs: list[dict[str, Any]] = []
    for zero, length in itertools.product(arguments.zero, arguments.rows):
        with tempfile.TemporaryDirectory() as scratch:
            steps = arguments.steps if length < max(arguments.rows) or len(arguments.rows) == 1 else 1
            settings = (*SETTINGS, f"parallel=zero{zero}")
            runs.append({"zero": zero} | train(Path(scratch), length, arguments.unit, steps, MODEL, settings))
        print(runs[-1], flush=True)
        write_json(arguments.out, {"manifest": build_manifest("benchmarks/gpu/long_rows", facts), "runs": runs})


if __name__ == "__main__":
    main()
