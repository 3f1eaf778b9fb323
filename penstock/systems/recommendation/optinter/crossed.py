"""The data of OptInter: tables whose crosses have been counted, and a simulated log with a pair to be memorised.

Shape legend: N rows, F crossed fields, P pairs, K combinations with a row of their own, U values of a field, I
informative fields, R rank.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.ondisk import release
from penstock.data.parts import Peers, peers
from penstock.data.schema import Schema
from penstock.data.tables import TableData
from penstock.errors import UserError
from penstock.systems.recommendation.optinter.vocabulary import all_pairs, pair_bases

#: Rows read at a time while crosses are counted.
_CHUNK = 1 << 20
#: Rows of a pair whose crosses nobody counted (a table that another system has read, in `penstock compare`).
_UNCOUNTED_ROWS = 20_000


@dataclass
class CrossConfig:
    """How combinations of two values get rows of their own."""

    min_count: int = 2
    """Combinations seen less often in training share their pair's "rare" row (Y in the paper)."""
    hash_above: int = 1_000_000
    """A pair with more combinations than this is hashed into as many rows."""
    memory_mb: int = 4096
    """The most that the cross table may take in training (weights, gradient and Adam's two averages)."""

    def check(self) -> None:
        """Raise `UserError` for settings that no crosses can be counted with."""
        for name in ("min_count", "hash_above", "memory_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"crosses.{name}={getattr(self, name)} must be 1 or more")


class Crosses(NamedTuple):
    """What a `CrossVocabulary` is built from.

    Attributes:
        rows, exact: of each pair (P).
        keys: (K,) int64, rising.
    """

    rows: list[int]
    exact: list[bool]
    keys: Tensor

    def to_spec(self) -> dict[str, Any]:
        """As plain JSON values; the keys, of which there can be millions, compressed."""
        steps = np.diff(self.keys.numpy().astype("<i8"), prepend=np.int64(0))
        return {
            "rows": self.rows,
            "exact": self.exact,
            "keys": base64.b64encode(zlib.compress(steps.tobytes())).decode("ascii"),
        }

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Crosses:
        """Of a table's ``spec``; where nobody counted them, every combination has a row or is hashed."""
        if (packed := spec.get("crosses")) is not None:
            steps = np.frombuffer(zlib.decompress(base64.b64decode(packed["keys"])), "<i8")
            return cls(list(packed["rows"]), list(packed["exact"]), torch.from_numpy(steps.cumsum(dtype=np.int64)))
        sizes = [f.size for f in Schema.from_dict(spec["schema"]).of("ids")]
        rows = [min(sizes[i] * sizes[j], _UNCOUNTED_ROWS) for i, j in all_pairs(len(sizes))]
        return cls(rows, [False] * len(rows), torch.empty(0, dtype=torch.int64))


def megabytes(rows: int, dim: int) -> float:
    """What a table takes in training: float32 weights, gradient and Adam's two averages."""
    return rows * dim * 4 * 4 / 2**20


def count_crosses(
    ids_NF: NDArray[np.int32], schema: Schema, config: CrossConfig, together: Peers | None = None
) -> Crosses:
    """Find the combinations that are frequent enough, pair by pair, so that one pair's are in memory at a time.

    Args:
        ids_NF: global ids of the training rows.
        schema: of the table.
        config: how.
        together: the processes of which each has some of these rows; default: all are here.
    """
    fields = schema.of("ids")
    sizes = [f.size for f in fields]
    rows: list[int] = []
    exact: list[bool] = []
    kept: list[NDArray[np.int64]] = []
    for (i, j), base in zip(all_pairs(len(sizes)), pair_bases(sizes), strict=True):
        keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for start in range(0, len(ids_NF), _CHUNK):
            chunk = ids_NF[start : start + _CHUNK]
            first, second = (chunk[:, field].astype(np.int64) - fields[field].offset for field in (i, j))
            new, times = np.unique(first * sizes[j] + second, return_counts=True)
            keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, times])).astype(np.int64)
        release([ids_NF])  # rows on disk would otherwise stay in memory once they were read
        if together is not None:
            every = together.gather((keys, counts))
            keys, place = np.unique(np.concatenate([own for own, _ in every]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([own for _, own in every])).astype(np.int64)
        frequent = keys[counts >= config.min_count]
        exact.append(len(frequent) <= config.hash_above)
        rows.append(len(frequent) + 1 if exact[-1] else config.hash_above)
        if exact[-1]:
            kept.append(base + frequent)
    return Crosses(rows, exact, torch.from_numpy(np.concatenate([*kept, np.empty(0, np.int64)])))


class CrossedTable(TableData):
    """A table, and the crosses of its categorical fields as found in the training rows.

    Args:
        table: as read or simulated.
        config: how crosses are counted.
        dim: width of a cross's embedding, for the estimate of memory.

    Attributes:
        table: what was given.
        spec: as of `TableData`, with ``crosses``.

    Raises:
        UserError: for a table with fewer than two fields to be crossed.
    """

    def __init__(self, table: TableData, config: CrossConfig, dim: int) -> None:
        config.check()
        if len(fields := table.schema.of("ids")) < 2:
            names = ", ".join(f.name for f in fields) or "none"
            raise UserError(
                f"{table.source}: categorical fields: {names}; a pair needs two or more (numbers are among them with "
                "--table.numeric bucket or quantile)"
            )
        together = peers.get() if "train" in table.shares else None
        crosses = count_crosses(table.splits["train"].ids, table.schema, config, together)
        total, hashed = sum(crosses.rows), len(crosses.rows) - sum(crosses.exact)
        note = (
            f"crosses of {len(crosses.rows)} pairs of fields: {total:,} rows"
            + (f" ({hashed} pairs hashed)" if hashed else "")
            + f", {megabytes(total, dim):,.1f} MB in training at width {dim}"
        )
        super().__init__(table.schema, table.splits, table.source, [*table.notes, note], table.vectors, table.shares)
        self.table = table
        self.spec["crosses"] = crosses.to_spec()

    def describe(self) -> dict[str, Any]:
        rows = sum(self.spec["crosses"]["rows"])
        return self.table.describe() | {"rows of crosses": rows, "notes": self.notes}


class PlantedLog(TableData):
    """The simulated click log with a second interaction, one that no short product can express.

    signal_0 and signal_1 interact by a product of rank R, as in `ClickLog`; signal_2 and signal_3 by a table with an
    independent normal entry for each combination; all other pairs are empty.

    Args:
        config: of the log.
        table_scale: standard deviation of the table's entries.

    Raises:
        UserError: for fewer than four informative fields.
    """

    product_pair = ("signal_0", "signal_1")
    table_pair = ("signal_2", "signal_3")

    def __init__(self, config: ClickLogConfig, table_scale: float) -> None:
        if config.informative_fields < 4:
            raise UserError(
                f"data.informative_fields={config.informative_fields}: two pairs are planted, which takes four fields"
            )
        base = ClickLog(config)
        # The fields, their ids and the size of the splits are the log's; what they mean is drawn here.
        draw = np.random.default_rng([config.seed, 1])
        fields, values = config.informative_fields, config.informative_values
        effects_IU = draw.normal(0, config.effect_std, (fields, values))
        factors_2UR = draw.normal(0, 1, (2, values, config.pair_rank))
        table_UU = draw.normal(0, table_scale, (values, values))
        first = np.array([f.offset + 1 for f in base.schema.fields[:fields]])
        splits = {}
        for split, rows in base.splits.items():
            signal_NI = rows.ids[:, :fields] - first
            logit_N = effects_IU[np.arange(fields), signal_NI].sum(1)
            logit_N += config.pair_scale * (factors_2UR[0, signal_NI[:, 0]] * factors_2UR[1, signal_NI[:, 1]]).sum(1)
            logit_N += table_UU[signal_NI[:, 2], signal_NI[:, 3]]
            clicked_N = draw.random(len(logit_N)) < 1 / (1 + np.exp(-logit_N))
            splits[split] = rows._replace(label=clicked_N[:, None].astype(np.float32))
        super().__init__(base.schema, splits, f"{base.source}, two pairs planted")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"product pair": list(self.product_pair), "table pair": list(self.table_pair)}

    def pair(self, names: Sequence[str]) -> int:
        """The place of a pair among all."""
        first, second = (self.spec["fields"].index(name) for name in names)
        return all_pairs(len(self.spec["fields"])).index((first, second))
