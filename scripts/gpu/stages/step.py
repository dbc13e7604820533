"""A training step of Llama-3.2-1B's shape, rows of 65,536 tokens, against `anchorctx plan`; one row of a million.

Random weights and tokens, ZeRO 2, every layer recomputed, documents of log-normal lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from anchorctx.config import resolve
from anchorctx.flops import GIB, MACHINES
from anchorctx.models import ModelConfig, build_config
from anchorctx.parallel import dist
from anchorctx.plan import table
from anchorctx.plan.planner import Planner
from stages.stage import Stage, benchmark, free_memory
from stages.training import train

LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2**20,
    "tie_word_embeddings": True,
}
TINY_LLAMA = LLAMA_1B | {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROW, TINY_ROW = 65_536, 512
LONGEST, TINY_LONGEST = ROW, 128
"""Tokens of a row, and of the longest document."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    name: str
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of the settings that `anchorctx train` and `anchorctx plan` share."""
    steps: int = 3
    rows: int = 1
    """Rows of `ROW` tokens that are joined into one."""
    needs: float = 25.0
    """Seconds that it takes, about: what is left must suffice."""


SETTINGS = (
    Setting("anchor", steps=4),
    Setting("full", {"pattern": "full"}, needs=35.0),
    Setting("anchor, rotation in bfloat16", {"model.rope_dtype": "bfloat16"}),
    Setting("anchor, MLPs in tiles", {"memory.mlp_tile": 2048}),
    Setting("anchor, inputs of layers in CPU memory", {"memory.offload_activations": "cpu"}),
    Setting("anchor, every second layer recomputed", {"memory.checkpoint_every": 2}),
    Setting("anchor, a row of 1,048,576", steps=1, rows=16, needs=75.0),
)


def run(stage: Stage) -> None:
    """Settings in the order of their worth; what there is no time for is skipped."""
    row = TINY_ROW if stage.tiny else ROW
    checkpoint = random_checkpoint(TINY_LLAMA if stage.tiny else LLAMA_1B, stage)
    free_memory()
    for setting in SETTINGS:
        line(setting, row, checkpoint, stage)
    dist.stop()


def line(setting: Setting, row: int, checkpoint: Path, stage: Stage) -> None:
    """Plan the setting, then train some steps of it, unless the plan says that it does not fit into the card."""
    shared: dict[str, object] = {
        "model.path": checkpoint,
        "model.dtype": str(stage.dtype).removeprefix("torch."),
        "parallel": "zero2",
        "memory": "default",
        "memory.checkpoint_every": 1,
        "micro_tokens": row * 17 // 16,
        "tokens_per_step": row * setting.rows,
        **setting.changes,
    }
    needs, name = 0.0 if stage.tiny else setting.needs, setting.name
    planned = stage.measure("plan", lambda: plan(shared, setting, row, stage), needs=needs, setting=name)
    if planned.get("fits") is False:
        stage.row("training step", {"setting": name, "skipped": "the plan says that it does not fit into this card"})
        return
    stage.measure("training step", lambda: measured(shared, setting, row, planned, stage), needs=needs, setting=name)


def plan(shared: Mapping[str, object], setting: Setting, row: int, stage: Stage) -> Mapping[str, Any]:
    """What `anchorctx plan` says, without the CUDA runtime, which torch does not count; {} for cards it does not know.

    On a CPU it plans for an H100.
    """
    name = torch.cuda.get_device_name() if stage.device.type == "cuda" else "H100"
    known = next((machine for machine in MACHINES if machine in name), None)
    if known is None:
        return {}
    own = {"gpu": known, "gpus": 1, "corpus.packed": packed_rows(setting, row, stage)}
    planner = Planner(resolve("plan", [f"{key}={value}" for key, value in {**shared, **own}.items()]))
    facts = table.facts(planner, planner.plan(planner.config.parallel, planner.config.memory))
    memory = (facts["total"] - facts["parts"]["runtime"]) / GIB
    return {"peak, GiB": memory, "tokens/s": facts["cost"]["tokens_per_second"], "fits": facts["fits"]}


def measured(
    shared: Mapping[str, object], setting: Setting, row: int, planned: Mapping[str, Any], stage: Stage
) -> Mapping[str, object]:
    """Some steps, with what they need and reach as shares of the plan's figures."""
    own = {"out_dir": stage.scratch / setting.name.replace(",", "").replace(" ", "_"), "steps": setting.steps}
    own |= {"data.train": packed_rows(setting, row, stage), "data.shuffle": False}
    found = train({**shared, **own, "validate_every": 0, "checkpoint.every": 0}, lambda steps: False).figures()
    of_plan = {f"{key} of plan": found[key] / planned[key] for key in ("peak, GiB", "tokens/s") if key in planned}
    return {**found, **of_plan}


def packed_rows(setting: Setting, row: int, stage: Stage) -> Path:
    """The packed set of the setting's rows: the same documents for all that have rows of one length."""
    folder = stage.scratch / f"packed_{row * setting.rows}"
    if not folder.exists():
        rows = max(other.steps for other in SETTINGS if other.rows == setting.rows)
        longest = TINY_LONGEST if stage.tiny else LONGEST
        benchmark("pieces").packed_set(folder, row * setting.rows, longest, rows)
    return folder


def random_checkpoint(fields: Mapping[str, object], stage: Stage) -> Path:
    """Random weights as a folder, drawn on the card: a billion of them take a CPU most of a minute."""
    folder = stage.scratch / "random"
    with torch.device(stage.device):
        model = AutoModelForCausalLM.from_config(build_config(ModelConfig(config=dict(fields))), dtype=stage.dtype)
    model.save_pretrained(folder)
    return folder
