"""`python -m anchorctx COMMAND ...`, also under torchrun, and the command `anchorctx`."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until commands listen: nothing was begun, and whatever is imported just then is of no interest
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from anchorctx.cli.main import entry

    entry()


if __name__ == "__main__":
    main()
