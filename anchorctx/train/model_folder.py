"""RUN/model: what an export needs beside the weights. The model's configuration, the generation's, and the tokenizer.

A checkpoint holds the configuration too (`compare.check_exported`). Of the other files `digests.json`, written last,
keeps size and digest: an export takes none that was changed since.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.records.manifest import write_json
from anchorctx.records.typed import read_typed
from anchorctx.train.checkpoints.digest import entry_of, fault
from anchorctx.train.checkpoints.folders import File

MODEL = "model"
"""The folder, in a run's."""
DIGESTS = "digests.json"
REMEDY = "restore it, or type the training's command again, which writes it anew"


def write_model_folder(run: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder of a run, or write it anew."""
    folder = run / MODEL
    (folder / DIGESTS).unlink(missing_ok=True)  # what a kill leaves in between is not called changed
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    write_json(folder / DIGESTS, {path.name: dataclasses.asdict(entry_of(path)) for path in files})


def check_model_folder(run: Path) -> None:
    """UserError where a file was changed after it was written; that of a run without digests is not compared."""
    folder = run / MODEL
    try:
        files = read_typed(folder / DIGESTS, dict[str, File], REMEDY)
    except FileNotFoundError:  # anchorctx wrote none at first
        return
    for name, file in files.items():
        if (wrong := fault(folder / Path(name).name, file)) is not None:
            raise UserError(f"{folder / name} {wrong}: {REMEDY}")
