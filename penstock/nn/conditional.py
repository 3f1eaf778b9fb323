"""Conditional computation can be switched off: everything is then evaluated, whatever the gates say.

The result stays the same (what is shut has weight zero); the cost is the full one. The laboratory uses it to count
what a model would cost with nothing left out, beside what it really spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_everything = False


@contextmanager
def evaluate_everything() -> Iterator[None]:
    """Inside the context nothing is skipped."""
    global _everything
    before, _everything = _everything, True
    try:
        yield
    finally:
        _everything = before


def may_skip() -> bool:
    """Whether a model may leave out what its gates have shut: not inside `evaluate_everything`."""
    return not _everything
