"""`anchorctx export`: a run's checkpoint -> a Hugging Face folder."""

from __future__ import annotations

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments

EXAMPLE = "anchorctx export run=runs/mine out_dir=exported dtype=bfloat16"


def run(arguments: Arguments) -> None:
    """Export a run."""
    config = configuration("export", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.train.export import export

    print(f"exported to {export(config)}")
