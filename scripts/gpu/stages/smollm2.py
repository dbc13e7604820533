"""A real checkpoint on long rows: SmolLM2 trained with `anchor`, against `full` and `intra_doc`, from the same weights.

Rows of 65,536 tokens of the Python sources of the packages that are installed here. `full` comes first and takes as
many steps as fit into half of the time; the others take as many, so that losses can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

from anchorctx.config import resolve
from anchorctx.data.prepare import prepare
from anchorctx.parallel import dist
from stages.stage import Stage, trained_model
from stages.training import Enough, Metrics, train

PATTERNS = ("full", "anchor", "intra_doc")
ROW, TINY_ROW = 65_536, 4096
ROWS, VALIDATION_ROWS = 32, 4
"""Rows to train on at most, and to validate on; a rehearsal has three of each."""
CHARACTERS = 4
"""Of a token, more than there are, so that there is text enough."""
THETA = 5e6
"""The base of the rotary frequencies at 64K tokens in AnchorAttention's paper (2411.13476, section 5.1)."""


def run(stage: Stage) -> None:
    """Prepare both sets, then train with each pattern."""
    folder = trained_model(stage)
    if folder is None:
        stage.row("training", {"skipped": "no checkpoint was given: name its folder by --model"})
        return
    row, rows, validation_rows = (TINY_ROW, 3, 3) if stage.tiny else (ROW, ROWS, VALIDATION_ROWS)
    texts = sources(CHARACTERS * row * (rows + validation_rows))
    held_out = texts[: len(texts) * validation_rows // (rows + validation_rows)]
    sets = {
        "data.validation": packed("validation", held_out, folder, row, stage),
        "data.train": packed("train", texts[len(held_out) :], folder, row, stage),
    }
    settings: dict[str, object] = {
        "model.path": folder,
        "model.dtype": str(stage.dtype).removeprefix("torch."),
        "model.max_length": row,
        "model.rope.theta": THETA,
        "memory.checkpoint_every": 1,
        "tokens_per_step": row,
        "steps": rows,
        "validation_rows": validation_rows,
        "optim.lr": 1e-4,
        "optim.schedule": "constant",
        "optim.warmup_steps": 2,
        **sets,
    }
    steps, deadline = rows, time.time() + stage.left() / 2
    for pattern in PATTERNS:
        wanted = partial(enough, steps, deadline if pattern == "full" else stage.until - 5)
        found = stage.measure("training", partial(measured, settings, pattern, wanted, stage), pattern=pattern)
        steps = int(str(found.get("steps", steps)))
    dist.stop()


def enough(most: int, deadline: float, steps: Sequence[Metrics]) -> bool:
    """Are these all the steps that were asked for, or is the time over? Two are always made."""
    return len(steps) >= most or (len(steps) >= 2 and time.time() > deadline)


def measured(settings: Mapping[str, object], pattern: str, wanted: Enough, stage: Stage) -> dict[str, float]:
    """Train with one pattern; its losses, and the validation set's under the same pattern."""
    own = {**settings, "pattern": pattern, "out_dir": stage.scratch / f"run_{pattern}"}
    trained = train(own, wanted)
    found = trained.figures() | {"loss of step 1": trained.steps[0]["train/loss"]}
    found["loss of the last"] = trained.steps[-1]["train/loss"]
    for name, metrics in (("before", trained.before), ("after", trained.after)):
        found |= {f"validation {name}": metrics["val/loss"], f"perplexity {name}": math.exp(metrics["val/loss"])}
    return found


def sources(characters: int) -> list[str]:
    """The texts of installed packages' modules, in an order that depends on their names alone, until there are so many.

    Of the packages beside torch and transformers, which may be installed in two places.
    """
    folders = {Path(str(module.__file__)).parents[1] for module in (torch, transformers)}
    files = {path.relative_to(folder): path for folder in folders for path in folder.rglob("*.py")}
    found, total = [], 0
    for name in sorted(files, key=lambda name: hashlib.sha256(str(name).encode()).digest()):
        text = files[name].read_text(errors="replace")
        if total >= characters:
            break
        found += [text] if text.strip() else []
        total += len(text)
    return found


def packed(name: str, texts: list[str], tokenizer: Path, row: int, stage: Stage) -> Path:
    """`anchorctx prepare` of some texts; the folder of the packed set."""
    corpus = stage.scratch / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [f"out_dir={stage.scratch / name}", f"tokenizer={tokenizer}", f"row_length={row}", "workers=1"]
    return prepare(resolve("prepare", [*words, f"sources=[{{path: {corpus}}}]"])).folder
