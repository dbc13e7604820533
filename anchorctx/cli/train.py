"""The configuration of `anchorctx train`; also `-m anchorctx.cli.train`, which goes on working until 0.2."""

from __future__ import annotations

from dataclasses import dataclass, field

from anchorctx.cli.main import former_entry
from anchorctx.evals.config import LiveConfig
from anchorctx.train.config import TrainConfig


@dataclass(kw_only=True, slots=True)
class TrainCommand(TrainConfig):
    """A training run, and what is measured of its model on the way: the two know nothing of each other."""

    live: LiveConfig = field(default_factory=LiveConfig)
    """Evaluations of the model while it trains."""


if __name__ == "__main__":
    former_entry("train")
