"""Errors that are the user's to mend: the command line prints them as one sentence, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: names the value, the constraint and the remedy, in one sentence."""


class InterruptedRun(Exception):
    """A run was asked to end (SIGTERM) and did so cleanly, with work left; the message says how to go on."""


class BackendUnavailableError(UserError):
    """An attention backend cannot serve this call here; the message says what is missing."""
