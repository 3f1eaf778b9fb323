"""The user's tables: what is inferred, what becomes of it, and what is said of a table that cannot be used."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from penstock.data.base import Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.rawtables import RawTable
from penstock.data.schema import Field, Schema, TableBatch, criteo_bucket
from penstock.data.tables import TableConfig, TableData, read_rows, read_table
from penstock.errors import UserError


def frame(rows: int = 400, seed: int = 0) -> pl.DataFrame:
    """A small table of clicks; split by a column, so that a test knows what training saw."""
    draw = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "city": draw.choice(["Oslo", "Rome", "Lima"], rows, p=[0.6, 0.3, 0.1]),
            "price": draw.normal(50, 20, rows).round(3),
            "user_id": draw.integers(0, 60, rows),
            "tags": ["^".join(draw.choice(["a", "b", "c"], draw.integers(1, 5))) for _ in range(rows)],
            "part": (["train"] * (rows - 100) + ["validation"] * 50 + ["test"] * 50)[-rows:],
            "click": draw.choice(["no", "yes"], rows),
        }
    )


def read(
    path: Path, *, label: str | None = "click", test: Path | None = None, labels: str = "binary", **settings: object
) -> TableData:
    return read_table(TableConfig(**settings), Source(path, test, label), labels=labels)  # type: ignore[arg-type]


def saved(tmp_path: Path, table: pl.DataFrame, name: str = "clicks.csv") -> Path:
    path = tmp_path / name
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def everything(data: TableData) -> dict[str, TableBatch]:
    """All rows of each split, in order."""
    return {split: rows.batch() for split, rows in data.splits.items()}


def same(a: TableBatch, b: TableBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- what columns become -------------------------------------------------------------------------------------


def test_kinds_are_inferred(tmp_path: Path) -> None:
    data = read(saved(tmp_path, frame()), split_column="part")
    kinds = {f.name: (f.kind, f.numeric) for f in data.schema.fields}
    assert kinds == {
        "city": ("categorical", ""),
        "price": ("numeric", "bucket"),
        "user_id": ("categorical", ""),
        "tags": ("sequence", ""),
    }
    assert [f.name for f in data.schema.fields][-1] == "tags"  # the order of the batch: ids, numbers, sequences
    assert "Oslo" in str(data.schema.table())


def test_ids_lie_end_to_end(tmp_path: Path) -> None:
    data = read(saved(tmp_path, frame()), split_column="part")
    expected = 0
    for one in data.schema.fields:
        assert one.offset == expected
        expected += one.size
    assert expected == data.schema.num_ids == data.spec["num_ids"]
    batch = everything(data)["train"]
    for place, one in enumerate(data.schema.of("ids")):
        assert batch.ids[:, place].min() >= one.offset
        assert batch.ids[:, place].max() < one.offset + one.size


def test_words_are_those_of_training_by_frequency(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "c": ["b", "a", "a", "rare", "b", "a", None, "new", "a", "?", "b"],
            "part": ["train"] * 7 + ["validation"] * 2 + ["test"] * 2,
            "click": [0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0],
        }
    )
    data = read(saved(tmp_path, table), split_column="part", min_count=2)
    (field,) = data.schema.fields
    assert field.words == ("a", "b")
    ids = {split: batch.ids[:, 0].tolist() for split, batch in everything(data).items()}
    # 0 missing, 1 a, 2 b, 3 rare or unseen
    assert ids == {"train": [2, 1, 1, 3, 2, 1, 0], "validation": [3, 1], "test": [0, 2]}
    assert [data.schema.locate(i) for i in range(4)] == [("c", "(missing)"), ("c", "a"), ("c", "b"), ("c", "(unseen)")]
    with pytest.raises(ValueError, match=r"ids are 0 \.\. 3"):
        data.schema.locate(4)


def test_criteo_buckets() -> None:
    numbers = [-3.7, 0.0, 1.9, 2.0, 2.1, 3.0, 39.0, 1e6, None]
    expected = [-3, 0, 1, 2, *(math.floor(math.log(x) ** 2) for x in (2.1, 3.0, 39.0, 1e6)), None]
    assert criteo_bucket(pl.Series(numbers, dtype=pl.Float64)).to_list() == expected


def test_buckets_are_categories_in_numeric_order(tmp_path: Path) -> None:
    data = read(saved(tmp_path, frame()), split_column="part")
    field = next(f for f in data.schema.fields if f.name == "price")
    buckets = [int(word) for word in field.words]
    assert buckets == sorted(buckets)
    prices = frame()["price"][:300]
    place = data.spec["fields"].index("price")
    seen = [int(field.words[i - field.offset - 1]) for i in everything(data)["train"].ids[:, place].tolist()]
    assert seen == criteo_bucket(prices).to_list()


def test_standardised_numbers_use_training_statistics(tmp_path: Path) -> None:
    table = frame().with_columns(
        pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(pl.col("price")).alias("price")
    )
    data = read(saved(tmp_path, table), split_column="part", numeric="standardize")
    assert data.spec["num_numeric"] == 1
    batches = everything(data)
    train = table["price"][:300].drop_nulls().to_numpy()
    expected = (table["price"].to_numpy()[350:] - train.mean()) / train.std()
    np.testing.assert_allclose(batches["test"].numeric[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert batches["train"].numeric[3, 0] == 0
    field = data.schema.of("numeric")[0]
    assert field.size == 1
    assert data.schema.locate(field.offset) == ("price", "(number)")


def test_quantiles_hold_equal_shares(tmp_path: Path) -> None:
    table = pl.DataFrame({"x": np.random.default_rng(0).normal(size=3000), "click": [0, 1] * 1500})
    data = read(saved(tmp_path, table), numeric="quantile", num_quantiles=5)
    ids = everything(data)["train"].ids[:, 0]
    shares = torch.bincount(ids, minlength=7)[1:6] / len(ids)
    assert data.schema.fields[0].size == 7
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.01, rtol=0)


def test_a_value_that_fills_a_quantile_leaves_the_others_to_the_rest(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    gain = np.where(draw.random(3000) < 0.9, 0.0, draw.normal(size=3000))
    table = pl.DataFrame({"x": gain, "click": [0, 1] * 1500})
    data = read(saved(tmp_path, table), numeric="quantile", num_quantiles=5)
    ids = everything(data)["train"].ids[:, 0]
    counts = sorted(torch.bincount(ids, minlength=8)[1:7].tolist())
    others = len(ids) - counts[5]
    assert counts[5] == pytest.approx(0.9 * len(ids), rel=0.02)
    # Four quantiles of the others, one of them divided by zero.
    assert counts[0] + counts[1] == pytest.approx(others / 4, abs=1)
    assert counts[2:5] == pytest.approx([others / 4] * 3, abs=1)


def test_sequences_keep_their_last_items(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "seen": ["a|b|c", "b", "", "c|c|b|a", "zzz|a", "a|b", "b|?|a"] * 2,
            "click": [0, 1] * 7,
            "part": ["train"] * 7 + ["validation"] * 3 + ["test"] * 4,
        }
    )
    columns = tmp_path / "columns.yaml"
    columns.write_text("seen: {kind: sequence, separator: '|', max_length: 3, min_count: 2}")
    data = read(saved(tmp_path, table), split_column="part", columns=str(columns))
    (field,) = data.schema.fields
    assert field.words == ("a", "b", "c")  # a 5, b 5, c 3; ties by first sight
    rows = everything(data)["train"].sequences[:, 0].tolist()
    assert rows == [[1, 2, 3], [2, 0, 0], [0, 0, 0], [3, 2, 1], [4, 1, 0], [1, 2, 0], [2, 1, 0]]


def test_parquet_lists_are_sequences(tmp_path: Path) -> None:
    table = frame().with_columns(pl.col("tags").str.split("^"))
    from_lists = read(saved(tmp_path, table, "lists.parquet"), split_column="part")
    from_text = read(saved(tmp_path, frame()), split_column="part")
    for split, batch in everything(from_text).items():
        assert same(batch, everything(from_lists)[split])


@pytest.mark.parametrize("name", ["clicks.parquet", "clicks.tsv"])
def test_formats_read_alike(tmp_path: Path, name: str) -> None:
    table = frame().with_columns(pl.when(pl.col("city") == "Lima").then(None).otherwise("user_id").alias("user_id"))
    expected = everything(read(saved(tmp_path, table), split_column="part"))
    for split, batch in everything(read(saved(tmp_path, table, name), split_column="part")).items():
        assert same(batch, expected[split])


def test_gaps_do_not_change_how_whole_numbers_read(tmp_path: Path) -> None:
    whole = pl.DataFrame({"item_id": [3, 3, 12, 12] * 10, "click": [0, 1, 1, 0] * 10})
    floats = whole.with_columns(pl.col("item_id").cast(pl.Float64))  # what pandas makes of a column with gaps
    data = read(saved(tmp_path, whole, "whole.parquet"), validation_ratio=0.3, test_ratio=0.3)
    other = saved(tmp_path, floats, "floats.parquet")
    assert data.schema.fields[0].words == read(other, validation_ratio=0.3, test_ratio=0.3).schema.fields[0].words


def test_a_directory_of_parts_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    table = frame()
    table[:150].write_parquet(folder / "a.parquet")
    table[150:].write_parquet(folder / "b.parquet")
    whole = everything(read(saved(tmp_path, table, "whole.parquet"), split_column="part"))
    for split, batch in everything(read(folder, split_column="part")).items():
        assert same(batch, whole[split])
    table.drop("city").write_parquet(folder / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: differs from a\.parquet in the columns city"):
        read(folder, split_column="part")


def test_compressed_and_semicolon_tables(tmp_path: Path) -> None:
    text = frame().write_csv(separator=";")
    path = tmp_path / "clicks.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    expected = everything(read(saved(tmp_path, frame()), split_column="part"))
    for split, batch in everything(read(path, split_column="part")).items():
        assert same(batch, expected[split])


def test_columns_file_overrides(tmp_path: Path) -> None:
    columns = tmp_path / "columns.yaml"
    columns.write_text("price: {kind: numeric, numeric: standardize}\nuser_id: drop\ntags: categorical\n")
    data = read(saved(tmp_path, frame()), split_column="part", columns=str(columns))
    assert {f.name: f.kind for f in data.schema.fields} == {
        "city": "categorical",
        "tags": "categorical",
        "price": "numeric",
    }
    assert data.schema.of("numeric")[0].name == "price"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: numeric", "has no column 'prices'; did you mean 'price'"),
        ("price: number", "kind is 'number' and must be one of categorical, numeric, sequence, drop"),
        ("tags: {kind: sequence, max_length: 0}", "max_length is 0 and must be a whole number, 1 or more"),
        ("tags: {size: 3}", "'size' is no setting"),
        ("[price]", "must map columns to kinds"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_columns_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    columns = tmp_path / "columns.yaml"
    columns.write_text(text)
    with pytest.raises(UserError, match=message):
        read(saved(tmp_path, frame()), columns=str(columns))


def test_a_missing_columns_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read(saved(tmp_path, frame()), columns=str(tmp_path / "none.yaml"))


def test_columns_without_values_or_names_are_left_out(tmp_path: Path) -> None:
    table = frame().with_columns(pl.lit("?").alias("void"))
    path = saved(tmp_path, table)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f",{lines[0]}", *(f"{i},{line}" for i, line in enumerate(lines[1:]))]))
    data = read(path, split_column="part")
    assert "void" not in data.spec["fields"]
    assert any("void has no value" in note for note in data.notes)
    assert any("without a name" in note for note in data.notes)
    assert len(data.spec["fields"]) == 4


# -- splits and labels ---------------------------------------------------------------------------------------


def test_random_split_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, frame(2000).drop("part"))
    first, again, other = (read(path, seed=s) for s in (1, 1, 2))
    assert same(everything(first)["test"], everything(again)["test"])
    assert not torch.equal(everything(first)["test"].label, everything(other)["test"].label)
    rows = first.describe()["rows"]
    assert sum(rows.values()) == 2000
    assert 150 < rows["validation"] < 250
    assert 150 < rows["test"] < 250


def test_a_test_file_is_the_test(tmp_path: Path) -> None:
    train, test = frame(300, 0).drop("part"), frame(80, 1).drop("part")
    data = read(saved(tmp_path, train), test=saved(tmp_path, test, "test.csv"))
    assert data.describe()["rows"]["test"] == 80
    yes = [1.0 if label == "yes" else 0.0 for label in test["click"]]
    assert everything(data)["test"].label.tolist() == yes


def test_labels_are_told(tmp_path: Path) -> None:
    table = pl.DataFrame({"x": ["a", "b"] * 40, "income": ["<=50K", ">50K"] * 40})
    data = read(saved(tmp_path, table), label="income")
    assert "income: '<=50K' became 0 and '>50K' became 1" in data.notes
    batch = everything(data)["train"]
    assert torch.equal(batch.label, (batch.ids[:, 0] == data.schema.fields[0].words.index("b") + 1).float())


def test_a_full_stop_after_the_label_is_no_difference(tmp_path: Path) -> None:
    table = pl.DataFrame({"x": ["a", "b"] * 40, "income": ["<=50K", ">50K"] * 40})
    dotted = table.with_columns(pl.col("income") + ".")
    data = read(saved(tmp_path, table), test=saved(tmp_path, dotted, "test.csv"), label="income")
    assert everything(data)["test"].label.tolist() == [0.0, 1.0] * 40
    odd = table.with_columns(pl.lit("50K").alias("income"))
    with pytest.raises(UserError, match=r"test\.csv, row 1, column 'income': '50K' is neither '<=50K' nor '>50K'"):
        read(saved(tmp_path, table), test=saved(tmp_path, odd, "test.csv"), label="income")


def test_numeric_labels_may_be_written_in_two_ways(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("x,click\n" + "a,-1\nb,1.0\na,-1.0\nb,1\n" * 20)
    data = read(path)
    assert data.schema.labels[0].classes == ("-1", "1")
    batch = everything(data)["train"]
    assert torch.equal(batch.label, (batch.ids[:, 0] == data.schema.fields[0].words.index("b") + 1).float())


def test_any_labels(tmp_path: Path) -> None:
    table = frame().with_columns(pl.col("price").alias("spent"))
    data = read(saved(tmp_path, table), label="click, spent", labels="any", split_column="part")
    batch = everything(data)["train"]
    assert batch.label.shape == (300, 2)
    np.testing.assert_allclose(batch.label[:, 1].numpy(), table["spent"][:300].to_numpy(), rtol=1e-6)
    assert data.spec["labels"] == ["click", "spent"]


def test_the_usual_label_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, frame())
    assert read(path, label=None).spec["labels"] == ["click"]
    with pytest.raises(UserError, match=r"which column is the label\? give --label COLUMN; the columns are city"):
        read(saved(tmp_path, frame().rename({"click": "outcome"}), "b.csv"), label=None)


# -- what is stored ------------------------------------------------------------------------------------------


def test_schema_survives_json(tmp_path: Path) -> None:
    for numeric in ("bucket", "quantile", "standardize"):
        data = read(saved(tmp_path, frame()), split_column="part", numeric=numeric)
        assert Schema.from_dict(json.loads(json.dumps(data.spec))["schema"]) == data.schema


def test_new_rows_are_encoded_as_training_rows(tmp_path: Path) -> None:
    table = frame()
    data = read(saved(tmp_path, table), split_column="part", numeric="standardize")
    spec = json.loads(json.dumps(data.spec))
    new = saved(tmp_path, table[350:].drop("click", "part"), "new.csv")
    batches = list(read_rows(spec, new, 20))
    assert [len(b.ids) for b in batches] == [20, 20, 10]
    expected = everything(data)["test"]
    for part in ("ids", "numeric", "sequences"):
        assert torch.equal(torch.cat([getattr(b, part) for b in batches]), getattr(expected, part))
    assert batches[0].label.isnan().all()
    with pytest.raises(UserError, match=r"lacks 'city'"):
        list(read_rows(spec, saved(tmp_path, table.drop("city"), "less.csv"), 20))


def test_epochs_shuffle_and_cover(tmp_path: Path) -> None:
    data = read(saved(tmp_path, frame()), split_column="part")
    batches = data.train(64, seed=0)
    first, second = (torch.cat([b.ids for b in batches]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, everything(data)["train"].ids.sort(0).values)


def test_rows_on_disk_are_the_rows_in_memory_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    path = saved(tmp_path, frame())
    expected, mapped = (read(path, split_column="part", memory_mb=mb) for mb in (1024, 0))
    assert isinstance(mapped.splits["train"].ids, np.memmap)
    assert not list((tmp_path / "scratch").iterdir())
    for split, batch in everything(expected).items():
        assert same(batch, everything(mapped)[split])


_BIG = """
import sys
from pathlib import Path
from penstock.data.base import Source
from penstock.data.tables import TableConfig, read_table
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = peak()
data = read_table(TableConfig(memory_mb=0), Source(Path(sys.argv[1])))
assert sum(data.describe()["rows"].values()) == 2_000_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_two_million_rows_stream(tmp_path: Path) -> None:
    rows, width = 2_000_000, 120
    draw = np.random.default_rng(0)
    table = pl.DataFrame({"label": draw.integers(0, 2, rows, dtype=np.int8)})
    for name in ("a", "b"):
        words = pl.Series(name, [f"{word:03d}" * (width // 3) for word in range(50)])
        table = table.with_columns(words.gather(draw.integers(0, 50, rows)))
    path = tmp_path / "big.parquet"
    table.write_parquet(path, row_group_size=1 << 16)
    done = subprocess.run([sys.executable, "-c", _BIG, str(path)], capture_output=True, text=True, check=True)
    raw_mb = rows * 2 * width / 2**20
    assert float(done.stdout) < raw_mb / 2, f"{done.stdout} MB to read a table of {raw_mb:.0f} MB"


# -- tables that cannot be used ------------------------------------------------------------------------------

BROKEN = {
    "empty": (b"", "the file is empty"),
    "blank_first_line": (b"\nx,click\na,0\n", "the first line is blank; it must name the columns"),
    "workbook": (b"PK\x03\x04\xff,click\n", "is no text, or not in UTF-8"),
    "utf16": ("x,click\na,0\n".encode("utf-16"), "is no text, or not in UTF-8"),
    "header_only": (b"x,click\n", "there is a header and no row"),
    "cut_off": (
        b"x,y,click\na,b,0\na,b,1\na,",
        r"row 3: 2 values where the header names 3 columns; is the file cut off",
    ),
    "ragged": (
        b"x,click\na,0\nb,1,7\n",
        r"row 2: 3 values where the header names 2 columns; text that holds the separator",
    ),
    "open_quote": (b'x,click\na,0\n"b,1\na,0\n', "row 2: 1 value where the header names 2 columns"),
    "latin1": ("x,click\na,0\né,1\n".encode("latin-1"), "row 2: not UTF-8"),
    "latin1_header": ("é,click\na,0\n".encode("latin-1"), "header: byte 0 is not UTF-8"),
    "doubled": (b"x,x,click\na,b,0\n", "'x' names more than one column"),
    "no_label": (b"x,clicks\na,0\n", r"no column 'click' for the label; did you mean 'clicks'\?"),
    "constant": (b"x,click\n" + b"a,0\nb,0\n" * 30, "every row has the label '0'"),
    "three": (b"x,click\n" + b"a,0\nb,1\nc,2\n" * 30, "must have two values, and it has 0, 1, 2"),
    "gap": (b"x,click\n" + b"a,0\nb,\n" * 30, r"row 2, column 'click': the label is missing"),
    "nothing_else": (b"x,click\n" + b",0\n?,1\n" * 30, "no column beside the label has a value"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_csv_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "clicks.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(path, validation_ratio=0.4, test_ratio=0.4, seed=3)
    assert "\n" not in str(error.value)
    assert "clicks.csv" in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_row_numbers_hold_beyond_the_first_block(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("x,click\n" + "value,1\n" * 600_000 + "value\n")
    with pytest.raises(UserError, match="row 600001: 1 value"):
        read(path)


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    table = frame().drop("part")
    train = saved(tmp_path, table)
    bad = table.with_columns(
        pl.when(pl.int_range(pl.len()) == 7)
        .then(pl.lit("cheap"))
        .otherwise(pl.col("price").cast(pl.String))
        .alias("price")
    )
    with pytest.raises(UserError, match=r"test\.csv, row 8, column 'price': 'cheap' is not a finite number"):
        read(train, test=saved(tmp_path, bad, "test.csv"))
    endless = table.with_columns(pl.when(pl.int_range(pl.len()) == 2).then(math.inf).otherwise("price").alias("price"))
    with pytest.raises(UserError, match=r"row 3, column 'price'"):
        read(saved(tmp_path, endless, "endless.csv"))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    fake = tmp_path / "clicks.parquet"
    fake.write_text("x,click\na,0\n")
    with pytest.raises(UserError, match=r"clicks\.parquet: not a readable Parquet file"):
        read(fake)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(saved(tmp_path, frame(), "whole.parquet").read_bytes()[:-200])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(cut)
    zipped = tmp_path / "clicks.csv.gz"
    zipped.write_bytes(gzip.compress(frame(3000).write_csv().encode())[:-500])
    with pytest.raises(UserError, match=r"clicks\.csv\.gz: cannot be read"):
        read(zipped)
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "none.csv")
    (tmp_path / "clicks.xlsx").touch()
    with pytest.raises(UserError, match=r"a \.xlsx file is no table"):
        read(tmp_path / "clicks.xlsx")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"holds no \.parquet file"):
        read(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"column 'x': holds struct"):
        read(saved(tmp_path, pl.DataFrame({"x": [{"a": 1}], "click": [1]}), "nested.parquet"))


def test_a_test_file_must_have_the_columns(tmp_path: Path) -> None:
    train = saved(tmp_path, frame().drop("part"))
    with pytest.raises(UserError, match=r"test\.csv: lacks 'price'"):
        read(train, test=saved(tmp_path, frame().drop("part", "price"), "test.csv"))
    with pytest.raises(UserError, match=r"test\.csv: lacks 'click'"):
        read(train, test=saved(tmp_path, frame().drop("part", "click"), "test.csv"))
    lists = frame(60, 1).with_columns(pl.col("city").str.split("s"))
    with pytest.raises(UserError, match=r"test\.parquet, column 'city': holds lists"):
        read(train, test=saved(tmp_path, lists, "test.parquet"))


def test_splits_need_both_classes(tmp_path: Path) -> None:
    table = frame().with_columns(
        pl.when(pl.col("part") == "validation").then(pl.lit("no")).otherwise("click").alias("click")
    )
    with pytest.raises(UserError, match="all 50 validation rows have click = 'no', so that no AUC can be measured"):
        read(saved(tmp_path, table), split_column="part")


def test_split_columns_are_checked(tmp_path: Path) -> None:
    path = saved(tmp_path, frame())
    with pytest.raises(UserError, match=r"no column 'parts' to split by; did you mean 'part'"):
        read(path, split_column="parts")
    odd = frame().with_columns(pl.col("part").replace("test", "holdout"))
    with pytest.raises(UserError, match=r"row 351, column 'part': 'holdout' is no split"):
        read(saved(tmp_path, odd, "odd.csv"), split_column="part")
    with pytest.raises(UserError, match="a test file is given too"):
        read(path, test=path, split_column="part")
    with pytest.raises(UserError, match="none of its 350 rows is for test; mark some in 'part'"):
        read(saved(tmp_path, frame()[:350], "short.csv"), split_column="part")


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_ratio": 0.0},
        {"validation_ratio": 0.6, "test_ratio": 0.4},
        {"test_ratio": 0.0},
        {"min_count": 0},
        {"num_quantiles": 1},
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(reversed(settings)))):
        read(saved(tmp_path, frame()), **settings)


def test_several_labels_need_a_task_that_takes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is one label here"):
        read(saved(tmp_path, frame()), label="click,city")


def test_quoted_text_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("x,click\n" + '"a, b",0\n"two\nlines",1\n' * 31)
    data = read(path, validation_ratio=0.3, test_ratio=0.3)
    assert set(data.schema.fields[0].words) == {"a, b", "two\nlines"}
    assert sum(data.describe()["rows"].values()) == 62
    assert RawTable(path).count_rows() == 62


# -- the simulated click log ---------------------------------------------------------------------------------


def test_click_log_follows_its_truth() -> None:
    data = ClickLog(ClickLogConfig(test_rows=20_000))
    clicked = everything(data)["test"].label.numpy()
    order = np.argsort(data.truth.probability)
    for group in np.array_split(order, 10):
        # within four standard errors of a proportion
        assert abs(clicked[group].mean() - data.truth.probability[group].mean()) < 4 * 0.5 / math.sqrt(len(group))
    assert data.truth.informative.sum() == 80
    assert data.truth.noise.sum() == 800
    assert not (data.truth.informative & data.truth.noise).any()
    assert data.describe()["interacting fields"] == ["signal_0", "signal_1"]


def test_click_log_is_a_function_of_its_seed() -> None:
    small = {"train_rows": 50, "validation_rows": 50, "test_rows": 50}
    first, again, other = (ClickLog(ClickLogConfig(seed=s, **small)) for s in (0, 0, 1))
    assert same(everything(first)["train"], everything(again)["train"])
    assert not torch.equal(everything(first)["train"].ids, everything(other)["train"].ids)
    with pytest.raises(UserError, match="two informative fields"):
        ClickLog(ClickLogConfig(informative_fields=1))


def test_fields_are_laid_out_in_the_order_of_the_batch() -> None:
    fields = [
        Field("s", "sequence", words=("a",), max_length=2),
        Field("x", "numeric", numeric="standardize"),
        Field("c", "categorical", words=("a", "b")),
    ]
    schema = Schema.lay_out(fields, [])
    assert [(f.name, f.offset, f.size) for f in schema.fields] == [("c", 0, 4), ("x", 4, 1), ("s", 5, 3)]


def _criteo(rows: int, *, labelled: bool = True, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        counts = [str(draw.integers(0, 50)) if draw.random() > 0.2 else "" for _ in range(13)]
        hashed = [f"{draw.integers(4):08x}" if draw.random() > 0.2 else "" for _ in range(26)]
        lines.append("\t".join([str(row % 2)] * labelled + counts + hashed))
    return "\n".join(lines) + "\n"


def test_criteo_logs_need_no_header(tmp_path: Path) -> None:
    path, new = tmp_path / "train.txt", tmp_path / "test.txt"
    path.write_text(_criteo(300))
    new.write_text(_criteo(7, labelled=False, seed=1))
    data = read_table(TableConfig(), Source(path, None, None))
    assert data.spec["labels"] == ["label"]
    assert data.spec["fields"] == [f"I{n}" for n in range(1, 14)] + [f"C{n}" for n in range(1, 27)]
    assert {f.name: f.kind for f in data.schema.fields}["C1"] == "categorical", "though its hashes look like numbers"
    assert sum(len(rows.label) for rows in data.splits.values()) == 300, "the first line is a row"
    assert any("Criteo's layout" in note for note in data.notes)
    assert [len(batch.ids) for batch in read_rows(data.spec, new, 5)] == [5, 2]


def test_a_broken_criteo_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    lines = _criteo(300).splitlines()
    lines[4] = "1\t2\t3"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"row 5: 3 values where Criteo's layout has 40 columns"):
        read_table(TableConfig(), Source(path, None, None))


def test_a_header_that_is_no_criteo_row_stays_a_header(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("\t".join(["label", *(f"c{n}" for n in range(39))]) + "\n" + _criteo(300))
    assert read_table(TableConfig(), Source(path, None, None)).spec["fields"][0] == "c0"


def test_old_line_ends_and_bars_between_cells_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path, frame().drop("tags"))
    plain = everything(read(path))
    for old, new in (("\n", "\r"), (",", "|")):
        (tmp_path / "other.csv").write_bytes(path.read_text().replace(old, new).encode())
        other = everything(read(tmp_path / "other.csv"))
        assert all(same(plain[split], other[split]) for split in plain)


def test_what_other_programs_leave_beside_parts_is_no_part(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "_temporary").mkdir(parents=True)
    frame().write_parquet(folder / "part-0.parquet")
    for name in ("._part-0.parquet", "_temporary/part-1.parquet"):
        (folder / name).write_bytes(b"no Parquet")
    assert RawTable(folder).parts == [folder / "part-0.parquet"]


def test_durations_are_numbers_and_nested_lists_are_refused(tmp_path: Path) -> None:
    long = pl.duration(minutes=pl.int_range(pl.len()))
    (chunk,) = RawTable(saved(tmp_path, frame().select(long.alias("x"), "click"), "a.parquet")).chunks()
    assert chunk.frame["x"].to_list()[:3] == [0.0, 60.0, 120.0]
    nested = frame().select(
        pl.concat_list("price").implode().over("click", mapping_strategy="join").alias("x"), "click"
    )
    with pytest.raises(UserError, match="column 'x': holds large_list"):
        read(saved(tmp_path, nested, "b.parquet"))


def test_settings_from_python_are_checked(tmp_path: Path) -> None:
    path = saved(tmp_path, frame())
    with pytest.raises(UserError, match="numeric='log' must be one of bucket, quantile, standardize, minmax"):
        read(path, numeric="log")
    with pytest.raises(UserError, match="group_column='click' is the label"):
        read(path, group_column="click")
