"""A checkpoint's settings for generation, without those that have no effect."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def drop_unused(config: GenerationConfig | None) -> None:
    """Set back, in place, what greedy decoding ignores of sampling, and decoding without beams of beams.

    Llama 2 was published with a temperature beside do_sample=false: transformers reads that, and all of 4 and 5.17
    refuse to write it.
    """
    if config is None:
        return
    fields: Any = config
    unused = [] if config.do_sample else [*SAMPLING]
    unused += BEAMS if (config.num_beams or 1) == 1 else ()
    default = GenerationConfig()
    for name in unused:
        if hasattr(default, name) and getattr(fields, name) != getattr(default, name):
            setattr(fields, name, getattr(default, name))
