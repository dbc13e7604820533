"""`python -m anchorctx.cli.torchrun ...`: torchrun, which is silent where a process has said what there is to say.

All options are torchrun's. After a failed process torchrun itself prints some forty lines about where it failed; where
that was a mistake of the user's, which is one sentence, they hide it. Whatever else fails is told as torchrun tells it.
The exit code is then the process's own: 2 for a mistake, 143 for a run that was asked to end, where torchrun's is 1.

Signals are handed on to the processes, SIGUSR1 too, of which torchrun dies, but SIGHUP not where it is ignored:
torchrun under nohup ends with the terminal. They then have half an hour to write their checkpoint, instead of 30
seconds; a second signal ends all of them at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from anchorctx import interrupt
from anchorctx.errors import LOST

TOLD = (2, LOST, *interrupt.EXIT_CODES)
"""Exit codes of `anchorctx` after which there is nothing to add."""
ENDED = {-signal.SIGTERM, 128 + signal.SIGTERM}
"""Of the other processes, which torchrun ends after the first. One that was lost, such as a frozen one, is killed."""
AGENT = "torch.distributed.elastic.multiprocessing.api"
"""The logger that says which process failed and which were ended because of it, and nothing before that."""
SHUTDOWN = "torch.distributed.elastic.agent.server.api"
"""The logger that says which signal arrived."""
PATIENCE_S = 1800
"""How long the processes may take to end after a signal; torchrun itself grants 30 seconds."""


def main(argv: list[str] | None = None) -> int:
    """Start the processes and wait for them.

    Returns 0, the code of the first that failed and said why, or 128 + the signal that ended the job. Other failures
    raise, as in torchrun.
    """
    os.environ[interrupt.LAUNCHER] = str(os.getpid())
    with _held_back(AGENT, SHUTDOWN) as records:
        try:
            run.main([*_defaults(), *(sys.argv[1:] if argv is None else argv)])
        except ChildFailedError as error:
            first = error.get_first_failure()[1].exitcode
            others = {failure.exitcode for failure in error.failures.values()} - {first, *ENDED}
            if first not in TOLD or others - ({-signal.SIGKILL} if first == LOST else set()):
                raise
            records.clear()
            return first
        except SignalException as error:  # which the processes were told as well, and have ended
            records.clear()
            return 128 + error.sigval
    return 0


def _defaults() -> list[str]:
    """Options of our own, which those on the command line go before; none that this torchrun does not know."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ["SIGHUP"]
    options = {"--signals-to-handle": ",".join(["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", *hangup])}
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        options["--shutdown-timeout"] = str(PATIENCE_S)
    known = run.get_args_parser()._option_string_actions
    return [word for option, value in options.items() if option in known for word in (option, value)]


@contextmanager
def _held_back(*names: str) -> Iterator[list[logging.LogRecord]]:
    """What these loggers say meanwhile, which they say in the end; nothing of what was removed from the list."""
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    for name in names:
        logging.getLogger(name).addFilter(hold)
    try:
        yield records
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(hold)
        for record in records:
            logging.getLogger(record.name).handle(record)


if __name__ == "__main__":
    sys.exit(main())
