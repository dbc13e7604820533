"""`anchorctx precision` on a trained model: what bfloat16 rotation moves, and what float32 rotation costs."""

from __future__ import annotations

from anchorctx.config import resolve
from anchorctx.evals.evaluators.precision.verdict import table
from anchorctx.evals.shortcuts import evaluate_precision
from stages.stage import Stage, trained_model

SETTINGS = {"shifts": "[16,4096]", "packed": "false", "cost": "false", "end_to_end": "false"}
SHARE = 0.6
"""Of the stage's time, for the study itself: it chooses lengths and texts by a first measurement."""
TINY_SETTINGS = {"lengths": "[64]", "shifts": "[16]", "texts": "2", "queries": "8", "control": "false", "cost": "false"}


def run(stage: Stage) -> None:
    """All rows are in the folder `precision` of the results; the table here is the command's own."""
    folder = trained_model(stage)
    if folder is None:
        stage.row("study", {"skipped": "no trained model was given: name its folder by --model"})
        return
    settings = {"model": folder, "out_dir": stage.out / "precision", "device": stage.device.type}
    more = TINY_SETTINGS if stage.tiny else SETTINGS | {"budget_minutes": f"{SHARE * stage.left() / 60:.2f}"}
    words = [f"{key}={value}" for key, value in (settings | more).items()]
    stage.measure("study", lambda: {"text": table(evaluate_precision(resolve("precision", words)))})
