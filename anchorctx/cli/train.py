"""`anchorctx train`, also `torchrun --nproc_per_node N -m anchorctx train`: continue a checkpoint's training."""

from __future__ import annotations

from dataclasses import dataclass, field

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, former_entry
from anchorctx.evals.config import LiveConfig
from anchorctx.train.config import TrainConfig

EXAMPLE = """\
torchrun --nproc_per_node 8 -m anchorctx train --recipe recipes/gpu/llama3_8b_128k.yaml \\
    out_dir=runs/mine data.train=packed logging=wandb"""


@dataclass(kw_only=True, slots=True)
class TrainCommand(TrainConfig):
    """A training run, and what is measured of its model on the way: the two know nothing of each other."""

    live: LiveConfig = field(default_factory=LiveConfig)
    """Evaluations of the model while it trains."""


def run(arguments: Arguments) -> None:
    """Train in this process."""
    config = configuration("train", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.evals.live import LiveEvals
    from anchorctx.train.loop import train

    train(config, [LiveEvals(config.live)] if config.live.every else [])


if __name__ == "__main__":
    former_entry("train")
