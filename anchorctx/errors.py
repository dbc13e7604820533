"""Errors that are the user's to mend: the command line prints them as one sentence, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: names the value, the constraint and the remedy, in one sentence."""


class InterruptedRun(BaseException):
    """A run was asked to end, by a signal or by its limit of time, and does so with work left.

    No `Exception`, as KeyboardInterrupt is none: a signal raises it anywhere, also where a library takes any exception
    for a failed attempt of its own.
    """

    def __init__(self, reason: str, code: int, how: str = "") -> None:
        """`code` is the process's exit code; `how` says how to go on, "" where only the command knows that."""
        super().__init__(f"{reason}: {how}" if how else reason)
        self.reason, self.code, self.how = reason, code, how


LOST = 3
"""Exit code of a process that waits for others in vain."""


class LostProcesses(Exception):
    """Other processes of the job have ended, or do not answer any more; the message says which.

    `code` is the exit code: `LOST`, or that of the process that failed first; `told` where another process says why.
    """

    def __init__(self, message: str, code: int = LOST, *, told: bool = False) -> None:
        super().__init__(message)
        self.code, self.told = code, told


class BackendUnavailableError(UserError):
    """An attention backend cannot serve this call here; the message says what is missing."""
