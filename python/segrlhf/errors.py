"""Errors that a person can mend. The command line prints them without a traceback."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager


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


def first_line(error: BaseException) -> str:
    """An error in one line, of what caused it where it says nothing itself."""
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{named}"
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        return lines[0]
    return first_line(error.__cause__) if error.__cause__ else type(error).__name__


@contextmanager
def reading(what: str, expected: str, name: object, remedy: str) -> Iterator[None]:
    """Whatever goes wrong while a file or model is read becomes a UserError with its ``name``.

    Libraries raise anything for a damaged file, from KeyError to errors of their own.
    """
    try:
        yield
    except (UserError, NonFiniteError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{what}: expected {expected}, got {name}, which cannot be read: "
            f"{first_line(error)}; {remedy}"
        ) from error
