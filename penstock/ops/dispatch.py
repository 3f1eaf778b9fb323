"""Which form of an operation runs: chosen by device and availability, overridable, and visible afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger("penstock.ops")

#: The form each operation took the last time it ran, by the operation's name.
last_backend: dict[str, str] = {}


def choose(operation: str, backend: str | None, known: Sequence[str], default: Callable[[], str]) -> str:
    """The backend to run: the one asked for, or the default; recorded in `last_backend` and logged at debug.

    Args:
        operation: its public name.
        backend: what the caller asked for; ``None`` leaves it to ``default``.
        known: the operation's backends.
        default: picks by device, dtype and what is installed.

    Raises:
        ValueError: for a backend the operation does not have.
    """
    if backend is None:
        backend = default()
    elif backend not in known:
        raise ValueError(f"{operation} has no backend {backend!r}; it has {', '.join(known)}")
    last_backend[operation] = backend
    if not torch.compiler.is_compiling():
        _log.debug("%s: %s", operation, backend)
    return backend
