"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from penstock.data.base import progress

_LONG = 5.0  # seconds; of a stage that is worth a line


class Reporter:
    """Says how far a run is.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """A line of its own; text is shown as it is, never as markup."""
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, *, announce: bool = True) -> Iterator[None]:
        """A stage of ``total`` steps, 0 if nobody knows; `advance` moves it.

        Where there is no bar, lines say when it starts and ends; without ``announce`` only the end of one that took long.
        """
        if not self.console.is_terminal:
            if announce:
                self.say(f"{title} ...")
            start = time.monotonic()
            yield
            seconds = time.monotonic() - start
            if announce or seconds >= _LONG:
                self.say(f"{title}: done in {seconds:.0f} s")
            return
        count = [TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()] if total else []
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), *count]
        columns.append(TextColumn("{task.fields[note]}", markup=False))
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task(title, total=total or None, note="")
            yield
        self._progress = None

    def advance(self, step: int, note: str) -> None:
        """The stage is at ``step``."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, note=note)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Data that is read inside says how far it is."""
        token = progress.set(self)
        try:
            yield
        finally:
            progress.reset(token)

    def milestone(self, text: str) -> None:
        """Something worth a line where there is no bar (a validation)."""
        if self._progress is None:
            self.say(f"  {text}")
