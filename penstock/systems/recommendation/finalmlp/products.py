"""A simulated click log in which what two fields say depends on each other, and which fields say nothing is known.

Shape legend: B rows, M fields, U values of each, T products, R rank of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from penstock.data.schema import Field, Label, Rows, Schema
from penstock.data.tables import SPLITS, TableData
from penstock.errors import UserError


@dataclass
class ProductLogConfig:
    """The simulated click log."""

    products: int = 2
    """Pairs of fields that are multiplied: signal_0 with signal_1, signal_2 with signal_3 ..."""
    idle_fields: int = 4
    """Fields that say nothing: idle_0, idle_1 ..."""
    values: int = 19
    """Values of each field."""
    effect_std: float = 0.3
    """Standard deviation of the effect that each value of a signal field has by itself on the logit."""
    rank: int = 3
    """Rank of a product."""
    product_scale: float = 0.7
    """Size of a product, a sum of `rank` products of standard normal factors."""
    train_rows: int = 8000
    """Rows to train on."""
    validation_rows: int = 4000
    """Rows to validate on."""
    test_rows: int = 10000
    """Rows to test on."""
    seed: int = 0
    """Of the truth and the rows."""


class ProductLog(TableData):
    """A simulated click log.

    Attributes:
        signal: the names of the fields that matter, pair by pair.
        idle: the names of the others.
        spec: as of every table, and ``contexts``, the columns that drive the two gates unless a person names others.
    """

    def __init__(self, config: ProductLogConfig) -> None:
        sizes = (config.train_rows, config.validation_rows, config.test_rows)
        if min(config.products, config.values, config.rank, *sizes) < 1 or config.idle_fields < 0:
            raise UserError("the simulated click log needs a product, values, a rank and rows in all three splits")
        self.signal = [f"signal_{i}" for i in range(2 * config.products)]
        self.idle = [f"idle_{i}" for i in range(config.idle_fields)]
        draw = np.random.default_rng(config.seed)
        effects_MU = draw.normal(0, config.effect_std, (len(self.signal), config.values))
        factors_MUR = draw.normal(0, 1, (len(self.signal), config.values, config.rank))

        words = tuple(f"v{value}" for value in range(config.values))
        fields = [Field(name, "categorical", words=words) for name in (*self.signal, *self.idle)]
        schema = Schema.lay_out(fields, [Label("click", ("0", "1"), number=True)])
        first = np.array([one.offset + 1 for one in schema.fields])
        place = np.arange(len(self.signal))

        splits = {}
        for split, rows in zip(SPLITS, sizes, strict=True):
            values_BM = draw.integers(0, config.values, (rows, len(fields)))
            signal_BM = values_BM[:, : len(self.signal)]
            factors_BMR = factors_MUR[place, signal_BM]
            products_BT = (factors_BMR[:, ::2] * factors_BMR[:, 1::2]).sum(2)
            logit = effects_MU[place, signal_BM].sum(1) + config.product_scale * products_BT.sum(1)
            clicked = draw.random(rows) < 1 / (1 + np.exp(-logit))
            splits[split] = Rows(
                (first + values_BM).astype(np.int32),
                np.empty((rows, 0), np.float32),
                np.empty((rows, 0, 0), np.int32),
                clicked[:, None].astype(np.float32),
            )
        super().__init__(schema, splits, f"simulated click log with planted products (seed {config.seed})")
        self.spec["contexts"] = [[name] for name in self.signal[:2]]

    def describe(self) -> dict[str, Any]:
        pairs = [f"{a} x {b}" for a, b in list(pairwise(self.signal))[::2]]
        return super().describe() | {"multiplied fields": pairs, "idle fields": self.idle}
