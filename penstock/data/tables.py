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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import pyarrow.parquet
import yaml
from numpy.typing import NDArray

from penstock.data.base import Data, Source
from penstock.data.loader import Batches
from penstock.data.ondisk import Store, batches, release, room
from penstock.data.rawtables import Chunk, RawTable, as_text, did_you_mean
from penstock.data.schema import Field, Kind, Label, Numeric, Rows, Schema, TableBatch, criteo_bucket, items_of
from penstock.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SPLIT_NAMES = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2, "testing": 2}
_LABEL_NAMES = ("label", "click", "clicked", "is_click", "target", "y")
_SEPARATORS = ("^", "|")
_LONGEST = 50  # items of a sequence, unless the columns file says otherwise
_FEW = 10  # whole numbers with no more different values than this are categories
_SAMPLE = 1 << 20  # numbers kept to find quantiles
_HELD = 1 << 22  # words of all columns that are counted in memory; merging them takes about 250 bytes each
_SHARES = 64  # of the words counted on disk, read one at a time
_SPILLED_GROUP = 1 << 14  # words, so that few of another share are read with one


@dataclass
class TableConfig:
    """How the user's table is read."""

    min_count: int = 2
    """Values seen less often in training share their field's "unseen" id."""
    columns: str = ""
    """A YAML file that says what columns are: `age: numeric`, `zip: categorical`, `id: drop`, or
    `genres: {kind: sequence, separator: "|", max_length: 6}` (also min_count and numeric)."""
    validation_ratio: float = 0.1
    """Share of rows held out for validation, where no split column says which."""
    test_ratio: float = 0.1
    """Share of rows held out for the test, where there is neither a test file nor a split column."""
    split_column: str = ""
    """A column whose values are train, validation and test."""
    group_column: str = ""
    """A column (user, session) within whose values AUC is measured too; it remains a feature unless dropped."""
    seed: int = 0
    """Of the random split."""
    numeric: Numeric = "bucket"
    """Numbers become categories, as for Criteo (x > 2: floor(ln(x)^2), else int(x)) or by quantile, or stay numbers."""
    num_quantiles: int = 20
    """Categories of a number cut by quantile."""
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
        for name, least in (("min_count", 1), ("num_quantiles", 2), ("memory_mb", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be {least} or more")


class TableData(Data):
    """Encoded splits of a table.

    Args:
        schema: of the table.
        splits: the rows of each split.
        source: where it is from, for people.
        notes: what was done that a person should know.

    Attributes:
        spec: ``schema`` (plain); ``fields`` (names), ``field_sizes`` and ``offsets`` in the order of the batch;
            ``num_ids``; ``group`` (the column of groups); ``num_id_fields`` F, ``num_numeric`` N and ``num_sequences`` S; ``labels`` (names).
    """

    def __init__(self, schema: Schema, splits: Mapping[Split, Rows], source: str, notes: Sequence[str] = ()) -> None:
        self.schema, self.splits, self.source, self.notes = schema, splits, source, list(notes)
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
        return batches(self.splits[split], batch_size, shuffle=shuffle, seed=seed)

    def overview(self) -> str:
        rows = ", ".join(f"{split} {len(part.label)}" for split, part in self.splits.items())
        return "\n".join([f"{self.source}: rows {rows}", str(self.schema.table()), *self.notes])

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "rows": {split: len(rows.label) for split, rows in self.splits.items()},
            "fields": {f.name: f.size for f in self.schema.fields},
            "num_ids": self.schema.num_ids,
            "labels": {
                label.name: {split: float(rows.label[:, place].mean()) for split, rows in self.splits.items()}
                for place, label in enumerate(self.schema.labels)
            },
            "notes": self.notes,
        }


def read_table(config: TableConfig, source: Source, *, labels: Literal["binary", "any"] = "binary") -> TableData:
    """Read the user's table and, if given, their test table.

    Args:
        config: how.
        source: the paths and the label column; several columns separated by commas where ``labels`` is "any".
        labels: "binary": one label with two values, the first in sorted order becoming 0; "any": labels may also be
            numbers, which are kept as they are.

    Raises:
        UserError: naming file, row and column of what cannot be used, and what would be right.
    """
    assert source.data is not None, "a table needs a path; the embedded default is made elsewhere"
    config.check()
    raw = RawTable(source.data)
    held_out = RawTable(source.test) if source.test is not None else None
    targets = _label_columns(raw, source.label, several=labels == "any")
    if config.split_column:
        if config.split_column not in raw.columns:
            raise UserError(
                f"{raw.path}: no column {config.split_column!r} to split by; "
                f"{did_you_mean(config.split_column, raw.columns)}"
            )
    elif held_out is None and config.test_ratio == 0:
        raise UserError("test_ratio=0 leaves nothing to test on; give a larger one, a test file or a split column")
    if config.group_column and config.group_column not in raw.columns:
        raise UserError(
            f"{raw.path}: no column {config.group_column!r} to group by; {did_you_mean(config.group_column, raw.columns)}"
        )
    overrides = _read_overrides(config, raw)
    if held_out is not None:
        held_out.must_have([*targets, *filter(None, [config.group_column])])

    scan = _scan(raw, config, held_out is not None)
    label_fields = [_label(raw, name, scan.columns[name], labels) for name in targets]
    plans, notes = _plan(raw, scan, {*targets, config.split_column}, overrides, config)
    if held_out is not None:
        held_out.must_have([plan.name for plan in plans])
        if not (rows := held_out.count_rows()):
            raise UserError(f"{held_out.path}: there is a header and no row; there is nothing to test on")
        scan.rows["test"] = rows
    schema = Schema.lay_out(_fit(raw, plans, config, held_out is not None), label_fields, config.group_column)
    notes += [f"{x.name}: {x.classes[0]!r} became 0 and {x.classes[1]!r} became 1" for x in label_fields if x.classes]

    size = sum(4 * math.prod(shape) for rows in scan.rows.values() for shape in schema.shapes(rows))
    on_disk = size > config.memory_mb << 20
    if on_disk:
        notes.append(f"the encoded rows ({size >> 20} MB) are kept in a temporary file")
    with tempfile.TemporaryDirectory(prefix="penstock-", ignore_cleanup_errors=True) as folder:
        # The files are mapped before the folder goes: the rows live on without a name, and end with the process.
        stores = {split: Store(schema, n, Path(folder) / split if on_disk else None) for split, n in scan.rows.items()}
        columns = [*targets, *(plan.name for plan in plans), config.group_column]
        for chunk, codes in _split_chunks(raw, config, held_out is not None, "encode", columns):
            encoded = schema.encode(chunk)
            for code in np.unique(codes):
                stores[SPLITS[code]].append(encoded.where(codes == code))
        if held_out is not None:
            for chunk in held_out.chunks("encode", columns):
                stores["test"].append(schema.encode(chunk))
        splits = {split: store.finish() for split, store in stores.items()}
    _check_classes(raw, schema, splits)
    for rows_of_split in splits.values():
        release(rows_of_split)
    return TableData(schema, splits, str(raw.path), notes)


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
    raw = RawTable(path)
    columns = [f.name for f in schema.fields]
    raw.must_have(columns)
    for chunk in raw.chunks("predict", columns):
        rows = schema.encode(chunk, with_labels=False)
        for first in range(0, len(rows.label), batch_size):
            yield rows.batch(slice(first, first + batch_size))


# -- scan: what is in the file -------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What was seen of a column in the whole training file."""

    present: int = 0
    first_gap: UserError | None = None
    is_number: bool = True
    is_whole: bool = True
    is_list: bool = False
    distinct: set[str] = field(default_factory=set)
    separated: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SEPARATORS, 0))

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
        if self.is_number:
            numbers = present.cast(pl.Float64, strict=False)
            self.is_number = not numbers.null_count()
            self.is_whole &= self.is_number and bool((numbers % 1 == 0).all())
        if len(self.distinct) <= _FEW:
            self.distinct.update(as_text(present.unique()).sort()[: 2 * _FEW].to_list())
        if not self.is_number:
            for separator in _SEPARATORS:
                self.separated[separator] += int(present.str.contains(separator, literal=True).sum())


class _Scan(NamedTuple):
    columns: dict[str, _Seen]
    rows: dict[Split, int]


def _scan(raw: RawTable, config: TableConfig, has_test: bool) -> _Scan:
    columns = {name: _Seen() for name in raw.columns if name}
    counts = np.zeros(len(SPLITS), np.int64)
    for chunk, codes in _split_chunks(raw, config, has_test, "scan"):
        for name, seen in columns.items():
            seen.update(name, chunk)
        counts += np.bincount(codes, minlength=len(SPLITS))
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
    return _Scan(columns, rows)


def _split_chunks(
    raw: RawTable, config: TableConfig, has_test: bool, what: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[Chunk, NDArray[np.int64]]]:
    """Chunks with each row's split (its place in `SPLITS`); the same at every reading.

    ``what`` and ``columns`` as for `RawTable.chunks`.
    """
    draw = np.random.default_rng(config.seed)
    test_from = 1.0 if has_test else 1.0 - config.test_ratio
    validation_from = test_from - config.validation_ratio
    for chunk in raw.chunks(what, None if columns is None else [*columns, config.split_column]):
        if not config.split_column:
            lot = draw.random(chunk.frame.height)
            yield chunk, (lot >= validation_from).astype(np.int64) + (lot >= test_from)
            continue
        marks = chunk.text(config.split_column)
        codes = marks.str.to_lowercase().replace_strict(_SPLIT_NAMES, default=None, return_dtype=pl.Int64)
        if (bad := codes.is_null().arg_true()).len():
            raise chunk.error(
                bad[0], config.split_column, f"{marks[bad[0]]!r} is no split; it must be train, validation or test"
            )
        yield chunk, codes.to_numpy()


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


def _label(raw: RawTable, name: str, seen: _Seen, kinds: Literal["binary", "any"]) -> Label:
    if seen.first_gap is not None:
        raise seen.first_gap
    where = f"{raw.path}, column {name!r}"
    if seen.is_list:
        raise UserError(f"{where}: holds lists; a label is one value a row")
    numbers = sorted(set(map(float, seen.distinct))) if seen.is_number else []
    classes = [str(int(x)) if x.is_integer() else repr(x) for x in numbers] or sorted(seen.distinct)
    if len(classes) == 1:
        raise UserError(f"{where}: every row has the label {classes[0]!r}; there is nothing to tell apart")
    if len(classes) == 2:
        return Label(name, tuple(classes), number=seen.is_number)
    if kinds == "any" and seen.is_number:
        return Label(name)
    raise UserError(
        f"{where}: a label must have two values, and it has {', '.join(classes[:4])}" + ", ..." * (len(classes) > 4)
    )


def _read_overrides(config: TableConfig, raw: RawTable) -> dict[str, dict[str, Any]]:
    """The columns file: `Field` settings for each column it names, whose kind may be "drop"."""
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
    overrides = {}
    for name, value in given.items():
        if name not in raw.columns:
            raise UserError(f"{path}: {raw.path.name} has no column {name!r}; {did_you_mean(str(name), raw.columns)}")
        overrides[name] = value if isinstance(value, dict) else {"kind": value}
        _check_override(f"{path}, {name}", overrides[name])
    return overrides


def _check_override(where: str, settings: Mapping[str, Any]) -> None:
    choices = {"kind": (*get_args(Kind), "drop"), "numeric": get_args(Numeric)}
    for key, value in settings.items():
        if key in choices:
            right, fits = f"one of {', '.join(choices[key])}", value in choices[key]
        elif key in ("max_length", "min_count"):
            right, fits = "a whole number, 1 or more", isinstance(value, int) and value >= 1
        elif key == "separator":
            right, fits = "some text", isinstance(value, str) and value != ""
        else:
            raise UserError(
                f"{where}: {key!r} is no setting; there are kind, numeric, max_length, min_count and separator"
            )
        if not fits:
            raise UserError(f"{where}: {key} is {value!r} and must be {right}")


def _plan(
    raw: RawTable, scan: _Scan, other: set[str], overrides: Mapping[str, Mapping[str, Any]], config: TableConfig
) -> tuple[list[Field], list[str]]:
    """The fields to fit, and notes on what was left out."""
    plans = []
    notes = ["a column without a name was left out"] if "" in raw.columns else []
    if not raw.has_header:
        notes.append("there is no header: read in Criteo's layout, a label, the counts I1 to I13 and C1 to C26")
    for name, seen in scan.columns.items():
        settings = overrides.get(name, {})
        if name in other or settings.get("kind") == "drop":
            continue
        if not seen.present:
            notes.append(f"{name} has no value in any row and was left out")
            continue
        known: Kind = "numeric" if name.startswith("I") else "categorical"
        kind: Kind = settings.get("kind") or (_infer(name, seen) if raw.has_header else known)
        usual = max(_SEPARATORS, key=lambda s: seen.separated[s])
        plans.append(
            Field(
                name,
                kind,
                numeric=settings.get("numeric", config.numeric) if kind == "numeric" else "",
                separator=settings.get("separator", usual) if kind == "sequence" else "",
                max_length=settings.get("max_length", 0) if kind == "sequence" else 0,
                min_count=settings.get("min_count", config.min_count),
            )
        )
    if not plans:
        raise UserError(f"{raw.path}: no column beside the label has a value; there is nothing to learn from")
    return plans, notes


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
        self.parts: list[pl.DataFrame] = []
        self.seen = 0

    def add(self, words: pl.Series) -> None:
        rows = words.alias("word").to_frame().with_row_index("first", self.seen).drop_nulls()
        self.seen += len(words)
        counted = rows.group_by("word").agg(
            pl.len().cast(pl.Int64).alias("count"), pl.col("first").min().cast(pl.Int64)
        )
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
        self.parts = []

    def words(self, min_count: int) -> tuple[str, ...]:
        """Words seen at least ``min_count`` times, most frequent first, then by first sight."""
        if self.folder.exists():
            self.spill()
            files = pl.scan_parquet(list(self.folder.iterdir()))
            shares = [files.filter(pl.col("share") == share) for share in range(_SHARES)]
        else:
            shares = [pl.concat(self.parts).lazy()]
        kept = pl.concat(_merged(share).filter(pl.col("count") >= min_count) for share in shares)
        return tuple(kept.sort("count", "first", descending=[True, False])["word"])


def _merged(parts: pl.LazyFrame) -> pl.DataFrame:
    return parts.group_by("word").agg(pl.col("count").sum(), pl.col("first").min()).collect()


class _Moments:
    """Mean and standard deviation of a stream (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, numbers: NDArray[np.float64]) -> None:
        if len(numbers):
            total, delta = self.count + len(numbers), float(numbers.mean()) - self.mean
            self.squares += float(numbers.var()) * len(numbers) + delta**2 * self.count * len(numbers) / total
            self.mean += delta * len(numbers) / total
            self.count = total

    @property
    def std(self) -> float:
        """1 for a constant, which becomes 0 and not NaN when standardised."""
        return math.sqrt(self.squares / max(self.count, 1)) or 1.0


class _Sample:
    """A uniform sample of a stream, all of it while it is small."""

    def __init__(self, seed: int) -> None:
        self.numbers: NDArray[np.float64] = np.empty(0)
        self.share = 1.0
        self.draw = np.random.default_rng(seed)

    def add(self, numbers: NDArray[np.float64]) -> None:
        self.numbers = np.concatenate([self.numbers, numbers[self.draw.random(len(numbers)) < self.share]])
        while len(self.numbers) > _SAMPLE:
            self.numbers = self.numbers[self.draw.random(len(self.numbers)) < 0.5]
            self.share /= 2

    def edges(self, count: int) -> tuple[float, ...]:
        """Upper ends of ``count`` quantiles but the last; fewer where values repeat."""
        if not len(self.numbers):
            return ()
        return tuple(np.unique(np.quantile(self.numbers, np.arange(1, count) / count, method="lower")).tolist())


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
            self.counts.add(chunk.text(plan.name))
        elif plan.kind == "sequence":
            items, lengths = items_of(plan, chunk)
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            self.counts.add(items)
        elif plan.numeric == "bucket":
            self.buckets.update(criteo_bucket(chunk.numbers(plan.name)).drop_nulls().unique())
        else:
            numbers = chunk.numbers(plan.name).drop_nulls().to_numpy()
            (self.sample if plan.numeric == "quantile" else self.moments).add(numbers)

    def field(self) -> Field:
        plan = self.plan
        if plan.kind == "categorical":
            return replace(plan, words=self.counts.words(plan.min_count))
        if plan.kind == "sequence":
            longest = plan.max_length or min(self.longest, _LONGEST)
            return replace(plan, words=self.counts.words(plan.min_count), max_length=longest)
        if plan.numeric == "bucket":
            return replace(plan, words=tuple(map(str, sorted(self.buckets))))
        if plan.numeric == "standardize":
            return replace(plan, mean=self.moments.mean, std=self.moments.std)
        edges = self.sample.edges(self.config.num_quantiles)
        ends = ["-inf", *(f"{edge:.6g}" for edge in edges), "inf"]
        words = tuple(f"({low}, {high}]" for low, high in pairwise(ends))
        return replace(plan, words=words, edges=edges)


def _fit(raw: RawTable, plans: Iterable[Field], config: TableConfig, has_test: bool) -> list[Field]:
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        fitters = [_Fitter(plan, config, Path(folder) / str(place)) for place, plan in enumerate(plans)]
        columns = [fitter.plan.name for fitter in fitters]
        for chunk, codes in _split_chunks(raw, config, has_test, "count the values of", columns):
            training = chunk._replace(frame=chunk.frame.filter(pl.Series(codes == 0)))
            for fitter in fitters:
                fitter.update(training)
            while sum(fitter.counts.held for fitter in fitters) > _HELD:
                max((fitter.counts for fitter in fitters), key=lambda counts: counts.held).spill()
        return [fitter.field() for fitter in fitters]


# -- the labels of the splits ----------------------------------------------------------------------------------


def _check_classes(raw: RawTable, schema: Schema, splits: Mapping[Split, Rows]) -> None:
    """AUC is undefined on a split with one class."""
    for split, rows in splits.items():
        for place, label in enumerate(schema.labels):
            values = rows.label[:, place]
            if label.classes and values.min() == values.max():
                only = label.classes[int(values[0])]
                raise UserError(
                    f"{raw.path}: all {len(values)} {split} rows have {label.name} = {only!r}, so that no AUC can be "
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
    "read_rows",
    "read_table",
]
