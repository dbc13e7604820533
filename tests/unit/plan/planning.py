"""A small model to plan with, quick to trace."""

from __future__ import annotations

from typing import Any

from anchorctx.models import ModelConfig, ModelDtype
from anchorctx.plan.config import Assumptions, CorpusConfig, PlanConfig
from anchorctx.plan.planner import Planner

SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


OPERATIONS = Assumptions(layer_ms=0.0, attention_keys=0.0, layer_bytes=0.0, logit_bytes=0.0)


def planner(**fields: Any) -> Planner:
    """Of rows of 4,096 tokens on 8 GPUs, on which so small a model's layers take as long as their operations alone."""
    given = {"model": ModelConfig(config=SMALL, dtype=ModelDtype.bfloat16), "row_length": 4096}
    given |= {"corpus": CorpusConfig(rows=4), "assume": OPERATIONS}
    return Planner(PlanConfig(**given | fields))
