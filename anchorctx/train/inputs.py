"""What can be said of a run's inputs in a second, before DeepSpeed is imported and processes meet."""

from __future__ import annotations

from pathlib import Path

from anchorctx.data.loader import check_trained
from anchorctx.data.packed_set import PackedSet
from anchorctx.models import build_config, check_length
from anchorctx.models.load import local_folder
from anchorctx.records.places import check_place
from anchorctx.train.callbacks import METRICS
from anchorctx.train.checkpoints.folders import CHECKPOINTS, step_of
from anchorctx.train.config import TrainConfig
from anchorctx.train.health import FILE as SUSPICIOUS
from anchorctx.train.model_folder import MODEL


def check_inputs(config: TrainConfig) -> None:
    """UserError for packed sets and a model that are not there, or do not go together; reads neither rows nor weights.

    Or for what is in the way of the run's own files.

    A model of the hub is looked for when it is loaded. Checksums are compared later, by one process.
    """
    config.validate()
    check_places(Path(config.out_dir))
    packed = PackedSet.open(config.data.train, verify=False)
    check_trained(packed, "train")
    if config.data.validation is not None:
        check_trained(PackedSet.open(config.data.validation, verify=False), "validation", config.validation_rows)
    config.rows_per_step(packed.row_length)
    config.piece_tokens(packed.row_length, int(packed.manifest["anchor_len"]))
    if config.model.path and local_folder(config.model.path) is None:
        return
    check_length(build_config(config.model), packed.row_length)


def check_places(out_dir: Path) -> None:
    """UserError where something lies in the way of a file or folder that the run writes, or in that of a checkpoint."""
    for name in (METRICS, SUSPICIOUS):
        check_place(out_dir / name)
    for name in (MODEL, CHECKPOINTS):
        check_place(out_dir / name, folder=True)
    for path in sorted((out_dir / CHECKPOINTS).glob("step_*")):
        if step_of(path) is not None:
            check_place(path, folder=True)
