"""What the columns of a table are, and how raw rows become ids and numbers.

Every field has a range of one global id space; the ranges lie end to end in the order of the batch, but for fields
that share another's. Within a field, 0 is a missing value (and the padding of a sequence), 1 .. n are the values kept,
and n + 1 is any value that was rare or absent in training. A number that stays one has one id only, that of its vector.

Shape legend: B batch, F fields with one id a row, N standardised numbers, S sequences, L longest sequence, T labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.data.hashing import hashed
from penstock.data.rawtables import Chunk, as_text, clean
from penstock.gates import Table

Kind = Literal["categorical", "numeric", "sequence"]
Numeric = Literal["bucket", "quantile", "standardize", "minmax"]
Part = Literal["ids", "numeric", "sequences"]


class TableBatch(NamedTuple):
    """Rows of a table.

    Attributes:
        ids: (B, F) global ids of categorical and bucketed fields, int64.
        numeric: (B, N) scaled numbers, float32, missing ones 0; N may be 0.
        sequences: (B, S, L) global ids, int64, padded at the end with the field's first id; S may be 0.
        label: (B,) or, with several labels, (B, T), float32.
        group: (B, 1) int64, a number for the user or session a row belongs to; (B, 0) if the table has none.
        weight: (B,) float32, of each row in the training loss; (0,) if all count alike.
    """

    ids: Tensor
    numeric: Tensor
    sequences: Tensor
    label: Tensor
    group: Tensor = torch.empty(0, 0, dtype=torch.int64)
    weight: Tensor = torch.empty(0)


class Rows(NamedTuple):
    """Encoded rows as arrays; as `TableBatch`, but ids in int32, labels always (rows, T), groups and weights optional."""

    ids: NDArray[np.int32]
    numeric: NDArray[np.float32]
    sequences: NDArray[np.int32]
    label: NDArray[np.float32]
    group: NDArray[np.int64] | None = None
    weight: NDArray[np.float32] | None = None

    def batch(self, index: NDArray[np.int64] | slice = slice(None)) -> TableBatch:
        """The rows at ``index`` as tensors of their own."""

        def at(part: NDArray[Any]) -> NDArray[Any]:
            # Twice as fast as part[index] where the index is an array.
            return part[index] if isinstance(index, slice) else np.take(part, index, 0)

        label = at(self.label)
        return TableBatch(
            torch.from_numpy(at(self.ids).astype(np.int64)),
            torch.from_numpy(np.array(at(self.numeric))),
            torch.from_numpy(at(self.sequences).astype(np.int64)),
            torch.from_numpy(np.array(label[:, 0] if label.shape[1] == 1 else label)),
            torch.empty(len(label), 0, dtype=torch.int64)
            if self.group is None
            else torch.from_numpy(np.array(at(self.group))),
            torch.empty(0) if self.weight is None else torch.from_numpy(np.array(at(self.weight))),
        )

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        group = None if self.group is None else self.group[chosen]
        weight = None if self.weight is None else self.weight[chosen]
        return Rows(self.ids[chosen], self.numeric[chosen], self.sequences[chosen], self.label[chosen], group, weight)


@dataclass(frozen=True)
class Field:
    """One column as a model sees it.

    Attributes:
        name: of the column.
        kind: what the column is.
        offset: the field's first global id.
        words: the values of local ids 1 .. n; of a bucketed number, its buckets.
        numeric: what becomes of a number ("" for other kinds).
        edges: upper ends of all quantiles but the last.
        mean, std: of a number that stays one, what is taken off it and what it is divided by: for minmax, the least
            value and the range.
        separator: between the items of a sequence held as text.
        max_length: of a sequence; longer ones keep their last items.
        min_count: how often a value must be seen in training to have its own id.
        hash_buckets: how many ids the hashes of values share (0: values are counted and have ids of their own).
        encoded: how many ids a column has that holds ids already (0: it holds values); ``words`` then name all of them.
        share: the field whose ids these are too.
    """

    name: str
    kind: Kind
    offset: int = 0
    words: tuple[str, ...] = ()
    numeric: Numeric | Literal[""] = ""
    edges: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    separator: str = ""
    max_length: int = 0
    min_count: int = 1
    hash_buckets: int = 0
    encoded: int = 0
    share: str = ""

    @cached_property
    def vocabulary(self) -> pl.DataFrame:
        """The words and their local ids, to be joined to."""
        ids = np.arange(1, len(self.words) + 1, dtype=np.int32)
        return pl.DataFrame({"word": pl.Series(self.words, dtype=pl.String), "id": ids})

    @cached_property
    def buckets(self) -> NDArray[np.int64]:
        """The words of a bucketed number, which are in order, as numbers, and one above all."""
        return np.array([*map(int, self.words), np.iinfo(np.int64).max])

    @property
    def size(self) -> int:
        """How many ids the field has."""
        if self.part == "numeric":
            return 1
        return self.encoded or (self.hash_buckets + 1 if self.hash_buckets else len(self.words) + 2)

    @property
    def part(self) -> Part:
        """Which part of the batch holds the field."""
        if self.kind == "sequence":
            return "sequences"
        return "numeric" if self.numeric in ("standardize", "minmax") else "ids"

    @property
    def values(self) -> tuple[str, ...]:
        """What each local id stands for."""
        if self.encoded:
            return self.words or tuple(f"(id {local})" for local in range(self.encoded))
        if self.hash_buckets:
            return ("(missing)", *(f"(bucket {n})" for n in range(self.hash_buckets)))
        return ("(number)",) if self.part == "numeric" else ("(missing)", *self.words, "(unseen)")

    def value(self, local: int) -> str:
        """What a local id stands for."""
        return self.values[local]


@dataclass(frozen=True)
class Label:
    """A column to be predicted.

    Attributes:
        name: of the column.
        classes: the values that became 0 and 1; empty where the numbers themselves are the label.
        number: whether the classes are numbers, which may be written in several ways (1, 1.0).
        threshold: of a number that is 1 from there on, and 0 below.
    """

    name: str
    classes: tuple[str, ...] = ()
    number: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class Schema:
    """The fields of a table in the order of the batch (ids, numeric, sequences), its labels, and the column of groups."""

    fields: tuple[Field, ...]
    labels: tuple[Label, ...]
    group: str = ""

    @classmethod
    def lay_out(cls, fields: Iterable[Field], labels: Iterable[Label], group: str = "") -> Schema:
        """The schema of fields whose offsets are still to be set."""
        order: tuple[Part, ...] = ("ids", "numeric", "sequences")
        placed: list[Field] = []
        starts: dict[str, int] = {}
        end = 0
        for one in sorted(fields, key=lambda f: order.index(f.part)):
            if (owner := one.share or one.name) not in starts:
                starts[owner] = end
                end += one.size
            placed.append(replace(one, offset=starts[owner]))
        return cls(tuple(placed), tuple(labels), group)

    @property
    def num_ids(self) -> int:
        """Size of the global id space."""
        return max((f.offset + f.size for f in self.fields), default=0)

    @property
    def longest(self) -> int:
        """L, the length that sequences are padded to."""
        return max((f.max_length for f in self.of("sequences")), default=0)

    def of(self, part: Part) -> list[Field]:
        """The fields of one part of the batch."""
        return [f for f in self.fields if f.part == part]

    def shapes(self, rows: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of `Rows`."""
        ids, numbers, sequences = (len(self.of(part)) for part in ("ids", "numeric", "sequences"))
        return (
            (rows, ids),
            (rows, numbers),
            (rows, sequences, self.longest),
            (rows, len(self.labels)),
            (
                rows,
                int(self.group != ""),
            ),
        )

    def locate(self, global_id: int) -> tuple[str, str]:
        """The field and the value behind a global id; of fields that share it, the first.

        Raises:
            ValueError: if there is no such id.
        """
        for one in self.fields:
            if one.offset <= global_id < one.offset + one.size:
                return one.name, one.value(global_id - one.offset)
        raise ValueError(f"there is no id {global_id}: ids are 0 .. {self.num_ids - 1}")

    def table(self) -> Table:
        """One row a field; prints as a table."""
        return Table(
            {
                "column": f.name,
                "kind": f"{f.kind} ({f.numeric})" if f.numeric else f.kind,
                "ids": f.size,
                "first id": f.offset,
                "values": _summary(f),
            }
            for f in self.fields
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` gives the schema back."""
        # Words that are another field's are written once.
        own = replace(self, fields=tuple(replace(one, words=() if one.share else one.words) for one in self.fields))
        plain = asdict(own)
        return {part: [_listed(one) for one in plain[part]] for part in ("fields", "labels")} | {"group": self.group}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schema:
        """The schema that `to_dict` wrote."""
        fields = [Field(**_tupled(one)) for one in plain["fields"]]
        words = {one.name: one.words for one in fields}
        return cls(
            tuple(replace(one, words=words[one.share or one.name]) for one in fields),
            tuple(Label(**_tupled(one)) for one in plain["labels"]),
            plain.get("group", ""),
        )

    def encode(self, chunk: Chunk, *, with_labels: bool = True) -> Rows:
        """Raw rows as arrays; without labels, these are NaN.

        Raises:
            UserError: at the first cell that is not what its field or label wants.
        """
        shapes = self.shapes(chunk.frame.height)
        rows = Rows(
            np.empty(shapes[0], np.int32),
            np.empty(shapes[1], np.float32),
            np.empty(shapes[2], np.int32),
            np.full(shapes[3], np.nan, np.float32),
            np.zeros(shapes[4], np.int64),
        )
        for place, one in enumerate(self.of("ids")):
            rows.ids[:, place] = one.offset + _local_ids(one, chunk)
        for place, one in enumerate(self.of("numeric")):
            rows.numeric[:, place] = ((chunk.numbers(one.name) - one.mean) / one.std).fill_null(0.0).to_numpy()
        for place, one in enumerate(self.of("sequences")):
            rows.sequences[:, place] = one.offset + _padded_ids(one, chunk, self.longest)
        for place, label in enumerate(self.labels if with_labels else ()):
            rows.label[:, place] = encode_label(label, chunk)
        if self.group and with_labels:
            assert rows.group is not None
            # A hash stands for the group: only whether two rows share it counts.
            rows.group[:, 0] = chunk.text(self.group).hash(0).to_numpy().view(np.int64)
        return rows


def _summary(one: Field) -> str:
    """What a field's values are, in a few words."""
    if one.numeric == "minmax":
        return f"from {one.mean:.4g} to {one.mean + one.std:.4g}"
    if one.part == "numeric":
        return f"mean {one.mean:.4g}, std {one.std:.4g}"
    shared = f"those of {one.share}" if one.share else ""
    return shared or ("hashed" if one.hash_buckets else ", ".join(one.words[:4]) + ", ..." * (len(one.words) > 4))


def _listed(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _tupled(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def criteo_bucket(numbers: pl.Series) -> pl.Series:
    """Whole-number buckets of the Criteo benchmark: floor(ln(x)^2) where x > 2, else int(x)."""
    logs = numbers.clip(lower_bound=2.0).log().pow(2).floor()
    return logs.zip_with((numbers > 2).fill_null(False), numbers).cast(pl.Int64, strict=False)


def items_of(one: Field, chunk: Chunk) -> tuple[pl.Series, NDArray[np.int64]]:
    """All items of a column of sequences end to end, missing ones left out, and how many each row has."""
    column = chunk.frame[one.name]
    if one.encoded:
        column = column.list.eval(pl.element().filter(pl.element() != 0))  # padding
    lists = column if isinstance(column.dtype, pl.List) else as_text(column).str.split(one.separator)
    rows = pl.DataFrame({"row": pl.int_range(len(lists), eager=True), "item": lists}).explode("item")
    rows = rows.with_columns(clean(as_text(rows["item"]))).drop_nulls()
    return rows["item"], np.bincount(rows["row"].to_numpy(), minlength=len(lists))


def _local_ids(one: Field, chunk: Chunk) -> NDArray[np.int32]:
    """(rows,) local ids of a categorical or bucketed field."""
    if one.encoded:
        return _given_ids(one, chunk, chunk.text(one.name), np.arange(chunk.frame.height))
    if not one.numeric:
        return _word_ids(one, chunk.text(one.name))
    if one.numeric == "bucket":
        return _bucket_ids(one, criteo_bucket(chunk.numbers(one.name)))
    numbers = chunk.numbers(one.name).fill_null(math.nan).to_numpy()
    return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(one.edges, numbers)).astype(np.int32)


def _bucket_ids(one: Field, buckets: pl.Series) -> NDArray[np.int32]:
    """Local ids of whole numbers, of which the field's words are the known ones in order."""
    values = buckets.fill_null(0).to_numpy()
    place = np.searchsorted(one.buckets[:-1], values)
    ids = np.where(one.buckets[place] == values, place, len(one.words)) + 1
    return np.where(buckets.is_null().to_numpy(), 0, ids).astype(np.int32)


def _word_ids(one: Field, words: pl.Series) -> NDArray[np.int32]:
    if one.hash_buckets:
        buckets = 1 + hashed(words) % np.uint64(one.hash_buckets)
        return np.where(words.is_null().to_numpy(), 0, buckets).astype(np.int32)
    found = words.alias("word").to_frame().join(one.vocabulary, on="word", how="left", maintain_order="left")
    absent = pl.when(pl.col("word").is_null()).then(0).otherwise(len(one.words) + 1)
    return found.select(pl.col("id").fill_null(absent).cast(pl.Int32)).to_series().to_numpy()


def _given_ids(one: Field, chunk: Chunk, ids: pl.Series, row: NDArray[np.int64]) -> NDArray[np.int32]:
    """Ids as they are given, each in a row of the chunk, if they are some of the field's."""
    numbers = ids.cast(pl.Int64, strict=False)
    if (bad := (~numbers.is_between(0, one.size - 1)).fill_null(True).arg_true()).len():
        raise chunk.error(
            row[bad[0]],
            one.name,
            f"{ids[bad[0]]!r} is no id from 0 to {one.size - 1}, as FuxiCTR's preprocessing writes",
        )
    return numbers.cast(pl.Int32).to_numpy()


def _padded_ids(one: Field, chunk: Chunk, width: int) -> NDArray[np.int32]:
    """(rows, width) local ids of each row's last items, then zeros."""
    items, lengths = items_of(one, chunk)
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = lengths.cumsum() - np.minimum(lengths, one.max_length)
    place = np.arange(len(items)) - starts[row]
    kept = place >= 0
    padded = np.zeros((len(lengths), width), np.int32)
    ids = _given_ids(one, chunk, items, row) if one.encoded else _word_ids(one, items)
    padded[row[kept], place[kept]] = ids[kept]
    return padded


def encode_label(label: Label, chunk: Chunk) -> NDArray[np.float32]:
    """(rows,) the label as numbers."""
    column = chunk.frame[label.name]
    if (gaps := column.is_null().arg_true()).len():
        raise chunk.error(gaps[0], label.name, "the label is missing; every row needs one")
    if label.threshold is not None:
        return (chunk.numbers(label.name) >= label.threshold).cast(pl.Float32).to_numpy()
    if not label.classes:
        return chunk.numbers(label.name).cast(pl.Float32).to_numpy()
    zero, one = label.classes
    if label.number:
        values = column.cast(pl.Float64, strict=False)
        codes: dict[Any, float] = {float(zero): 0.0, float(one): 1.0}
    else:
        values = chunk.text(label.name)
        # A full stop at the end (as in Adult's original test file) is no difference, so long as the classes stay apart.
        codes = {f"{zero}.": 0.0, f"{one}.": 1.0} | {zero: 0.0, one: 1.0}
    coded = values.replace_strict(codes, default=None, return_dtype=pl.Float32)
    if (bad := coded.is_null().arg_true()).len():
        raise chunk.error(
            bad[0], label.name, f"{column[bad[0]]!r} is neither {zero!r} nor {one!r}, the labels of the training table"
        )
    return coded.to_numpy()
