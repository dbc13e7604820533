"""`anchorctx prepare`: documents -> tokens -> packed rows."""

from __future__ import annotations

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments

EXAMPLE = """\
anchorctx prepare out_dir=packed tokenizer=MODEL row_length=65536 'sources=[{path: corpus.jsonl.zst}]'
anchorctx prepare --dry-run ...     what there is, and what each policy would make of it"""


def run(arguments: Arguments) -> None:
    """Prepare a packed set, or only look at what it would be."""
    config = configuration("prepare", arguments, EXAMPLE)
    if config is None:
        return
    if arguments.dry_run:
        from anchorctx.data.inspection import inspect

        inspect(config)
        return
    from anchorctx.data.prepare import prepare

    prepare(config)
