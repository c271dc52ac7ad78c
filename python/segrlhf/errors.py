"""Errors that a person can mend. The command line prints them without a traceback."""


class UserError(ValueError):
    """Bad input. The message says what, what was expected, what came, and the remedy."""


class NonFiniteError(RuntimeError):
    """A loss or reward became NaN or infinite; the message names step, rows and checkpoint."""
