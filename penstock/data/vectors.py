"""Pre-trained vectors of a column's values, from the files people have.

Shape legend: K values with a vector, W its width, D the width of a model's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penstock.data.rawtables import Chunk, RawTable, as_text
from penstock.data.schema import Field, Schema
from penstock.errors import UserError

_WANTED = "a .parquet, .csv, .tsv, .npz, .txt or .vec file"


@dataclass(frozen=True)
class Vectors:
    """Pre-trained vectors of some of a field's ids.

    Attributes:
        path: where they are from.
        field: whose values they belong to.
        ids: (K,) global ids.
        values: (K, W) float32.
        freeze: whether training must leave them as they are.
    """

    path: Path
    field: str
    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    freeze: bool

    def of_width(self, dim: int) -> tuple[NDArray[np.float32], float]:
        """The vectors at a model's width, by truncated SVD where they are wider.

        Args:
            dim: D.

        Returns:
            (K, D) and the share of their squared length that is kept.

        Raises:
            UserError: if they are narrower.
        """
        width = self.values.shape[1]
        if width < dim:
            raise UserError(
                f"{self.path}: its vectors have width {width} and the model's table is wider, {dim}; set dim to "
                f"{width} or less"
            )
        if width == dim:
            return self.values, 1.0
        exact = self.values.astype(np.float64)
        squares, directions = np.linalg.eigh(exact.T @ exact)  # rising
        top = directions[:, : -dim - 1 : -1]
        # A direction is the same as its opposite: the one whose largest part is positive.
        top = top * np.sign(top[np.abs(top).argmax(0), np.arange(dim)])
        return (exact @ top).astype(np.float32), float(squares[-dim:].sum() / max(squares.sum(), 1e-300))


def read_vectors(
    schema: Schema, settings: Mapping[str, Mapping[str, Any]], columns: str
) -> tuple[list[Vectors], list[str]]:
    """The vectors that a columns file asks for, and notes on how many values have one.

    Args:
        schema: of the table.
        settings: of each column, of which ``pretrained`` (a path, from the folder of the columns file) and ``freeze``
            are read.
        columns: path of the columns file.

    Raises:
        UserError: for a column without words of its own, or a file that cannot be used.
    """
    found: list[Vectors] = []
    notes = []
    for name, own in settings.items():
        if "pretrained" not in own:
            if "freeze" in own:
                raise UserError(f"{columns}, {name}: freeze is for vectors; give pretrained: FILE too")
            continue
        one = next((f for f in schema.fields if f.name == name), None)
        if one is None or not one.words or one.kind == "numeric" or one.share:
            why = f"shares the ids of {one.share}; give it there" if one and one.share else "has no words of its own"
            raise UserError(f"{columns}, {name}: pretrained vectors belong to words, and the column {why}")
        path = Path(columns).parent / own["pretrained"]
        found.append(_match(path, one, freeze=own.get("freeze", False)))
        still = ", which training leaves as they are" if found[-1].freeze else ""
        notes.append(f"{path.name}: vectors for {len(found[-1].ids):,} of {len(one.words):,} values of {name}{still}")
    return found, notes


def _match(path: Path, one: Field, *, freeze: bool) -> Vectors:
    places = {word: place for place, word in enumerate(one.words, 1)}
    values: dict[int, NDArray[np.float32]] = {}
    count = 0
    for keys, rows in _pairs(path):
        for key, row in zip(keys, rows, strict=True):
            count += 1
            if (place := places.get(key)) is not None:
                if place in values:
                    raise UserError(f"{path}: {key!r} has two vectors; a value can start from one")
                values[place] = row
    if not values:
        raise UserError(
            f"{path}: none of its {count} keys is a value of {one.name}, whose values are as {', '.join(one.words[:3])}"
        )
    stacked = np.stack(list(values.values()))
    if not np.isfinite(stacked).all():
        key = one.words[list(values)[int((~np.isfinite(stacked)).any(1).argmax())] - 1]
        raise UserError(f"{path}: the vector of {key!r} holds what is no finite number")
    return Vectors(path, one.name, one.offset + np.array(list(values), np.int64), stacked, freeze)


_Pairs = Iterator[tuple[list[str], NDArray[np.float32]]]


def _pairs(path: Path) -> _Pairs:
    """Keys and their vectors, some at a time."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of vectors")
    if path.suffix in (".txt", ".vec"):
        return _from_text(path)
    if path.suffix == ".npz":
        return _from_arrays(path)
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise UserError(f"{path}: vectors come in {_WANTED}")
    return (_from_chunk(chunk) for chunk in RawTable(path).chunks())


def _from_text(path: Path) -> _Pairs:
    """word2vec's text: a word and its numbers a line, perhaps after a line with the two sizes."""
    width = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *cells = line.rstrip().split(" ")
            if number == 1 and len(cells) == 1:
                continue
            width = width or len(cells)
            try:
                row = np.array(cells, np.float32)
            except ValueError:
                row = np.empty(0, np.float32)
            if not len(row) or len(row) != width:
                raise UserError(
                    f"{path}, line {number}: must be a word and {width or 'some'} numbers, all by one space"
                )
            yield [word], row[None]


def _from_arrays(path: Path) -> _Pairs:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys, values = arrays["key"], arrays["value"]
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: must hold the arrays key (K,) and value (K, W), without pickles ({reason})") from None
    if keys.ndim != 1 or values.ndim != 2 or len(keys) != len(values):
        raise UserError(f"{path}: key {keys.shape} and value {values.shape} must be (K,) and (K, W)")
    yield as_text(pl.Series(keys)).to_list(), values.astype(np.float32)


def _from_chunk(chunk: Chunk) -> tuple[list[str], NDArray[np.float32]]:
    """Rows of a table: the column ``key``, or else the first, and lists or columns of numbers."""
    names = chunk.frame.columns
    key = "key" if "key" in names else names[0]
    others = [name for name in names if name != key]
    words = chunk.text(key).fill_null("").to_list()
    if len(others) == 1 and isinstance(chunk.frame[others[0]].dtype, pl.List):
        lists = chunk.frame[others[0]]
        lengths = lists.list.len().fill_null(0).to_numpy()
        if (odd := lengths != lengths[0]).any():
            row = int(odd.argmax())
            raise chunk.error(row, others[0], f"{lengths[row]} numbers, where the first row has {lengths[0]}")
        flat = lists.explode().cast(pl.Float32, strict=False).fill_null(np.nan).to_numpy()
        return words, flat.reshape(len(words), -1)
    if not others:
        raise UserError(f"{chunk.path}: has the one column {key!r}; a key and its numbers are needed")
    columns = [chunk.numbers(name).fill_null(np.nan).to_numpy() for name in others]
    return words, np.stack(columns, 1).astype(np.float32)
