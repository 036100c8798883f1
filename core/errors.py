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


def reason_of(error: BaseException) -> str:
    """A library's error in one sentence, its first, for the brackets of a :class:`UserError`: torch's go on to advise what is
    refused here."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
