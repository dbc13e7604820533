"""Tokens a second when several sessions' talks are decoded at once (`anchorctx.kvcomm.together`), against one by one.

Requests of 448 to 560 tokens, answers of 48, a Llama of SmolLM2-135M's shape with random weights (or `--model`), which
decodes greedily to the limit. Both ways in turns, round after round; ratios are within a round. Writes a JSON file.

    .venv/bin/python benchmarks/together.py [--talks 1,2,4,8] [--rounds 3] [--out FILE.json] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.together import alone, together
from anchorctx.kvcomm.turn import Talk, speak
from anchorctx.records.manifest import build_manifest, write_json
from anchorctx.records.table import text_table

SMOL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
TINY = SMOL | {"vocab_size": 256, "hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 2}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; lengths in tokens."""

    talks: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3
    prompt: int = 448
    further: int = 16
    """By which each prompt is longer than the one before."""
    answer: int = 48


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder")
    parser.add_argument("--talks", default="1,2,4,8", help="how many at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("together_cpu.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    a = parser.parse_args(argv)
    settings = Settings(tuple(map(int, a.talks.split(","))), a.rounds)
    if a.quick:
        settings = Settings(settings.talks, 1, prompt=24, further=3, answer=6)
    decoder = Decoder(model_of(a.model, TINY if a.quick else SMOL))
    rows = [row(decoder, settings, talks) for talks in settings.talks]
    columns = list(rows[0])
    print("\n".join(text_table([columns, *([f"{r[c]:.3g}" for c in columns] for r in rows)])))
    manifest = build_manifest("benchmarks/together", asdict(settings) | {"model": str(a.model or "random")})
    write_json(a.out, {"manifest": manifest, "rows": rows})


def model_of(folder: Path | None, fields: dict[str, Any]) -> PreTrainedModel:
    """The checkpoint, or random weights."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**fields)).eval()


def row(decoder: Decoder, settings: Settings, talks: int) -> dict[str, float]:
    """Medians over the rounds: tokens a second of both ways, and how many times as fast one is."""
    seconds: dict[str, list[float]] = {"one by one": [], "at once": []}
    for _ in range(settings.rounds):
        for name, run in {"one by one": one_by_one, "at once": together}.items():
            made = {str(i): talk(decoder, settings, i) for i in range(talks)}
            began = time.perf_counter()
            run(decoder, made)
            seconds[name].append(time.perf_counter() - began)
    tokens = talks * (settings.answer - 1)  # the first one comes from the prompt's own forward, which is not timed
    found: dict[str, float] = {"talks": talks}
    found |= {f"{name}, tokens/s": tokens / statistics.median(own) for name, own in seconds.items()}
    pairs = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return found | {"times as fast": statistics.median(pairs), "least": min(pairs), "greatest": max(pairs)}


def talk(decoder: Decoder, settings: Settings, number: int) -> Talk[Any]:
    """Somebody who speaks, behind a prompt that has been read."""
    length = settings.prompt + number * settings.further
    words = np.random.default_rng(number).integers(3, 200, length)
    buffer = decoder.buffer(length + settings.answer)
    logits = decoder.forward(decoder.tensor(words.tolist()), buffer, range(length))[0, -1]
    return speak(buffer, length, logits, settings.answer, frozenset())


def one_by_one(decoder: Decoder, talks: dict[str, Talk[Any]]) -> None:
    """Each to its end."""
    for own in talks.values():
        alone(decoder, own)


if __name__ == "__main__":
    main()
