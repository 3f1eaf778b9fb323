"""Tables as they lie on disk: CSV, TSV and Parquet in chunks of rows; a fault is named by file, row and column."""

from __future__ import annotations

import copy
import csv
import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from penstock.data.base import counted
from penstock.errors import UserError, nearest

#: Cells that mean "no value", after spaces around them are taken off.
MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N")

_ATOMIC_SUFFIXES = (".inter", ".user", ".item")  # RecBole's
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".data", "", *_ATOMIC_SUFFIXES)
_WANTED = "give a .csv, .tsv or .parquet file, or a directory of Parquet parts"
_COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")  # zip (as .xlsx), gzip, zstandard, Parquet
_BLOCK_BYTES = 1 << 21  # Arrow reads up to 32 of these ahead
_BLOCK_ROWS = 1 << 16


#: Criteo's click logs have no header: the label, 13 counts, 26 hashed categories; rows to be scored lack the label.
CRITEO = ("label", *(f"I{n}" for n in range(1, 14)), *(f"C{n}" for n in range(1, 27)))
_CRITEO_CELLS = (r"[01]", *[r"(-?\d+)?"] * 13, *[r"([0-9a-f]{8})?"] * 26)


class Chunk(NamedTuple):
    """Some rows of a file.

    Attributes:
        path: of the file.
        start: number of the first of these rows in it, from 1, the header not counted.
        frame: the rows; what means "no value" is null, text is stripped, numbers of Parquet keep their type.
        place: of the first of these rows in the whole table, from 0.
    """

    path: Path
    start: int
    frame: pl.DataFrame
    place: int

    def error(self, row: int, column: str, what: str) -> UserError:
        """The error to raise about a cell, ``row`` counted within the chunk."""
        return UserError(f"{self.path}, row {self.start + row}, column {column!r}: {what}")

    def text(self, column: str) -> pl.Series:
        """A column's values as words; whole floats lose their ".0", so that a column reads alike with and without gaps.

        Raises:
            UserError: if it holds lists.
        """
        return as_text(self._single(column))

    def numbers(self, column: str) -> pl.Series:
        """A column's values as finite floats.

        Raises:
            UserError: at the first that is none.
        """
        values = self._single(column)
        numbers = values.cast(pl.Float64, strict=False)
        bad = (numbers.is_null() & values.is_not_null()) | numbers.is_infinite().fill_null(False)
        if (at := bad.arg_true()).len():
            wrong = f"{values[at[0]]!r} is not a finite number; leave the cell empty if the value is missing, "
            raise self.error(at[0], column, f"{wrong}or call the column categorical in a columns file")
        return numbers

    def _single(self, column: str) -> pl.Series:
        if isinstance(self.frame[column].dtype, pl.List):
            raise UserError(
                f"{self.path}, column {column!r}: holds lists; it must have one value a row, or be a sequence"
            )
        return self.frame[column]


class RawTable:
    """A table on disk, opened and checked but not read yet.

    Args:
        path: a ``.csv`` or ``.tsv`` file (also with ``.gz``), a ``.parquet`` file, or a directory of Parquet parts.

    Attributes:
        columns: the names in the header; a column without a name (a saved index) has "" and is not read. A text file
            in Criteo's layout without a header gets Criteo's names.
        has_header: whether the first line names the columns.
        settings: what the format itself says of columns, as a columns file would.
        notes: on reading it, for people.
        num_rows: how many rows there are; 0 as long as nobody knows, which is until a text file was read once.
        part_rows: how many rows each Parquet part has.
        whole: the table that this one is `some` parts of.

    Raises:
        UserError: if it is missing, empty or not what its name says, or two columns have one name.
    """

    settings: Mapping[str, Mapping[str, Any]] = {}
    notes: Sequence[str] = ()
    whole: RawTable | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise UserError(f"{path}: there is no such file or directory")
        self.parts = _parts(path) if path.is_dir() else [path]
        if not self.parts:
            raise UserError(f"{path}: the directory holds no .parquet file; {_WANTED}")
        suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix.lower()
        self.is_parquet = path.is_dir() or suffix in (".parquet", ".pq")
        if not self.is_parquet and suffix not in _TEXT_SUFFIXES:
            raise UserError(f"{path}: a {suffix} file is no table; {_WANTED}")
        self.delimiter = "\t" if suffix in (".tsv", ".tab", *_ATOMIC_SUFFIXES) else ","
        self.has_header = True
        self.num_rows = 0
        self.part_rows: dict[Path, int] = {}
        self.columns = self._parquet_columns() if self.is_parquet else self._header()
        named = [name for name in self.columns if name]
        if doubled := sorted({name for name in named if named.count(name) > 1}):
            raise UserError(
                f"{path}: {', '.join(map(repr, doubled))} names more than one column; names must differ "
                "(is the header row missing?)"
            )
        if not named:
            raise UserError(f"{path}: the header names no column")

    def must_have(self, columns: Sequence[str]) -> None:
        """Raise `UserError` unless all ``columns`` are there."""
        if lacking := [name for name in columns if name not in self.columns]:
            raise UserError(
                f"{self.path}: lacks {', '.join(map(repr, lacking))}, which the training table has; "
                f"{did_you_mean(lacking[0], self.columns)}"
            )

    def count_rows(self) -> int:
        """How many rows there are; a text file is read for it."""
        return self.num_rows or sum(chunk.frame.height for chunk in self.chunks("count the rows of"))

    def chunks(self, what: str = "read", columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """All rows, in order.

        Args:
            what: is done to them, for the progress bar.
            columns: that are wanted (default all).

        Raises:
            UserError: at the first that cannot be read.
        """
        names = [name for name in self.columns if name and (columns is None or name in columns)]
        rows = 0
        before = dict(zip(self.part_rows, accumulate(self.part_rows.values(), initial=0), strict=False))
        with counted(f"{what} {self.path.name}", self.num_rows) as advance:
            for part in self.parts:
                start, place = 1, before.get(part, 0)
                for frame in self._parquet_frames(part, names) if self.is_parquet else self._csv_frames(names):
                    cleaned = frame.select(clean(frame[name]) for name in names)
                    yield Chunk(part, start, cleaned, place + start - 1)
                    start += frame.height
                    rows += frame.height
                    advance(rows)
        self.num_rows = rows

    def some(self, parts: Sequence[int]) -> RawTable:
        """The table of some of the Parquet parts, by their numbers, with the columns of all."""
        some = copy.copy(self)
        some.whole = self
        some.parts = [self.parts[part] for part in parts]
        some.num_rows = sum(self.part_rows[part] for part in some.parts)
        return some

    def _header(self) -> list[str]:
        try:
            with self._open() as file:
                bytes_ = file.readline()
            # A file of an old Mac ends its lines with a carriage return alone.
            line = next(iter(bytes_.splitlines()), b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if b"\0" in bytes_ or bytes_.startswith(_COMPRESSED):
                raise UserError(f"{self.path}: is no text, or not in UTF-8 (UTF-16?); {_WANTED}") from None
            raise UserError(f"{self.path}, header: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        except (OSError, EOFError) as error:
            raise UserError(f"{self.path}: cannot be read ({_first_line(error)})") from None
        if not line.strip():
            what = "the first line is blank; it" if bytes_ else "the file is empty; its first line"
            raise UserError(f"{self.path}: {what} must name the columns")
        if self.delimiter == ",":
            self.delimiter = max(",\t;|", key=line.count)
        cells = [name.strip() for name in next(csv.reader([line], delimiter=self.delimiter))]
        for left_out in (0, 1):
            if len(cells) == len(CRITEO) - left_out and all(map(re.fullmatch, _CRITEO_CELLS[left_out:], cells)):
                self.has_header = False
                return list(CRITEO[left_out:])
        return cells

    def _open(self) -> Any:
        return gzip.open(self.path, "rb") if self.path.suffix == ".gz" else self.path.open("rb")

    def _parquet_columns(self) -> list[str]:
        columns: list[str] = []
        for part in self.parts:
            try:
                metadata = pyarrow.parquet.read_metadata(part)
                schema = metadata.schema.to_arrow_schema()
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{part}: not a readable Parquet file ({_first_line(error)})") from None
            for column in schema:
                if pa.types.is_nested(_item(column.type)):
                    raise UserError(
                        f"{part}, column {column.name!r}: holds {column.type}; "
                        "a table has text, numbers or lists of them"
                    )
            if columns and set(schema.names) != set(columns):
                odd = sorted(set(schema.names) ^ set(columns))
                raise UserError(
                    f"{part}: differs from {self.parts[0].name} in the columns {', '.join(odd)}; "
                    "all parts must have the same"
                )
            columns = columns or list(schema.names)
            self.part_rows[part] = metadata.num_rows
            self.num_rows += metadata.num_rows
        return columns

    def _parquet_frames(self, part: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        try:
            with pyarrow.parquet.ParquetFile(part) as file:
                for batch in file.iter_batches(_BLOCK_ROWS, columns=list(columns)):
                    yield pl.DataFrame(pl.from_arrow(batch))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{part}: not a readable Parquet file ({_first_line(error)})") from None

    def _csv_frames(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        unfit: list[Any] = []

        def note(row: Any) -> str:
            unfit.append(row)
            return "error"

        names = [name or f"\0{place}" for place, name in enumerate(self.columns)]
        try:
            # All columns as text: types guessed from the first block would fail on a later one.
            for batch in pyarrow.csv.open_csv(
                self.path,
                pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=names, skip_rows=int(self.has_header)
                ),
                pyarrow.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=note),
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), include_columns=list(columns)
                ),
            ):
                yield pl.DataFrame(pl.from_arrow(batch))
        except (pa.ArrowInvalid, OSError) as error:
            if "Empty CSV" in str(error):
                return
            raise UserError(f"{self.path}{self._fault(error, unfit)}") from None

    def _fault(self, error: Exception, unfit: Sequence[Any]) -> str:
        """What is wrong with a CSV, to stand after its path."""
        if unfit:
            bad = unfit[0]
            hint = "text that holds the separator must stand in quotes"
            if bad.actual_columns < bad.expected_columns:
                hint = "is the file cut off, or a quote left open?"
            values = f"{bad.actual_columns} value{'s' * (bad.actual_columns != 1)}"
            wanted = "the header names" if self.has_header else "Criteo's layout has"
            return (
                f", row {bad.number - self.has_header}: {values} where {wanted} {bad.expected_columns} columns; {hint}"
            )
        if "UTF8" not in str(error):
            return f": cannot be read as a table ({_first_line(error)})"
        with self._open() as file:
            row = next(number for number, line in enumerate(file, not self.has_header) if not _is_utf8(line))
        return f", row {row}: not UTF-8; save the file as UTF-8"


def clean(column: pl.Series) -> pl.Series:
    """Text stripped, words for "missing" and NaN as null; durations in seconds, what is no number, list or text as text."""
    kind = column.dtype
    if isinstance(kind, pl.Array):
        return column.arr.to_list()
    if kind.is_float() or kind.is_decimal():
        return column.cast(pl.Float64).fill_nan(None)
    if kind.is_integer() or isinstance(kind, pl.List):
        return column
    if kind == pl.Duration:
        return column.dt.total_microseconds() / 1e6
    text = column.cast(pl.String).str.strip_chars()
    return text.set(text.is_in(MISSING), None)


def _parts(folder: Path) -> list[Path]:
    """The Parquet files of a folder and of those in it; what begins with a dot or an underscore is not data."""
    parts = folder.rglob("*.parquet")
    return sorted(part for part in parts if not any(n[0] in "._" for n in part.relative_to(folder).parts))


def _item(kind: pa.DataType) -> pa.DataType:
    """The type of the items of a list, and any other type itself."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if lists else kind


def as_text(column: pl.Series) -> pl.Series:
    """Values as words; whole floats lose their ".0"."""
    if column.dtype.is_float():
        whole = (column % 1 == 0) & (column.abs() < 2**53)
        short = column.cast(pl.Int64, strict=False).cast(pl.String)
        return column.cast(pl.String).zip_with(~whole.fill_null(False), short).alias(column.name)
    return column.cast(pl.String)


def did_you_mean(name: str, columns: Sequence[str]) -> str:
    """The end of a message about a column that is not there."""
    if close := nearest(name, columns):
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"the columns are {', '.join(filter(None, columns))}"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
