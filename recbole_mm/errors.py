"""The one exception that a user sees: a sentence that says what is wrong, where, and how to mend
it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake, told in one sentence; the command line prints it without a traceback."""


def told(error: Exception) -> str:
    """The sentence that a command prints for an error instead of a traceback."""
    if isinstance(error, UserError):
        return f"Error: {error}"
    if isinstance(error, OSError):
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return f"Error: {what}. Is it the right place, and may you write there?"
    return (
        f"Error: {type(error).__name__}: {error}. If no value of yours explains it, this is a bug "
        "of ours: --debug shows where."
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'X'?)`` for the known word closest to `word`, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[close[0]]}'?)" if close else ""
