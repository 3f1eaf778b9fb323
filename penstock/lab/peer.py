"""A peer in a process of its own, as its users run it: our settings of memory and threads do not reach it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Peer:
    """Calls a function in another process, again and again.

    Args:
        make: builds the function there; it must be importable, or a `functools.partial` of what is.
    """

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        # A daemon: it ends with this process.
        self._process = context.Process(target=_serve, args=(there, make, torch.get_num_threads()), daemon=True)
        self._process.start()
        there.close()
        self()

    def __call__(self) -> None:
        """Call it once and wait for its end.

        Raises:
            RuntimeError: if its process has ended; what went wrong stands on the terminal then.
        """
        try:
            self._here.send(None)
            self._here.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("the peer's process has ended") from None


def _serve(pipe: Connection, make: Callable[[], Callable[[], Any]], threads: int) -> None:
    torch.set_num_threads(threads)
    call: Callable[[], Any] | None = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        call = call or make()
        call()
        pipe.send(None)
