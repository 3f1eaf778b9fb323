"""A simulated click log whose truth is known: which values matter, and which two fields interact.

Shape legend: B rows, I informative fields, U values of each, R rank of the pair interaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.schema import Field, Label, Rows, Schema
from penstock.data.tables import SPLITS, TableData
from penstock.errors import UserError


@dataclass
class ClickLogConfig:
    """The simulated click log."""

    informative_fields: int = 4
    """Fields whose values matter; the first two also interact."""
    informative_values: int = 20
    """Values of each of them."""
    noise_fields: int = 4
    """Fields whose values say nothing."""
    noise_values: int = 200
    """Values of each of them."""
    effect_std: float = 0.9
    """Standard deviation of a value's own effect on the logit."""
    pair_rank: int = 3
    """Rank of the interaction between the first two fields."""
    pair_scale: float = 0.7
    """Its size."""
    train_rows: int = 6000
    """Rows to train on."""
    validation_rows: int = 4000
    """Rows to validate on."""
    test_rows: int = 8000
    """Rows to test on."""
    seed: int = 0
    """Of the truth and the rows."""


@dataclass(frozen=True)
class Truth:
    """What is known about a simulated click log; masks are over the global id space.

    Attributes:
        informative: (num_ids,) bool, values that matter.
        noise: (num_ids,) bool, values that say nothing; ids for missing and unseen values are in neither.
        pair: the names of the two fields that interact.
        probability: of a one in each test row: no model can rank better.
    """

    informative: NDArray[np.bool_]
    noise: NDArray[np.bool_]
    pair: tuple[str, str]
    probability: NDArray[np.float64]


class ClickLog(TableData):
    """A simulated click log; a `TableData` with its ``truth``."""

    def __init__(self, config: ClickLogConfig) -> None:
        sizes = [config.informative_values] * config.informative_fields + [config.noise_values] * config.noise_fields
        if (
            config.informative_fields < 2
            or min(config.informative_values, config.noise_values) < 1
            or config.noise_fields < 0
        ):
            raise UserError(
                "the simulated click log needs two informative fields or more, and a value or more in each field"
            )
        if min(config.train_rows, config.validation_rows, config.test_rows) < 1:
            raise UserError("the simulated click log needs rows in all three splits")
        draw = np.random.default_rng(config.seed)
        effects_IU = draw.normal(0, config.effect_std, (config.informative_fields, config.informative_values))
        factors_2UR = draw.normal(0, 1, (2, config.informative_values, config.pair_rank))

        names = [f"signal_{i}" for i in range(config.informative_fields)] + [
            f"noise_{i}" for i in range(config.noise_fields)
        ]
        fields = [
            Field(name, "categorical", words=tuple(f"v{v}" for v in range(size)))
            for name, size in zip(names, sizes, strict=True)
        ]
        schema = Schema.lay_out(fields, [Label("click", ("0", "1"), number=True)])
        first = np.array([f.offset + 1 for f in schema.fields])

        splits, probability = {}, np.empty(0)
        for split, rows in zip(SPLITS, (config.train_rows, config.validation_rows, config.test_rows), strict=True):
            values = np.stack([draw.integers(0, size, rows) for size in sizes], 1)
            signal = values[:, : config.informative_fields]
            pair = (factors_2UR[0, signal[:, 0]] * factors_2UR[1, signal[:, 1]]).sum(1)
            logit = effects_IU[np.arange(config.informative_fields), signal].sum(1) + config.pair_scale * pair
            probability = 1 / (1 + np.exp(-logit))
            clicked = draw.random(rows) < probability
            splits[split] = Rows(
                (first + values).astype(np.int32),
                np.empty((rows, 0), np.float32),
                np.empty((rows, 0, 0), np.int32),
                clicked[:, None].astype(np.float32),
            )
        super().__init__(schema, splits, f"simulated click log (seed {config.seed})")
        self.truth = Truth(
            _values_of(schema, "signal_"), _values_of(schema, "noise_"), ("signal_0", "signal_1"), probability
        )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"interacting fields": list(self.truth.pair)}


def _values_of(schema: Schema, prefix: str) -> NDArray[np.bool_]:
    """(num_ids,) the ids of values of fields whose name starts so."""
    mask = np.zeros(schema.num_ids, np.bool_)
    for one in schema.fields:
        if one.name.startswith(prefix):
            mask[one.offset + 1 : one.offset + 1 + len(one.words)] = True
    return mask
