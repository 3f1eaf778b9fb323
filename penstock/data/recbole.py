"""RecBole's atomic files: interactions in NAME.inter, and what is known of users and items in NAME.user and NAME.item.

All are separated by tabs, and their headers give each column's type, as ``user_id:token`` or ``rating:float``.
Interactions are read in chunks; the other two, which hold a row a user or item, are kept in memory and joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from penstock.data.fuxictr import encoded_folder
from penstock.data.rawtables import Chunk, RawTable
from penstock.errors import UserError

#: What each type of a header says of its column; numbers in sequences have no place in a batch.
_TYPES: dict[str, dict[str, Any]] = {
    "token": {"kind": "categorical"},
    "float": {"kind": "numeric"},
    "token_seq": {"kind": "sequence", "separator": " "},
    "float_seq": {"kind": "drop"},
}


class _Side(NamedTuple):
    """A table of users or items: the column it is joined on, and its rows under the names they will have."""

    key: str
    frame: pl.DataFrame


class AtomicFiles(RawTable):
    """Interactions with their users' and items' columns, as one table.

    Args:
        path: NAME.inter, beside which NAME.user and NAME.item may lie, or a directory that holds one such file.

    A column of users or items whose name is taken becomes ``user.NAME`` or ``item.NAME``; what an id without a row of
    its own would have there is missing.

    Raises:
        UserError: for a header without types, and for users or items that cannot be joined.
    """

    settings: dict[str, dict[str, Any]]
    notes: list[str]

    def __init__(self, path: Path) -> None:
        self.inter = RawTable(_interactions(path))
        self.path, self.has_header, self.notes, self.num_rows = path, True, [], 0
        self.settings = _typed(self.inter)
        self.sides: list[_Side] = []
        for what in ("user", "item"):
            if (side := _beside(self.inter.path, what)) is not None:
                self._join(what, RawTable(side))
        self.columns = list(self.settings)
        self.notes += [
            f"{name}: sequences of numbers are left out" for name, s in self.settings.items() if s["kind"] == "drop"
        ]

    def _join(self, what: str, table: RawTable) -> None:
        types = _typed(table)
        key = next((name for name, s in types.items() if s == _TYPES["token"] and self.settings.get(name) == s), None)
        if key is None:
            raise UserError(f"{table.path}: shares no column of tokens with {self.inter.path.name}, as {what}_id:token")
        names = {name: name if name == key or name not in self.settings else f"{what}.{name}" for name in types}
        frames = [pl.DataFrame(schema=dict.fromkeys(types, pl.String))]
        rows: dict[str, int] = {}
        for chunk in table.chunks():
            chunk = chunk._replace(frame=chunk.frame.rename(dict(zip(chunk.frame.columns, types, strict=True))))
            for name, settings in types.items():
                if settings["kind"] == "numeric":
                    chunk.numbers(name)  # here, while the row is known
            for place, word in enumerate(chunk.frame[key]):
                if word is None:
                    continue
                if word in rows:
                    raise chunk.error(place, key, f"{word!r} has a row already, row {rows[word]}; one is enough")
                rows[word] = chunk.start + place
            frames.append(chunk.frame)
        self.sides.append(_Side(key, pl.concat(frames).drop_nulls(key).rename(names)))
        self.settings |= {names[name]: settings for name, settings in types.items() if name != key}
        self.notes.append(f"{table.path.name}: {len(rows):,} rows joined on {key}")
        self.notes += [
            f"{name} of {table.path.name} is called {new}, since there is another {name}"
            for name, new in names.items()
            if name != new
        ]

    def chunks(self, what: str = "read", columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        for chunk in self.inter.chunks(what):
            names = dict(zip(chunk.frame.columns, (_name(column) for column in chunk.frame.columns), strict=True))
            frame = chunk.frame.rename(names)
            for side in self.sides:
                frame = frame.join(side.frame, on=side.key, how="left", maintain_order="left")
            yield chunk._replace(
                frame=frame.select(name for name in self.columns if columns is None or name in columns)
            )
        self.num_rows = self.inter.num_rows


def open_table(path: Path) -> RawTable:
    """The table at ``path``, RecBole's atomic files or any other.

    Raises:
        UserError: if it cannot be read.
    """
    if path.suffix in (".user", ".item"):
        raise UserError(f"{path}: holds no interactions; give {path.with_suffix('.inter')}, which it is joined to")
    if encoded_folder(path) is not None:
        raise UserError(f"{path}: holds several tables; give one of them, as {path / 'test.parquet'}")
    atomic = path.suffix == ".inter" or (path.is_dir() and any(path.glob("*.inter")))
    return AtomicFiles(path) if atomic else RawTable(path)


def _interactions(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.inter"))
    if len(found) > 1:
        raise UserError(f"{path}: holds {', '.join(one.name for one in found)}; give one of them")
    return found[0]


def _beside(path: Path, what: str) -> Path | None:
    """NAME.user or NAME.item, also for NAME.train.inter."""
    names = [f"{path.stem}.{what}", f"{path.stem.rpartition('.')[0]}.{what}"]
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), None)


def _name(column: str) -> str:
    return column.rpartition(":")[0]


def _typed(table: RawTable) -> dict[str, dict[str, Any]]:
    """What a header says of each column, by the name without its type."""
    types = {}
    for column in table.columns:
        name, _, kind = column.rpartition(":")
        if not name or kind not in _TYPES:
            raise UserError(
                f"{table.path}, header: {column!r} has no type; RecBole's read NAME:TYPE, and types are "
                f"{', '.join(_TYPES)}"
            )
        if name in types:
            raise UserError(f"{table.path}, header: {name!r} names more than one column; names must differ")
        types[name] = _TYPES[kind]
    return types
