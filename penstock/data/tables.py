"""The user's own tables: CSV, TSV or Parquet, read out of core into ids and numbers.

A table is read three times in chunks of rows, so that raw rows never fill the memory: *scan* checks the file, infers
what each column is and looks at the label; *fit* counts values (on disk, where they are millions) and measures
numbers on training rows only; *encode* writes the arrays, into a nameless temporary file where they are large.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import pyarrow.parquet
import torch
import yaml
from numpy.typing import NDArray

from penstock.data.base import Data, Source
from penstock.data.changes import check_kinds
from penstock.data.frames import FrameSource
from penstock.data.fuxictr import encoded_folder, read_map, read_splits
from penstock.data.hashing import hashed
from penstock.data.leaks import Leaks
from penstock.data.loader import Batches
from penstock.data.ondisk import Store, batches, release, room
from penstock.data.parts import Peers, Share, can_be_divided, deal, is_even, peers
from penstock.data.rawtables import Chunk, RawTable, as_text, did_you_mean
from penstock.data.recbole import open_table
from penstock.data.schema import Field, Kind, Label, Numeric, Rows, Schema, TableBatch, criteo_bucket, items_of
from penstock.data.times import are_dates, times
from penstock.data.vectors import Vectors, read_vectors
from penstock.errors import UserError

Split = Literal["train", "validation", "test"]
WholeNumbers = Literal["inferred", "categorical"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SPLIT_NAMES = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2, "testing": 2}
_LABEL_NAMES = ("label", "click", "clicked", "is_click", "target", "y")
_SEPARATORS = ("^", "|")
_SETTINGS = (  # of the columns file
    *("kind", "numeric", "max_length", "min_count", "separator", "hash_buckets", "share", "pretrained", "freeze"),
)
_OF_WORDS = frozenset({"hash_buckets", "share", "pretrained"})  # settings that make whole numbers categories
_ONLY_OF = {"numeric": "numeric", "separator": "sequence", "max_length": "sequence"}
_LONGEST = 50  # items of a sequence, unless the columns file says otherwise
_FEW = 10  # whole numbers with no more different values than this are categories
_SAMPLE = 1 << 20  # numbers kept to find quantiles
_HELD = 1 << 22  # words of all columns that are counted in memory; merging them takes about 250 bytes each
_SHARES = 64  # of the words counted on disk, read one at a time
_SPILLED_GROUP = 1 << 14  # words, so that few of another share are read with one
_CHUNK_BITS = 28  # of the number of a chunk's words
_NO_WORDS = pl.DataFrame(schema={"word": pl.String, "count": pl.Int64, "first": pl.Int64})


@dataclass
class TableConfig:
    """How the user's table is read."""

    min_count: int = 2
    """Values seen less often in training share their field's "unseen" id."""
    hash_above: int = 0
    """Columns of which more values are kept than this get so many hashed ids instead; 0: none do."""
    columns: str = ""
    """A YAML file that says what columns are: `age: numeric`, `zip: categorical`, `id: drop`, or
    `genres: {kind: sequence, separator: "|", max_length: 6}`. Also min_count and numeric; `hash_buckets: 100000` gives
    the hashes of values so many ids instead of counting words, `share: item` gives a column the ids of another, and
    `pretrained: vectors.parquet` starts values from vectors, for good with `freeze: true`."""
    validation_ratio: float = 0.1
    """Share of rows held out for validation, where no split column says which."""
    test_ratio: float = 0.1
    """Share of rows held out for the test, where there is neither a test file nor a split column."""
    split: Literal["random", "time", "user"] = "random"
    """Rows are split at random; by time, the earliest to train on and the latest for the test; or by user, all rows of
    one to the same split. The column of times or users is no feature unless the columns file names it."""
    time_column: str = ""
    """Of a split by time: numbers, or dates as 2024-05-31 or 2024-05-31 12:30:00."""
    user_column: str = ""
    """Of a split by user."""
    split_column: str = ""
    """A column whose values are train, validation and test."""
    group_column: str = ""
    """A column (user, session) within whose values AUC is measured too; it remains a feature unless dropped."""
    label_threshold: float | None = None
    """Makes a rating a label: what is this or more becomes 1, what is less 0."""
    seed: int = 0
    """Of a split at random or by user."""
    numeric: Numeric = "bucket"
    """Numbers become categories, as for Criteo (x > 2: floor(ln(x)^2), else int(x)) or by quantile, or stay numbers,
    each times a learned vector of its column: standardised, or scaled to 0 .. 1 (minmax)."""
    whole_numbers: WholeNumbers = "inferred"
    """Of columns that the columns file does not name: whole numbers are numbers unless they are few or named as ids;
    or all are categories, as in the published settings for Avazu, Frappe and MovieLens."""
    num_quantiles: int = 20
    """Categories of a number cut by quantile, about; a value that would fill one has one to itself."""
    memory_mb: int = 1024
    """Encoded tables above this size are kept in a temporary file (in $TMPDIR) instead of memory, and shuffled in
    windows of a quarter of a gigabyte."""

    def check(self) -> None:
        """Raise `UserError` for settings that no table can be read with."""
        if not 0 < self.validation_ratio < 1 or not 0 <= self.test_ratio < 1 - self.validation_ratio:
            raise UserError(
                f"validation_ratio={self.validation_ratio}, test_ratio={self.test_ratio}: each is a share of the rows, "
                "and some must be left for training"
            )
        if self.split != "random" and self.split_column:
            raise UserError(f"split={self.split} and split_column={self.split_column!r}: give one of the two")
        for how, column in (("time", self.time_column), ("user", self.user_column)):
            if (self.split == how) != bool(column):
                raise UserError(f"split={self.split} and {how}_column={column!r}: one goes with the other")
        for name, kinds in (
            ("split", ("random", "time", "user")),
            ("numeric", get_args(Numeric)),
            ("whole_numbers", get_args(WholeNumbers)),
        ):
            if getattr(self, name) not in kinds:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(kinds)}")
        for name, least in (("min_count", 1), ("num_quantiles", 2), ("memory_mb", 0), ("hash_above", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be {least} or more")


class TableData(Data):
    """Encoded splits of a table.

    Args:
        schema: of the table.
        splits: the rows of each split.
        source: where it is from, for people.
        notes: what was done that a person should know.
        vectors: pre-trained, of some ids.
        shares: of the splits of which only a part is here, and the others in the other processes of a run.

    Attributes:
        spec: ``schema`` (plain); ``fields`` (names), ``field_sizes`` and ``offsets`` in the order of the batch;
            ``num_ids``; ``group`` (the column of groups); ``num_id_fields`` F, ``num_numeric`` N and ``num_sequences`` S; ``labels`` (names).
    """

    def __init__(
        self,
        schema: Schema,
        splits: Mapping[Split, Rows],
        source: str,
        notes: Sequence[str] = (),
        vectors: Sequence[Vectors] = (),
        shares: Mapping[Split, Share] | None = None,
    ) -> None:
        self.schema, self.splits, self.source, self.notes = schema, splits, source, list(notes)
        self.vectors, self.shares = vectors, dict(shares or {})
        self.spec = {
            "schema": schema.to_dict(),
            "fields": [f.name for f in schema.fields],
            "field_sizes": [f.size for f in schema.fields],
            "offsets": [f.offset for f in schema.fields],
            "num_ids": schema.num_ids,
            "num_id_fields": len(schema.of("ids")),
            "num_numeric": len(schema.of("numeric")),
            "num_sequences": len(schema.of("sequences")),
            "labels": [label.name for label in schema.labels],
            "group": schema.group,
        }

    def train(self, batch_size: int, seed: int) -> Batches:
        return self._batches("train", batch_size, shuffle=True, seed=seed)

    def validation(self, batch_size: int) -> Batches:
        return self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Batches:
        return self._batches("test", batch_size)

    def _batches(self, split: Split, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> Batches:
        rows, share = self.splits[split], self.shares.get(split)
        if share is None:
            return batches(rows, batch_size, shuffle=shuffle, seed=seed)
        seed, steps = seed * len(share.rows) + share.rank, share.steps(batch_size)
        own = batches(rows, batch_size, shuffle=shuffle, seed=seed, steps=steps)
        if split == "train":
            fetch = own.fetch
            own.fetch = lambda index: _weighed(fetch(index), share.weight(len(index), batch_size))
        return own

    def num_rows(self, split: Split) -> int:
        """Rows of a split, in all processes together."""
        return sum(self.shares[split].rows) if split in self.shares else len(self.splits[split].label)

    def label_means(self, split: Split) -> tuple[float, ...]:
        """Of each label over the rows of a split, in all processes together."""
        if split in self.shares:
            return self.shares[split].means
        return tuple(self.splits[split].label.mean(0, dtype=np.float64).tolist())

    def overview(self) -> str:
        rows = ", ".join(f"{split} {self.num_rows(split)}" for split in self.splits)
        held = ", ".join(f"{split} {' + '.join(map(str, share.rows))}" for split, share in self.shares.items())
        more = [f"each process holds the rows of its own parts: {held}"] * bool(held)
        return "\n".join([f"{self.source}: rows {rows}", str(self.schema.table()), *self.notes, *more])

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "rows": {split: self.num_rows(split) for split in self.splits},
            "fields": {f.name: f.size for f in self.schema.fields},
            "num_ids": self.schema.num_ids,
            "labels": {
                label.name: {split: self.label_means(split)[place] for split in self.splits}
                for place, label in enumerate(self.schema.labels)
            },
            "notes": self.notes,
        }


def _weighed(batch: TableBatch, weight: float) -> TableBatch:
    return batch._replace(weight=torch.full((len(batch.label),), weight))


def read_table(config: TableConfig, source: Source, *, labels: Literal["binary", "any"] = "binary") -> TableData:
    """Read the user's table and, if given, their test table.

    Args:
        config: how.
        source: the paths and the label column; several columns separated by commas where ``labels`` is "any".
        labels: "binary": one label with two values, the first in sorted order becoming 0; "any": labels may also be
            numbers, which are kept as they are.

    Within `penstock.data.parts.reading_together`, a directory of at least as many Parquet parts as there are processes
    is divided where ``labels`` is "binary": each process reads its own parts and keeps their rows, and everything else
    about the data is that of the whole table, in all of them. A split of which a process would have less than half
    of an even share (a part by day or by split) is encoded and held whole by all, and so is a test table of its own.

    Raises:
        UserError: naming file, row and column of what cannot be used, and what would be right.
    """
    assert source.data is not None, "a table needs a path; the embedded default is made elsewhere"
    config.check()
    if (encoded := encoded_folder(source.data)) is not None and not isinstance(source, FrameSource):
        return _read_encoded(encoded, config, source, several=labels == "any")
    raw = source.table if isinstance(source, FrameSource) else open_table(source.data)
    held_out = open_table(source.test) if source.test is not None else None
    # Who gives a frame has what is to be tested on elsewhere.
    has_test = held_out is not None or isinstance(source, FrameSource)
    targets = _label_columns(raw, source.label, several=labels == "any")
    splitting = config.split_column or config.time_column or config.user_column
    if splitting and splitting not in raw.columns:
        raise UserError(f"{raw.path}: no column {splitting!r} to split by; {did_you_mean(splitting, raw.columns)}")
    if not config.split_column and held_out is None and config.test_ratio == 0:
        raise UserError("test_ratio=0 leaves nothing to test on; give a larger one, a test file or a split column")
    if config.group_column and config.group_column not in raw.columns:
        raise UserError(
            f"{raw.path}: no column {config.group_column!r} to group by; {did_you_mean(config.group_column, raw.columns)}"
        )
    if config.group_column in targets:
        raise UserError(f"group_column={config.group_column!r} is the label; give a column of users or sessions")
    overrides = _read_overrides(config, raw)
    if held_out is not None:
        held_out.must_have([*targets, *filter(None, [config.group_column])])

    together = peers.get() if labels == "binary" and can_be_divided(raw, peers.get().size) else Peers()
    own = raw.some(deal(list(raw.part_rows.values()), together.size)[together.rank]) if together.size > 1 else raw
    scan = _scan(own, config, has_test, together)
    label_fields = [_label(raw, name, scan.columns[name], labels, config.label_threshold) for name in targets]
    unasked = {config.time_column, config.user_column} - {"", *overrides}
    plans, notes = _plan(raw, scan, {*targets, config.split_column, *unasked}, overrides, config)
    notes += [f"{name} splits the rows and is no feature; name it in a columns file to make it one" for name in unasked]
    if held_out is not None:
        held_out.must_have([plan.name for plan in plans])
        if not (rows := held_out.count_rows()):
            raise UserError(f"{held_out.path}: there is a header and no row; there is nothing to test on")
        scan.rows["test"] = rows
    leaks = Leaks(plans, label_fields)
    schema = Schema.lay_out(_fit(own, plans, config, has_test, leaks, together), label_fields, config.group_column)
    notes += leaks.notes()
    notes += [
        f"{one.name}: none of its values is seen {one.min_count} times in training, so that all share one id and say "
        "nothing; drop it, or give it a smaller min_count"
        for one in schema.fields
        if one.part != "numeric" and not (one.words or one.numeric or one.hash_buckets or one.share)
    ]
    vectors, coverage = read_vectors(schema, {**raw.settings, **overrides}, config.columns or "columns")
    notes += coverage
    notes += [f"{x.name}: {x.classes[0]!r} became 0 and {x.classes[1]!r} became 1" for x in label_fields if x.classes]

    size = sum(4 * math.prod(shape) for rows in scan.rows.values() for shape in schema.shapes(rows))
    on_disk = size > config.memory_mb << 20
    if on_disk:
        notes.append(f"the encoded rows ({size >> 20} MB) are kept in a temporary file")
    divided = {split: rows[together.rank] for split, rows in scan.held.items() if is_even(rows) and len(rows) > 1}
    here = scan.rows | divided
    whole = len(divided) < len(scan.held)
    with tempfile.TemporaryDirectory(prefix="penstock-", ignore_cleanup_errors=True) as folder:
        # The files are mapped before the folder goes: the rows live on without a name, and end with the process.
        stores = {split: Store(schema, n, Path(folder) / split if on_disk else None) for split, n in here.items()}
        columns = [*targets, *(plan.name for plan in plans), config.group_column]
        for chunk, codes in _split_chunks(raw if whole else own, config, has_test, "encode", columns):
            part = schema.encode(chunk)
            for code in np.unique(codes):
                if (split := SPLITS[code]) not in divided or chunk.path in own.parts:
                    stores[split].append(part.where(codes == code))
        if held_out is not None:
            for chunk in checked_chunks(schema, held_out, "encode", columns):
                stores["test"].append(schema.encode(chunk))
        splits = {split: store.finish() for split, store in stores.items()}
    shares = {}
    for split in divided:
        sums = together.gather(splits[split].label.sum(0, dtype=np.float64))
        means = tuple((np.sum(sums, 0) / scan.rows[split]).tolist())
        shares[split] = Share(together.rank, scan.held[split], means)
    data = TableData(schema, splits, str(raw.path), notes, vectors, shares)
    _check_classes(data)
    for rows_of_split in splits.values():
        release(rows_of_split)
    return data


def _read_encoded(path: Path, config: TableConfig, source: Source, *, several: bool) -> TableData:
    """A table that FuxiCTR has encoded and split."""
    for name in ("columns", "split_column", "time_column", "user_column", "label_threshold"):
        if getattr(config, name):
            raise UserError(f"{path}: is encoded and split already; {name} has no effect on it")
    schema, notes = read_map(path, source.label, config.group_column, several=several)
    tables = read_splits(path, source.test)
    columns = [f.name for f in schema.fields] + [x.name for x in schema.labels] + [schema.group] * (schema.group != "")
    rows: dict[Split, int] = {}
    for split in SPLITS:
        tables[split].must_have(columns)
        rows[split] = tables[split].count_rows()
        if not rows[split]:
            raise UserError(f"{tables[split].path}: holds no row for {split}")
    size = sum(4 * math.prod(shape) for count in rows.values() for shape in schema.shapes(count))
    splits: dict[Split, Rows] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-", ignore_cleanup_errors=True) as folder:
        for split, count in rows.items():
            store = Store(schema, count, Path(folder) / split if size > config.memory_mb << 20 else None)
            for chunk in tables[split].chunks("encode", columns):
                store.append(schema.encode(chunk))
            splits[split] = store.finish()
    data = TableData(schema, splits, str(path), notes)
    _check_classes(data)
    for rows_of_split in splits.values():
        release(rows_of_split)
    return data


def read_rows(spec: Mapping[str, Any], path: Path, batch_size: int) -> Iterator[TableBatch]:
    """Encode new rows, whose labels need not be known (they become NaN), in the order of the file.

    Args:
        spec: of the `TableData` the model was trained on.
        path: CSV, TSV, Parquet or a directory of Parquet parts with the same columns.
        batch_size: the most rows a batch.

    Raises:
        UserError: as `read_table`.
    """
    schema = Schema.from_dict(spec["schema"])
    raw = open_table(path)
    columns = [f.name for f in schema.fields]
    raw.must_have(columns)
    for chunk in checked_chunks(schema, raw, "predict", columns):
        rows = schema.encode(chunk, with_labels=False)
        for first in range(0, len(rows.label), batch_size):
            yield rows.batch(slice(first, first + batch_size))


def checked_chunks(schema: Schema, table: RawTable, what: str, columns: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of a table (see `RawTable.chunks`), if its columns are of the kinds they had in training."""
    for place, chunk in enumerate(table.chunks(what, columns)):
        if place == 0:
            check_kinds(schema, chunk)
        yield chunk


# -- scan: what is in the file -------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What was seen of a column, in the whole training file or in one of its parts."""

    present: int = 0
    first_gap: UserError | None = None
    is_number: bool = True
    is_whole: bool = True
    is_list: bool = False
    numbers: int = 0
    """How many values are numbers, as long as these are most of a block of rows."""
    odd: str = ""
    """The first value that is none, and its row."""
    distinct: set[str] = field(default_factory=set)
    separated: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SEPARATORS, 0))
    alone: dict[str, tuple[Chunk, int, str]] = field(default_factory=dict)
    """The first cell, as a chunk without its frame, a row and the text, that has this separator and no other."""

    def update(self, name: str, chunk: Chunk) -> None:
        column = chunk.frame[name]
        present = column.drop_nulls()
        self.present += len(present)
        if self.first_gap is None and len(present) < len(column):
            self.first_gap = chunk.error(
                column.is_null().arg_true()[0], name, "the label is missing; every row needs one"
            )
        if isinstance(column.dtype, pl.List):
            self.is_list, self.is_number = True, False
            return
        if 2 * self.numbers >= self.present - len(present):
            numbers = present.cast(pl.Float64, strict=False)
            self.numbers += len(numbers) - numbers.null_count()
            if not self.odd and numbers.null_count():
                self.is_number = False
                at = (column.cast(pl.Float64, strict=False).is_null() & column.is_not_null()).arg_true()[0]
                self.odd = f"{column[at]!r} in row {chunk.start + at} of {chunk.path.name}"
            self.is_whole &= self.is_number and bool((numbers % 1 == 0).all())
        if len(self.distinct) <= _FEW:
            self.distinct.update(as_text(present.unique()).sort()[: 2 * _FEW].to_list())
        if not self.is_number:
            has = {s: column.str.contains(s, literal=True).fill_null(False) for s in _SEPARATORS}
            for separator, rows in has.items():
                self.separated[separator] += int(rows.sum())
            # A part may have another separator than all others, as its first rows show.
            if any(self.separated.values()) or chunk.start == 1:
                # Not before a space, where a comma divides a sentence.
                has[","] = column.str.contains(r",\S").fill_null(False)
                self._note_alone(has, column, chunk)

    def _note_alone(self, has: Mapping[str, pl.Series], column: pl.Series, chunk: Chunk) -> None:
        count = sum((rows.cast(pl.Int8) for rows in has.values()), pl.zeros(len(column), pl.Int8, eager=True))
        for separator, rows in has.items():
            if separator not in self.alone and (at := (rows & (count == 1)).arg_true()).len():
                self.alone[separator] = (chunk._replace(frame=chunk.frame.clear()), at[0], column[at[0]])

    def merge(self, later: _Seen) -> None:
        """Add what was seen in a later part."""
        self.present += later.present
        self.first_gap = self.first_gap or later.first_gap
        self.is_number &= later.is_number
        self.is_whole &= later.is_whole
        self.is_list |= later.is_list
        self.numbers += later.numbers
        self.odd = self.odd or later.odd
        self.distinct |= later.distinct
        self.separated = {s: count + later.separated[s] for s, count in self.separated.items()}
        self.alone = later.alone | self.alone

    def one_separator(self, name: str, usual: str) -> None:
        """Raise `UserError` if some cells of a sequence have no ``usual`` separator but another."""
        for separator, (chunk, row, text) in self.alone.items():
            if separator != usual:
                say = f'`{name}: {{kind: sequence, separator: "{usual}"}}`'
                raise chunk.error(
                    row,
                    name,
                    f"{text!r} is divided by {separator!r} and others by {usual!r}; say {say} in a columns file",
                )


class _Scan(NamedTuple):
    columns: dict[str, _Seen]
    rows: dict[Split, int]
    held: dict[Split, tuple[int, ...]]
    """How many of these rows are in the parts of each process."""


def _scan(raw: RawTable, config: TableConfig, has_test: bool, together: Peers) -> _Scan:
    parts: list[tuple[int, dict[str, _Seen]]] = []  # in the order of the table
    own = np.zeros(len(SPLITS), np.int64)
    for chunk, codes in _split_chunks(raw, config, has_test, "scan"):
        if chunk.start == 1:
            parts.append((chunk.place, {name: _Seen() for name in raw.columns if name}))
        for name, seen in parts[-1][1].items():
            seen.update(name, chunk)
        own += np.bincount(codes, minlength=len(SPLITS))
    columns = {name: _Seen() for name in raw.columns if name}
    for _, of_part in sorted(chain(*together.gather(parts)), key=lambda part: part[0]):
        for name, seen in of_part.items():
            columns[name].merge(seen)
    every = np.stack(together.gather(own))
    counts = every.sum(0)
    if not counts.any():
        raise UserError(f"{raw.path}: there is a header and no row; there is nothing to learn from")
    rows = dict(zip(SPLITS, counts.tolist(), strict=True))
    if has_test and rows.pop("test"):
        raise UserError(
            f"{raw.path}: {config.split_column!r} marks rows for the test, and a test file is given too; "
            "give one of the two"
        )
    for split, count in rows.items():
        if not count:
            more = (
                f"mark some in {config.split_column!r}"
                if config.split_column
                else "give more rows, other ratios or a split column"
            )
            raise UserError(f"{raw.path}: none of its {counts.sum()} rows is for {split}; {more}")
    held = {split: tuple(every[:, SPLITS.index(split)].tolist()) for split in rows}
    return _Scan(columns, rows, held)


def _split_chunks(
    raw: RawTable, config: TableConfig, has_test: bool, what: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[Chunk, NDArray[np.int64]]]:
    """Chunks with each row's split (its place in `SPLITS`); the same at every reading.

    ``what`` and ``columns`` as for `RawTable.chunks`.
    """
    test_from = 1.0 if has_test else 1.0 - config.test_ratio
    validation_from = test_from - config.validation_ratio
    wanted = None if columns is None else [*columns, config.split_column, config.time_column, config.user_column]
    for chunk in raw.chunks(what, wanted):
        if config.split == "time":
            shares = (validation_from,) if has_test else (validation_from, test_from)
            cuts = _time_cuts(raw.whole or raw, config.time_column, shares, config.seed)
            yield chunk, np.searchsorted(cuts, times(chunk, config.time_column))
            continue
        if not config.split_column:
            lot = _lots(chunk, config.seed) if config.split == "random" else _user_lots(chunk, config)
            yield chunk, (lot >= validation_from).astype(np.int64) + (lot >= test_from)
            continue
        marks = chunk.text(config.split_column)
        codes = marks.str.to_lowercase().replace_strict(_SPLIT_NAMES, default=None, return_dtype=pl.Int64)
        if (bad := codes.is_null().arg_true()).len():
            raise chunk.error(
                bad[0], config.split_column, f"{marks[bad[0]]!r} is no split; it must be train, validation or test"
            )
        yield chunk, codes.to_numpy()


def _lots(chunk: Chunk, seed: int) -> NDArray[np.float64]:
    """(rows,) numbers from 0 to 1, of one sequence for the whole table: a row's is the same whoever reads it."""
    return np.random.Generator(np.random.PCG64(seed).advance(chunk.place)).random(chunk.frame.height)


@lru_cache(maxsize=1)  # a table is split at every reading, and its times are the same
def _time_cuts(raw: RawTable, column: str, shares: tuple[float, ...], seed: int) -> NDArray[np.float64]:
    """The times up to which such shares of the rows lie."""
    sample = _Sample(seed)
    sorts: set[bool] = set()
    for chunk in raw.chunks("read the times of", [column]):
        sample.add(times(chunk, column), chunk.place)
        sorts.add(are_dates(chunk, column))
        if len(sorts) > 1:
            raise chunk.error(0, column, "numbers and dates are mixed in this column; a split by time needs one sort")
    if not len(sample.numbers):
        return np.empty(0)
    return np.quantile(sample.numbers, shares, method="lower")


def _user_lots(chunk: Chunk, config: TableConfig) -> NDArray[np.float64]:
    """(rows,) numbers from 0 to 1, the same for all rows of a user."""
    users = chunk.text(config.user_column)
    if (gaps := users.is_null().arg_true()).len():
        raise chunk.error(gaps[0], config.user_column, "the user is missing; a split by user needs one in every row")
    return hashed(users, config.seed) / 2.0**64


# -- the label and the kinds of columns ----------------------------------------------------------------------


def _label_columns(raw: RawTable, asked: str | None, *, several: bool) -> list[str]:
    if asked is None:
        known = [name for name in raw.columns if name.lower() in _LABEL_NAMES]
        if len(known) == 1:
            return known
        raise UserError(
            f"{raw.path}: which column is the label? give --label COLUMN; "
            f"the columns are {', '.join(filter(None, raw.columns))}"
        )
    names = [asked] if asked in raw.columns else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in raw.columns:
            raise UserError(f"{raw.path}: no column {name!r} for the label; {did_you_mean(name, raw.columns)}")
    if len(names) > 1 and not several:
        raise UserError(f"--label {asked}: there is one label here; give one column")
    return names


def _label(
    raw: RawTable, name: str, seen: _Seen, kinds: Literal["binary", "any"], threshold: float | None = None
) -> Label:
    if seen.first_gap is not None:
        raise seen.first_gap
    where = f"{raw.path}, column {name!r}"
    if seen.is_list:
        raise UserError(f"{where}: holds lists; a label is one value a row")
    numbers = sorted(set(map(float, seen.distinct))) if seen.is_number else []
    classes = [str(int(x)) if x.is_integer() else repr(x) for x in numbers] or sorted(seen.distinct)
    if len(classes) == 1:
        raise UserError(f"{where}: every row has the label {classes[0]!r}; there is nothing to tell apart")
    if threshold is not None:
        if not seen.is_number:
            raise UserError(f"{where}: label_threshold={threshold:g} is for a label that is a number, and this is text")
        return Label(name, (f"below {threshold:g}", f"{threshold:g} or more"), threshold=threshold)
    if len(classes) == 2:
        return Label(name, tuple(classes), number=seen.is_number)
    if kinds == "any" and seen.is_number:
        return Label(name)
    cut = "; a rating becomes a label with label_threshold" if seen.is_number else ""
    raise UserError(
        f"{where}: a label must have two values, and it has {', '.join(classes[:4])}{', ...' * (len(classes) > 4)}{cut}"
    )


def _read_overrides(config: TableConfig, raw: RawTable) -> dict[str, dict[str, Any]]:
    """The columns file: `Field` settings for each column it names, whose kind may be "drop"."""
    _checked("columns", raw.settings, raw)
    if not config.columns:
        return {}
    path = Path(config.columns)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the file of columns cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: must map columns to kinds, as `age: numeric`")
    return _checked(str(path), given, raw)


def _checked(where: str, given: Mapping[str, Any], raw: RawTable) -> dict[str, dict[str, Any]]:
    overrides = {}
    for name, value in given.items():
        if name not in raw.columns:
            raise UserError(f"{where}: {raw.path.name} has no column {name!r}; {did_you_mean(str(name), raw.columns)}")
        overrides[name] = value if isinstance(value, dict) else {"kind": value}
        _check_override(f"{where}, {name}", overrides[name])
    return overrides


def _check_override(where: str, settings: Mapping[str, Any]) -> None:
    choices = {"kind": (*get_args(Kind), "drop"), "numeric": get_args(Numeric)}
    for key, value in settings.items():
        if key in choices:
            right, fits = f"one of {', '.join(choices[key])}", value in choices[key]
        elif key in ("max_length", "min_count", "hash_buckets"):
            right, fits = "a whole number, 1 or more", type(value) is int and value >= 1
        elif key == "freeze":
            right, fits = "true or false", isinstance(value, bool)
        elif key in ("separator", "share", "pretrained"):
            right, fits = "some text", isinstance(value, str) and value != ""
        else:
            raise UserError(f"{where}: {key!r} is no setting; there are {', '.join(_SETTINGS)}")
        if not fits:
            raise UserError(f"{where}: {key} is {value!r} and must be {right}")


def _plan(
    raw: RawTable, scan: _Scan, other: set[str], overrides: Mapping[str, Mapping[str, Any]], config: TableConfig
) -> tuple[list[Field], list[str]]:
    """The fields to fit, and notes on what was left out."""
    plans = []
    notes = [*raw.notes, *["a column without a name was left out"] * ("" in raw.columns)]
    if not raw.has_header:
        notes.append("there is no header: read in Criteo's layout, a label, the counts I1 to I13 and C1 to C26")
    owners = {settings.get("share") for settings in overrides.values()}
    for name, seen in scan.columns.items():
        settings = {**raw.settings.get(name, {}), **overrides.get(name, {})}
        if name in other or settings.get("kind") == "drop":
            continue
        if not seen.present:
            notes.append(f"{name} has no value in any row and was left out")
            continue
        if seen.present < sum(scan.rows.values()) / 2:
            notes.append(f"{name}: {1 - seen.present / sum(scan.rows.values()):.0%} of its values are missing")
        known: Kind = "numeric" if name.startswith("I") else "categorical"
        kind: Kind = settings.get("kind") or (_infer(name, seen) if raw.has_header else known)
        asked = name in owners or not _OF_WORDS.isdisjoint(settings) or config.whole_numbers == "categorical"
        if "kind" not in settings and raw.has_header and seen.is_number and seen.is_whole and asked:
            kind = "categorical"
        for key, wanted in _ONLY_OF.items():
            if key in overrides.get(name, {}) and kind != wanted:
                raise UserError(f"{config.columns}, {name}: {key} is for a {wanted} column, and this is {kind}")
        if "kind" not in settings and kind == "categorical" and 0.9 * seen.present <= seen.numbers < seen.present:
            notes.append(
                f"{name} is nearly all numbers, but not {seen.odd}; it is read as words: clear such cells to have it numeric"
            )
        usual = max(_SEPARATORS, key=lambda s: seen.separated[s])
        if kind == "sequence" and "separator" not in settings:
            seen.one_separator(name, usual)
        plans.append(
            Field(
                name,
                kind,
                numeric=settings.get("numeric", config.numeric) if kind == "numeric" else "",
                separator=settings.get("separator", usual) if kind == "sequence" else "",
                max_length=settings.get("max_length", 0) if kind == "sequence" else 0,
                min_count=settings.get("min_count", config.min_count),
                hash_buckets=settings.get("hash_buckets", 0),
                share=settings.get("share", ""),
            )
        )
    if not plans:
        raise UserError(f"{raw.path}: no column beside the label has a value; there is nothing to learn from")
    return [_shared(plan, plans, config) for plan in plans], notes


def _shared(plan: Field, plans: Sequence[Field], config: TableConfig) -> Field:
    """The plan of a column that has another's ids, once it is certain that it can."""
    where = f"{config.columns}, {plan.name}"
    if plan.kind == "numeric" and (plan.hash_buckets or plan.share):
        key = "share" if plan.share else "hash_buckets"
        raise UserError(f"{where}: {key} is for words, and the column is numeric; say kind: categorical or sequence")
    if not plan.share:
        return plan
    owner = next((one for one in plans if one.name == plan.share), None)
    if owner is None or owner is plan or owner.kind == "numeric":
        others = [one.name for one in plans if one.kind != "numeric" and one is not plan]
        raise UserError(f"{where}: share is {plan.share!r} and must be another column of words: {', '.join(others)}")
    if owner.share:
        raise UserError(f"{where}: {owner.name} shares the ids of {owner.share} itself; say share: {owner.share}")
    if plan.hash_buckets:
        raise UserError(f"{where}: has the ids of {owner.name}; give hash_buckets there")
    return replace(plan, hash_buckets=owner.hash_buckets, min_count=owner.min_count)


def _infer(name: str, seen: _Seen) -> Kind:
    """Lists, and text of which a tenth holds a separator, are sequences; numbers are numeric unless they are whole and
    either few or named as ids; the rest is categorical."""
    if seen.is_list or (not seen.is_number and max(seen.separated.values()) >= 0.1 * seen.present):
        return "sequence"
    named_id = re.search(r"(^|_)(id|ID|Id)$|[a-z]I[dD]$", name) is not None
    if seen.is_number and not (seen.is_whole and (named_id or len(seen.distinct) <= _FEW)):
        return "numeric"
    return "categorical"


# -- fit: vocabularies and measures of the training rows ------------------------------------------------------


class _Counts:
    """How often each word occurs, and when it was first seen; what is too much for the memory is counted on disk.

    Args:
        folder: for files, not there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = [_NO_WORDS]
        self.place, self.seen = -1, 0

    def add(self, words: pl.Series, place: int) -> None:
        """Count words of a chunk, whose ``place`` says which of two words was seen first, in the whole table."""
        if place != self.place:
            self.place, self.seen = place, 0
        rows = words.alias("word").to_frame().with_row_index("first").drop_nulls()
        first = pl.col("first").min().cast(pl.Int64) + ((place << _CHUNK_BITS) + self.seen)
        self.seen += len(words)
        counted = rows.group_by("word").agg(pl.len().cast(pl.Int64).alias("count"), first)
        # Through Arrow's contiguous strings: polars' would keep the whole chunk they were cut from.
        own = pl.Series("word", counted["word"].to_arrow(compat_level=pl.CompatLevel.oldest()))
        self.parts.append(counted.with_columns(own))
        # Merging when the loose parts outgrow the merged one keeps the work linear.
        if sum(part.height for part in self.parts[1:]) > max(self.parts[0].height, 1 << 16):
            self.parts = [_merged(pl.concat(self.parts).lazy())]

    @property
    def held(self) -> int:
        """Words in memory."""
        return sum(part.height for part in self.parts)

    def spill(self) -> None:
        """Move what is held to a file, sorted by a share of the words, so that a share can be read alone."""
        if not self.held:
            return
        self.folder.mkdir(exist_ok=True)
        share = (pl.col("word").hash(0) % _SHARES).alias("share")
        merged = _merged(pl.concat(self.parts).lazy()).with_columns(share).sort("share")
        number = len(list(self.folder.iterdir()))
        with room(self.folder.parent):
            pyarrow.parquet.write_table(merged.to_arrow(), self.folder / f"{number}.parquet", _SPILLED_GROUP)
        self.parts = [_NO_WORDS]

    def words(self, min_count: int, together: Peers) -> tuple[str, ...]:
        """Words seen at least ``min_count`` times by all processes, most frequent first, then by first sight."""
        shares = self._on_disk() if any(together.gather(self.folder.exists())) else [pl.concat(self.parts).lazy()]
        merged = (_merged(share) for share in shares)
        if together.size > 1:
            merged = (_merged(pl.concat(together.gather(own)).lazy()) for own in merged)
        kept = pl.concat([share.filter(pl.col("count") >= min_count) for share in merged])
        return tuple(kept.sort("count", "first", descending=[True, False])["word"])

    def _on_disk(self) -> list[pl.LazyFrame]:
        self.spill()
        if not self.folder.exists():
            return [_NO_WORDS.lazy()] * _SHARES
        files = pl.scan_parquet(list(self.folder.iterdir()))
        return [files.filter(pl.col("share") == share) for share in range(_SHARES)]


def _merged(parts: pl.LazyFrame) -> pl.DataFrame:
    return parts.group_by("word").agg(pl.col("count").sum(), pl.col("first").min()).collect()


class _Moments:
    """Mean, standard deviation (Chan, Golub and LeVeque 1983), least and greatest value of a stream."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf
        self.chunks: list[tuple[int, int, float, float, float, float]] = []

    def add(self, numbers: NDArray[np.float64], place: int) -> None:
        if len(numbers):
            mean, variance, low, high = map(float, (numbers.mean(), numbers.var(), numbers.min(), numbers.max()))
            self.chunks.append((place, len(numbers), mean, variance, low, high))

    def settle(self, together: Peers) -> None:
        """Put together what all processes saw, in the order of the table, so that all round alike."""
        for _, count, mean, variance, low, high in sorted(chain(*together.gather(self.chunks))):
            self.least, self.most = min(low, self.least), max(high, self.most)
            total, delta = self.count + count, mean - self.mean
            self.squares += variance * count + delta**2 * self.count * count / total
            self.mean += delta * count / total
            self.count = total
        if not self.count:
            self.least = self.most = 0.0

    @property
    def std(self) -> float:
        """1 for a constant, which becomes 0 and not NaN when standardised."""
        return math.sqrt(self.squares / max(self.count, 1)) or 1.0


class _Sample:
    """A uniform sample of a stream, all of it while it is small."""

    def __init__(self, seed: int) -> None:
        self.numbers: NDArray[np.float64] = np.empty(0)
        self.lots: NDArray[np.float64] = np.empty(0)  # of each number kept, below the share
        self.share = 1.0
        self.seed = seed

    def add(self, numbers: NDArray[np.float64], place: int) -> None:
        self._keep([numbers], [np.random.default_rng([self.seed, place]).random(len(numbers))])

    def settle(self, together: Peers) -> None:
        """Sample what all processes saw."""
        every = together.gather((self.numbers, self.lots, self.share))
        self.share = min(share for _, _, share in every)
        self.numbers = self.lots = np.empty(0)
        self._keep([numbers for numbers, _, _ in every], [lots for _, lots, _ in every])

    def _keep(self, numbers: Sequence[NDArray[np.float64]], lots: Sequence[NDArray[np.float64]]) -> None:
        some = [own < self.share for own in lots]
        self.numbers = np.concatenate([self.numbers, *(x[kept] for x, kept in zip(numbers, some, strict=True))])
        self.lots = np.concatenate([self.lots, *(x[kept] for x, kept in zip(lots, some, strict=True))])
        while len(self.numbers) > _SAMPLE:
            self.share /= 2
            kept = self.lots < self.share
            self.numbers, self.lots = self.numbers[kept], self.lots[kept]

    def edges(self, count: int) -> tuple[float, ...]:
        """Upper ends of about ``count`` quantiles but the last.

        A value that would fill a quantile, like the zeros of an amount that is mostly zero, has one to itself, and the
        others are cut as evenly as without it.
        """
        values, times = np.unique(self.numbers, return_counts=True)
        heavy = np.flatnonzero(times * count > len(self.numbers))
        light = self.numbers[~np.isin(self.numbers, values[heavy])]
        shares = max(count - len(heavy), 1)
        cuts = np.quantile(light, np.arange(1, shares) / shares, method="lower") if len(light) else light
        ends = np.unique(np.concatenate([cuts, values[heavy], values[heavy[heavy > 0] - 1]]))
        return tuple(ends[ends < values.max(initial=-math.inf)].tolist())


class _Fitter:
    """Learns one field from training rows."""

    def __init__(self, plan: Field, config: TableConfig, folder: Path) -> None:
        self.plan, self.config = plan, config
        self.counts, self.moments, self.sample = _Counts(folder), _Moments(), _Sample(config.seed)
        self.buckets: set[int] = set()
        self.longest = 1

    def update(self, chunk: Chunk) -> None:
        plan = self.plan
        if plan.kind == "categorical":
            if not plan.hash_buckets:
                self.counts.add(chunk.text(plan.name), chunk.place)
        elif plan.kind == "sequence":
            items, lengths = items_of(plan, chunk)
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            if not plan.hash_buckets:
                self.counts.add(items, chunk.place)
        elif plan.numeric == "bucket":
            self.buckets.update(criteo_bucket(chunk.numbers(plan.name)).drop_nulls().unique())
        else:
            numbers = chunk.numbers(plan.name).drop_nulls().to_numpy()
            (self.sample if plan.numeric == "quantile" else self.moments).add(numbers, chunk.place)

    def field(self, together: Peers) -> Field:
        """The field as all processes have seen it."""
        plan = self.plan
        self.longest = max(together.gather(self.longest))
        self.buckets.update(*together.gather(self.buckets))
        self.moments.settle(together)
        self.sample.settle(together)
        if plan.kind == "sequence":
            plan = replace(plan, max_length=plan.max_length or min(self.longest, _LONGEST))
        if plan.hash_buckets:
            return plan
        if plan.kind != "numeric":
            words = self.counts.words(plan.min_count, together)
            if 0 < self.config.hash_above < len(words):
                return replace(plan, hash_buckets=self.config.hash_above)
            return replace(plan, words=words)
        if plan.numeric == "bucket":
            return replace(plan, words=tuple(map(str, sorted(self.buckets))))
        if plan.numeric == "standardize":
            return replace(plan, mean=self.moments.mean, std=self.moments.std)
        if plan.numeric == "minmax":
            # A constant becomes 0, as it does when standardised.
            return replace(plan, mean=self.moments.least, std=self.moments.most - self.moments.least or 1.0)
        edges = self.sample.edges(self.config.num_quantiles)
        ends = ["-inf", *(f"{edge:.6g}" for edge in edges), "inf"]
        words = tuple(f"({low}, {high}]" for low, high in pairwise(ends))
        return replace(plan, words=words, edges=edges)


def _fit(
    raw: RawTable, plans: Iterable[Field], config: TableConfig, has_test: bool, leaks: Leaks, together: Peers
) -> list[Field]:
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        fitters = [_Fitter(plan, config, Path(folder) / str(place)) for place, plan in enumerate(plans)]
        by_name = {fitter.plan.name: fitter for fitter in fitters}
        for fitter in fitters:
            if fitter.plan.share:
                fitter.counts = by_name[fitter.plan.share].counts
        columns = [*by_name, *(label.name for label in leaks.labels)]
        for chunk, codes in _split_chunks(raw, config, has_test, "count the values of", columns):
            training = chunk._replace(frame=chunk.frame.filter(pl.Series(codes == 0)))
            leaks.update(training)
            for fitter in fitters:
                fitter.update(training)
            while sum(counts.held for counts in {id(f.counts): f.counts for f in fitters}.values()) > _HELD:
                max((fitter.counts for fitter in fitters), key=lambda counts: counts.held).spill()
        leaks.settle(together)
        return [fitter.field(together) for fitter in fitters]


# -- the labels of the splits ----------------------------------------------------------------------------------


def _check_classes(data: TableData) -> None:
    """AUC is undefined on a split with one class."""
    for split in data.splits:
        for label, mean in zip(data.schema.labels, data.label_means(split), strict=True):
            if label.classes and mean in (0, 1):
                only = label.classes[int(mean)]
                raise UserError(
                    f"{data.source}: all {data.num_rows(split)} {split} rows have {label.name} = {only!r}, so that no AUC can be "
                    "measured; give more rows, other ratios, another seed or a split column"
                )


__all__ = [
    "Field",
    "Label",
    "RawTable",
    "Rows",
    "Schema",
    "TableBatch",
    "TableConfig",
    "TableData",
    "WholeNumbers",
    "read_rows",
    "read_table",
]
