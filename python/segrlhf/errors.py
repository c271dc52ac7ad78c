"""Errors that a person can mend. The command line prints them without a traceback."""

from __future__ import annotations

import errno
import signal


class UserError(ValueError):
    """Bad input. The message says what, what was expected, what came, and the remedy."""


class NonFiniteError(RuntimeError):
    """A loss, reward or weight became NaN or infinite; the message names step and checkpoint."""


class DiskFullError(OSError):
    """There is no room for a file; the message says which, and what is intact."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.strerror)


class Interrupted(KeyboardInterrupt):
    """Somebody asked for an end by a signal; the message says what was saved."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum)
