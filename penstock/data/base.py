"""What every data set offers to a task, and where the user's own data is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.data.loader import Batches


@dataclass(frozen=True)
class Source:
    """Where the data comes from: the paths of ``--data`` and ``--test`` and the column of ``--label``.

    All ``None``: the embedded default.
    """

    data: Path | None = None
    test: Path | None = None
    label: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """As plain values; paths become absolute, so that a run can be used from anywhere."""
        paths = {"data": self.data, "test": self.test}
        return {k: str(p.resolve()) if p else None for k, p in paths.items()} | {"label": self.label}

    @classmethod
    def from_dict(cls, values: Mapping[str, str | None]) -> Source:
        """The inverse of `to_dict`."""
        data, test = values.get("data"), values.get("test")
        return cls(Path(data) if data else None, Path(test) if test else None, values.get("label"))


class Progress(Protocol):
    """Someone who shows how far a long job is."""

    def bar(self, title: str, total: int, *, announce: bool = True) -> AbstractContextManager[None]:
        """While this is open, a job of ``total`` steps (0: nobody knows) is under way."""

    def advance(self, step: int, note: str) -> None:
        """The job is at ``step``."""


#: Who is told how far reading is; the laboratory sets it to its reporter.
progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A job that `progress` is told of; call what this gives with the rows done so far, of ``total`` (0: unknown)."""
    shown = progress.get()
    if shown is None:
        yield lambda done: None
        return
    with shown.bar(title, total, announce=False):
        yield lambda done: shown.advance(done, "" if total else f"{done:,} rows")


class Data(ABC):
    """Three splits of one data set.

    Attributes:
        spec: everything a model needs to be built and new data to be read (sizes, vocabularies, classes, the
            table's schema), as plain JSON values: it is stored with the run.
    """

    spec: dict[str, Any]

    @abstractmethod
    def train(self, batch_size: int, seed: int) -> Batches:
        """The training split, shuffled anew each epoch."""

    @abstractmethod
    def validation(self, batch_size: int) -> Batches:
        """The validation split, in order."""

    @abstractmethod
    def test(self, batch_size: int) -> Batches:
        """The test split, in order."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For people and ``results.json``: where it is from, the sizes of the splits, what is in it."""

    def overview(self) -> str:
        """What was read, for the terminal, before training starts."""
        return "\n".join(f"{name}: {value}" for name, value in self.describe().items())
