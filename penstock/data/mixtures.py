"""Tables for mixtures of experts: planted regions, ratings of a planted audience, or the user's own.

All are a `MixtureData`: a table whose ``spec`` also says what each label column is to be learned as.

Shape legend: B rows, D inputs, R regions, U users, I items, G groups of users, H hidden traits of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from penstock.data.base import Source
from penstock.data.schema import Field, Label, Rows, Schema
from penstock.data.tables import Split, TableConfig, TableData, read_table
from penstock.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class MixtureConfig:
    """Which table, and what its labels mean."""

    kind: Literal["planted", "ratings"] = "planted"
    """The embedded data: eight regions with a linear map each, or users and items with two labels."""
    train_size: int = 0
    """Rows of the embedded data to train on; 0: 3000 planted ones, 40000 ratings."""
    validation_size: int = 0
    """Rows to validate on; 0: 1000 or 5000."""
    test_size: int = 0
    """Rows to test on; 0: 2000 or 5000."""
    seed: int = 0
    """Of the embedded data."""
    task_weights: tuple[float, ...] = ()
    """Weight of each label in the loss, in their order; default: all 1 (ratings: 0.1 watched, 0.9 rating)."""
    zero_is_missing: tuple[str, ...] = ()
    """Labels that are numbers in which 0 stands for "not given": such rows do not count for them."""
    table: TableConfig = field(default_factory=lambda: TableConfig(numeric="standardize"))
    """How the user's own table is read."""


@dataclass(frozen=True)
class LabelTask:
    """How one label is learned; stands in ``spec["tasks"]`` as plain values.

    Attributes:
        name: of the label's column.
        kind: a number by squared error, or one of two classes by cross-entropy.
        weight: in the loss.
        masked: whether 0 means that there is no value.
        mean, std: of a number in training; the model predicts (label - mean) / std.
        classes: the two values of a binary label.
    """

    name: str
    kind: Literal["regression", "binary"] = "regression"
    weight: float = 1.0
    masked: bool = False
    mean: float = 0.0
    std: float = 1.0
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> list[LabelTask]:
        """The tasks of a table, from its ``spec``."""
        return [cls(**task | {"classes": tuple(task["classes"])}) for task in spec["tasks"]]


@dataclass(frozen=True)
class PlantedMixture:
    """The truth of the planted data: the signs of the first inputs name a region, each region has its linear map.

    Attributes:
        maps: (R, D), R a power of two.
    """

    maps: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, *, dim: int = 6, splits: int = 3) -> PlantedMixture:
        """Standard normal maps for 2 ** splits regions."""
        return cls(rng.standard_normal((2**splits, dim)))

    def region(self, x: NDArray[Any]) -> Integers:
        """(B, D) -> (B,), bit i set where input i is positive."""
        signs = x[:, : len(self.maps).bit_length() - 1] > 0
        return signs @ (1 << np.arange(signs.shape[1]))

    def target(self, x: NDArray[Any]) -> Floats:
        """(B, D) -> (B,)."""
        return np.einsum("bd,bd->b", x, self.maps[self.region(x)])


@dataclass(frozen=True)
class PlantedAudience:
    """The truth of the ratings: users belong to groups, and a group likes items by their hidden traits.

    Attributes:
        group: (U,) of each user.
        traits: (I, H) of each item.
        seeks, enjoys: (G, H) what makes a group watch, and what makes it rate highly.
    """

    group: Integers
    traits: Floats
    seeks: Floats
    enjoys: Floats

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, users: int = 400, items: int = 200, groups: int = 8, traits: int = 4
    ) -> PlantedAudience:
        """Groups of about equal size with normal tastes."""
        tastes = rng.standard_normal((2, groups, traits))
        return cls(rng.integers(groups, size=users), rng.standard_normal((items, traits)), tastes[0], tastes[1])

    def watches(self, user: Integers, item: Integers) -> Floats:
        """Probability that a user watches an item, (B,), (B,) -> (B,)."""
        return 1 / (1 + np.exp(-np.einsum("bh,bh->b", self.seeks[self.group[user]], self.traits[item])))

    def liking(self, user: Integers, item: Integers) -> Floats:
        """Mean of the rating before it is rounded to 1 .. 5, (B,), (B,) -> (B,)."""
        return 3 + 0.6 * np.einsum("bh,bh->b", self.enjoys[self.group[user]], self.traits[item])


class MixtureData(TableData):
    """A table and what its labels are learned as.

    Args:
        schema, splits, source, notes: as of `TableData`.
        tasks: one for each label, in their order.
        truth: behind an embedded table.

    Attributes:
        spec: that of `TableData`, ``tasks``, and ``num_rows`` to train on.
    """

    def __init__(
        self,
        schema: Schema,
        splits: Mapping[Split, Rows],
        source: str,
        notes: Sequence[str],
        tasks: Sequence[LabelTask],
        truth: PlantedMixture | PlantedAudience | None = None,
    ) -> None:
        super().__init__(schema, splits, source, notes)
        self.truth = truth
        self.spec["num_rows"] = len(splits["train"].label)
        self.spec["tasks"] = [asdict(task) | {"classes": list(task.classes)} for task in tasks]


def load_mixture(config: MixtureConfig, source: Source) -> MixtureData:
    """The embedded table that ``config`` names or, where ``source`` gives a path, the user's own.

    Raises:
        UserError: for a table, label or setting that cannot be used.
    """
    if source.data is not None:
        return _own(config, source)
    return _planted(config) if config.kind == "planted" else _ratings(config)


def _planted(config: MixtureConfig) -> MixtureData:
    """Normal inputs x1 .. x6 and one label y without noise."""
    rng = np.random.default_rng(config.seed)
    truth = PlantedMixture.draw(rng)
    dim = truth.maps.shape[1]

    def rows(count: int) -> Rows:
        x = rng.standard_normal((count, dim)).astype(np.float32)
        return _rows(numeric=x, label=truth.target(x)[:, None])

    schema = Schema.lay_out([Field(f"x{i + 1}", "numeric", numeric="standardize") for i in range(dim)], [Label("y")])
    note = f"{len(truth.maps)} regions by the signs of the first inputs, each with its own linear map; no noise"
    tasks = _weighted([LabelTask("y")], config)
    return MixtureData(schema, _splits(config, rows), f"planted mixture, seed {config.seed}", [note], tasks, truth)


def _ratings(config: MixtureConfig) -> MixtureData:
    """Pairs of user and item with two labels: watched (0 or 1) and, of those watched, the rating 1 .. 5 (else 0)."""
    rng = np.random.default_rng(config.seed)
    truth = PlantedAudience.draw(rng)
    users, items = len(truth.group), len(truth.traits)
    fields = [
        Field(name, "categorical", words=tuple(map(str, range(n)))) for name, n in (("user", users), ("item", items))
    ]
    schema = Schema.lay_out(fields, [Label("watched", ("0", "1")), Label("rating")])
    first = np.array([one.offset + 1 for one in schema.fields])  # before it is the id of a missing value

    def rows(count: int) -> Rows:
        pair = rng.integers([users, items], size=(count, 2))
        watched = rng.random(count) < truth.watches(pair[:, 0], pair[:, 1])
        liking = truth.liking(pair[:, 0], pair[:, 1]) + 0.5 * rng.standard_normal(count)
        rating = np.where(watched, liking.round().clip(1, 5), 0)
        return _rows(ids=pair + first, label=np.stack([watched, rating], 1))

    notes = [f"{len(truth.seeks)} groups of users, each with its own taste", "a rating of 0 is none"]
    splits = _splits(config, rows)
    tasks = [LabelTask("watched", "binary", 0.1, classes=("0", "1")), LabelTask("rating", weight=0.9, masked=True)]
    scaled = _scaled(_weighted(tasks, config), splits["train"], "planted ratings")
    return MixtureData(schema, splits, f"planted ratings, seed {config.seed}", notes, scaled, truth)


def _own(config: MixtureConfig, source: Source) -> MixtureData:
    table = read_table(config.table, source, labels="any")
    numbers = [label.name for label in table.schema.labels if not label.classes]
    if unknown := [name for name in config.zero_is_missing if name not in numbers]:
        known = ", ".join(numbers) or "(none)"
        raise UserError(f"data.zero_is_missing names {unknown[0]!r}; the labels that are numbers are {known}")
    tasks = [
        LabelTask(label.name, "binary", classes=label.classes)
        if label.classes
        else LabelTask(label.name, masked=label.name in config.zero_is_missing)
        for label in table.schema.labels
    ]
    scaled = _scaled(_weighted(tasks, config), table.splits["train"], table.source)
    return MixtureData(table.schema, table.splits, table.source, table.notes, scaled)


def _weighted(tasks: Sequence[LabelTask], config: MixtureConfig) -> list[LabelTask]:
    weights = config.task_weights or tuple(task.weight for task in tasks)
    if len(weights) != len(tasks) or min(weights) < 0 or not sum(weights):
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"data.task_weights={weights}: give each label ({names}) a weight of 0 or more, not all 0")
    return [replace(task, weight=float(weight)) for task, weight in zip(tasks, weights, strict=True)]


def _scaled(tasks: Sequence[LabelTask], train: Rows, source: str) -> list[LabelTask]:
    """The tasks with the mean and deviation of labels that are numbers, so that a model predicts numbers near one."""
    scaled = []
    for task, column in zip(tasks, train.label.T.astype(np.float64), strict=True):
        given = column[column != 0] if task.masked else column
        if not len(given):
            raise UserError(f"{source}: the label {task.name!r} is 0, that is not given, in every training row")
        binary = task.kind == "binary"
        scaled.append(task if binary else replace(task, mean=float(given.mean()), std=float(given.std()) or 1.0))
    return scaled


def _splits(config: MixtureConfig, rows: Callable[[int], Rows]) -> dict[Split, Rows]:
    asked = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}
    usual = (3000, 1000, 2000) if config.kind == "planted" else (40_000, 5000, 5000)
    sizes = {split: size or default for (split, size), default in zip(asked.items(), usual, strict=True)}
    if min(sizes.values()) < 2:
        raise UserError(f"the embedded data needs 2 rows or more in each split, not {sizes}")
    return {cast(Split, split): rows(size) for split, size in sizes.items()}


def _rows(*, label: NDArray[Any], ids: NDArray[Any] | None = None, numeric: NDArray[Any] | None = None) -> Rows:
    none = np.empty((len(label), 0))
    return Rows(
        (none if ids is None else ids).astype(np.int32),
        (none if numeric is None else numeric).astype(np.float32),
        np.empty((len(label), 0, 0), np.int32),
        label.astype(np.float32),
    )
