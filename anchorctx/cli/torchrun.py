"""`python -m anchorctx.cli.torchrun ...`: torchrun, which is silent where a process has said what there is to say.

All options are torchrun's. After a failed process torchrun itself prints some forty lines about where it failed; where
that was a mistake of the user's, which is one sentence, they hide it. Whatever else fails is told as torchrun tells it.
The exit code is then the process's own: 2 for a mistake, 143 for a run that was asked to end, where torchrun's is 1.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TOLD = (2, 143)
"""Exit codes of `anchorctx` after which there is nothing to add."""
AGENT = "torch.distributed.elastic.multiprocessing.api"
"""The logger that says which process failed and which were ended because of it, and nothing before that."""


def main(argv: list[str] | None = None) -> int:
    """Start the processes and wait for them.

    Returns 0, the code of the first that failed and said why, or 128 + the signal that ended the job. Other failures
    raise, as in torchrun.
    """
    with _held_back(logging.getLogger(AGENT)) as records:
        try:
            run.main(argv)
        except ChildFailedError as error:
            first = error.get_first_failure()[1].exitcode
            others = {failure.exitcode for failure in error.failures.values()} - {first, -signal.SIGTERM}
            if first not in TOLD or others:
                raise
            records.clear()
            return first
        except SignalException as error:  # a scheduler's SIGTERM, which the processes were told as well
            return 128 + error.sigval
    return 0


@contextmanager
def _held_back(logger: logging.Logger) -> Iterator[list[logging.LogRecord]]:
    """What the logger says meanwhile, which it says in the end; nothing of what was removed from the list."""
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield records
    finally:
        logger.removeFilter(hold)
        for record in records:
            logger.handle(record)


if __name__ == "__main__":
    sys.exit(main())
