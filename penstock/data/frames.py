"""Tables in memory: pandas and polars frames and NumPy arrays, read like a file. What a column is, its type says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from penstock.data.base import Source
from penstock.data.rawtables import Chunk, RawTable, clean

_CHUNK_ROWS = 1 << 16
_DAY_NS = 86_400 * 10**9
#: What a column is by its type; numbers are looked at.
_KINDS = {pl.String: "categorical", pl.Boolean: "categorical", pl.List: "sequence"}


class FrameTable(RawTable):
    """A frame, with the interface of a table on disk.

    Args:
        frame: as `to_polars` gives it.
        kinds: settings of columns (see `penstock.data.schema.Field`) that stand before what would be inferred.
    """

    def __init__(self, frame: pl.DataFrame, kinds: Mapping[str, Any] | None = None) -> None:
        self.path = Path("the frame")  # as messages name it
        self.frame = frame.select(clean(column) for column in frame)
        self.columns = frame.columns
        self.has_header, self.num_rows = True, frame.height
        known = {name: _KINDS.get(dtype.base_type()) for name, dtype in frame.schema.items()}
        self.settings: dict[str, dict[str, Any]] = {name: {"kind": kind} for name, kind in known.items() if kind}
        for name, given in (kinds or {}).items():
            self.settings.setdefault(name, {}).update(given if isinstance(given, Mapping) else {"kind": given})

    def chunks(self, what: str = "read", columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = self.frame.select(name for name in self.columns if columns is None or name in columns)
        for start in range(0, wanted.height, _CHUNK_ROWS):
            yield Chunk(self.path, start + 1, wanted.slice(start, _CHUNK_ROWS), start)


@dataclass(frozen=True)
class FrameSource(Source):
    """A frame in the place of ``data``; one of its columns must mark the rows for training and validation."""

    table: FrameTable = field(kw_only=True)


def is_frame(table: Any) -> bool:
    """Whether it is a polars or, as far as that can be told without importing it, a pandas frame."""
    return isinstance(table, pl.DataFrame) or (hasattr(table, "iloc") and table.ndim == 2)


def to_polars(table: Any, names: Sequence[str]) -> pl.DataFrame:
    """A frame or array with columns of text, bool, numbers and lists.

    Args:
        table: a pandas or polars frame, or an array (rows, columns) of numbers, text or objects.
        names: of the columns, in their order.

    Returns:
        categorical columns and whatever is no number, list or bool as text, dates and durations as days (since 1970).
    """
    if isinstance(table, pl.DataFrame):
        columns = table.get_columns()
    elif is_frame(table):
        columns = [_from_pandas(table.iloc[:, place]) for place in range(len(names))]
    else:
        columns = [_from_numpy(table[:, place]) for place in range(len(names))]
    return pl.DataFrame([_simple(column).alias(name) for column, name in zip(columns, names, strict=True)])


def _from_pandas(column: Any) -> pl.Series:
    if column.dtype == "category":
        # Through objects: its categories may be of any type, and are categories whatever they are.
        return _from_numpy(column.astype(object).to_numpy()).cast(pl.String)
    if column.dtype == object:
        return _from_numpy(column.to_numpy())
    try:
        return pl.Series(pl.from_pandas(column))
    except (pa.ArrowException, TypeError, ValueError):
        return _words(column)


def _from_numpy(column: NDArray[Any]) -> pl.Series:
    try:
        return pl.Series(pl.from_arrow(pa.array(column, from_pandas=True)))
    except pa.ArrowException:
        return _words(column)


def _words(values: Any) -> pl.Series:
    """Objects of several types, each as it prints; what pandas calls missing is missing."""
    words = pl.Series([str(value) for value in values], dtype=pl.String)
    return words.set(words.is_in(["<NA>", "NaT"]), None)


def _simple(column: pl.Series) -> pl.Series:
    kind = column.dtype
    if isinstance(kind, pl.Array):
        return column.cast(pl.List(kind.inner))
    if isinstance(kind, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    if isinstance(kind, pl.Date | pl.Datetime):
        return column.cast(pl.Datetime("ns")).cast(pl.Int64) / _DAY_NS
    if isinstance(kind, pl.Duration | pl.Time):
        return (column.cast(pl.Duration("ns")) if kind == pl.Duration else column).cast(pl.Int64) / _DAY_NS
    if isinstance(kind, pl.List) or kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Null):
        return column
    return _words(column)
