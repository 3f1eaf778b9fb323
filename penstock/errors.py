"""The errors a user can cause: one clear line saying what, where and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line fit for the terminal.

    The command line prints it and exits with code 2, without a traceback.
    """


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """The ``count`` names closest in spelling to ``word``, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.4)
