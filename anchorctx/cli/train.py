"""`anchorctx train`, also `torchrun --nproc_per_node N -m anchorctx.cli.train`: continue a checkpoint's training."""

from __future__ import annotations

import sys

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, main

EXAMPLE = """\
torchrun --nproc_per_node 8 -m anchorctx.cli.train --recipe recipes/llama3_8b_128k/recipe_train.yaml \\
    out_dir=runs/mine data.train=packed logging=wandb"""


def run(arguments: Arguments) -> None:
    """Train in this process."""
    config = configuration("train", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.train.loop import train

    train(config)


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
