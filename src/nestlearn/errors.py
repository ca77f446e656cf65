"""The one error for bad input, a single line that names the value, the rule and the fix, and its one special case."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2; in Python it is a ValueError."""


class NotFinite(UserError):
    """A loss or gradient that is not a number ended a run."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
