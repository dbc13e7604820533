"""One file (or folder) for each measure that `anchorctx eval` takes."""
