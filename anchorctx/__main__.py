"""`python -m anchorctx COMMAND ...`, also under torchrun: the `anchorctx` command."""

from anchorctx.cli.main import entry

if __name__ == "__main__":
    entry()
