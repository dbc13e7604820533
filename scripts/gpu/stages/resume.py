"""Runs that are killed and continued, on a card: is `deterministic=true` the same bits, and what does it cost?

`anchorctx train` of a model of SmolLM2-135M's shape with random weights, rows of 65,536 tokens, in processes of its
own: once through, and beside it once killed (SIGKILL) after its first checkpoint and started again. Without
`deterministic` once through twice, to see whether the difference is one. Two runs share the card, so that only the
ratio of their times says something.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from anchorctx.config import resolve
from anchorctx.train.export import export
from stages.stage import Stage, benchmark
from stages.step import TINY_LLAMA, random_checkpoint

ROW, TINY_ROW, LONGEST, TINY_LONGEST = 65_536, 512, 16_384, 128
STEPS, EVERY = 6, 2
"""Steps of a run, and between checkpoints."""
NEEDS = 25.0
"""Seconds that a run takes, about."""


def run(stage: Stage) -> None:
    """The runs that claim to be equal first."""
    row, longest = (TINY_ROW, TINY_LONGEST) if stage.tiny else (ROW, LONGEST)
    smol = {"model_type": "llama", **benchmark("together").SMOL, "max_position_embeddings": ROW}
    shape = TINY_LLAMA if stage.tiny else smol
    packed = benchmark("pieces").packed_set(stage.scratch / "packed_resume", row, longest, STEPS)
    model = random_checkpoint(shape, stage)
    for name, second, settings in (
        ("killed and continued", killed, {"deterministic": True}),
        ("twice, without deterministic", through, {}),
    ):
        shared = {
            "model.path": model,
            "model.dtype": str(stage.dtype).removeprefix("torch."),
            "data.train": packed,
            "steps": STEPS,
            "tokens_per_step": row,
            "memory.checkpoint_every": 1,
            "checkpoint.every": EVERY,
            "validate_every": 0,
            **settings,
        }
        needs = 0.0 if stage.tiny else 2 * NEEDS if second is killed else NEEDS
        stage.measure(
            "two runs", lambda name=name, second=second, shared=shared: pair(stage, name, second, shared),
            needs=needs, runs=name,
        )  # fmt: skip


def pair(
    stage: Stage, name: str, second: Callable[[Path, Mapping[str, object]], None], settings: Mapping[str, object]
) -> Mapping[str, object]:
    """A run and another of the same settings: are losses and weights equal, and how far are they apart?"""
    folders = [stage.scratch / f"{kind}_{name.split()[0]}" for kind in ("first", "second")]
    with ThreadPoolExecutor(2) as pool:  # half of a run is the start of its process
        for run in [pool.submit(through, folders[0], settings), pool.submit(second, folders[1], settings)]:
            run.result()
    rows = [metrics(folder) for folder in folders]
    losses = [[row["train/loss"] for row in own] for own in rows]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    weights = [exported(folder) for folder in folders]
    largest = max((a.float() - weights[1][key].float()).abs().max().item() for key, a in weights[0].items())
    found: dict[str, object] = {
        "steps": len(losses[0]),
        "step beside another, s": statistics.median(row["perf/step_seconds"] for row in rows[0][1:]),
        "losses apart": apart,
        "weights apart": largest,
    }
    return found | ({"ok": apart == largest == 0} if settings.get("deterministic") else {})


def command(folder: Path, settings: Mapping[str, object]) -> list[str]:
    """`anchorctx train` of these settings."""
    words = [f"{key}={str(value).lower() if value is True else value}" for key, value in settings.items()]
    return [sys.executable, "-m", "anchorctx", "train", f"out_dir={folder}", *words]


def through(folder: Path, settings: Mapping[str, object]) -> None:
    """A run from where it is to its end."""
    subprocess.run(command(folder, settings), check=True)


def killed(folder: Path, settings: Mapping[str, object]) -> None:
    """A run that is ended by SIGKILL after its first checkpoint, and started again."""
    process = subprocess.Popen(command(folder, settings), start_new_session=True)
    first = folder / "checkpoints" / f"step_{EVERY:08d}" / "COMPLETE"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    last = metrics(folder)[-1]["step"]
    assert EVERY <= last < STEPS, f"killed after step {last} of {STEPS}: too early or too late to tell anything"
    through(folder, settings)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The steps' metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    target = export(resolve("export", [f"run={folder}", f"out_dir={folder}_exported"]))
    return load_file(target / "model.safetensors")
