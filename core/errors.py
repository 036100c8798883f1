"""The one error that is meant for the user's eyes."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: what was found, where (file, key, row), what is allowed, what to do.

    The command line prints the message without a traceback and exits with ``exit_code``; every other exception keeps its
    traceback, since it is our fault and not the user's.
    """

    def __init__(self, message: str, *, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code
