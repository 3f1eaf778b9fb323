"""What every data set offers to a task, and where the user's own data is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.data.loader import Batches


@dataclass(frozen=True)
class Source:
    """Where the data comes from: the paths of ``--data`` and ``--test`` and the column of ``--label``.

    All ``None``: the embedded default.
    """

    data: Path | None = None
    test: Path | None = None
    label: str | None = None


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
