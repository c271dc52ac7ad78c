"""Errors that a person can mend. The command line prints them without a traceback."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

EXIT_FAULT, EXIT_USER, EXIT_NON_FINITE, EXIT_DISK = 1, 2, 3, 4
EXIT_SIGNAL = 128  # and the signal's number, as shells count
EXIT_PIPE = EXIT_SIGNAL + 13
EXIT_STATUS = """exit status:
  0    done
  1    a fault of the program itself; SEGRLHF_TRACEBACK=1 shows where
  2    the input is wrong: a flag, a file, a model, an environment variable
  3    a number was NaN or infinite
  4    the disk is full
  129, 130, 143  stopped by SIGHUP, by SIGINT (Ctrl-C), by SIGTERM
  141  whoever read the output has gone, as in "| head -1\""""


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


def some(items: Sequence[int | str]) -> str:
    """The first ten, and how many there are."""
    shown = ", ".join(map(str, items[:10]))
    return f"{shown}, ... ({len(items)} in all)" if len(items) > 10 else shown


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
