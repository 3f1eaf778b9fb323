"""Tables that are not what they seem: changed since training, full of gaps, leaking the label, with mixed separators."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock.cli import main
from penstock.data.base import Source
from penstock.data.tables import TableConfig, TableData, read_rows, read_table
from penstock.errors import UserError


def table(rows: int = 400, seed: int = 0) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "city": draw.choice(["Oslo", "Rome", "Lima"], rows),
            "user_id": draw.integers(0, 300, rows),
            "price": draw.uniform(5, 25, rows),
            "tags": ["|".join(draw.choice(["a", "b", "c"], 3)) for _ in range(rows)],
            "click": draw.integers(0, 2, rows),
        }
    )


def read(tmp_path: Path, frame: pl.DataFrame, columns: str = "{}", **how: object) -> TableData:
    (tmp_path / "columns.yaml").write_text(columns, encoding="utf-8")
    frame.write_csv(tmp_path / "clicks.csv")
    config = TableConfig(columns=str(tmp_path / "columns.yaml"), **how)  # type: ignore[arg-type]
    return read_table(config, Source(tmp_path / "clicks.csv", None, "click"))


def warnings(data: TableData) -> list[str]:
    return [note for note in data.notes if note.startswith("warning: ")]


# -- changed since training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit("dear").alias("price"), "column 'price': holds text, as 'dear', where the training table has numbers"),
        (pl.col("city").str.split("s"), "column 'city': holds lists, where the training table has one value a row"),
        (pl.concat_list("price"), "column 'price': holds lists, where the training table has numbers"),
        (pl.lit(7).alias("city"), "column 'city': holds numbers, as 7, where the training table has words, as '"),
        (pl.col("tags").str.replace_all("|", "^", literal=True), "', where the training table divides by '|'"),
        ([pl.lit("x").alias("price"), pl.lit(7).alias("city")], "'; column 'price': holds text, as 'x', where"),
    ],
)
def test_changed_columns_are_named(tmp_path: Path, change: pl.Expr, message: str) -> None:
    data = read(tmp_path, table(seed=4))
    table(20).with_columns(change).write_parquet(tmp_path / "new.parquet")
    with pytest.raises(UserError) as raised:
        next(read_rows(data.spec, tmp_path / "new.parquet", 10))
    assert str(raised.value).startswith(f"{tmp_path / 'new.parquet'}, column ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_new_columns_lists_and_gaps_are_no_change(tmp_path: Path) -> None:
    data = read(tmp_path, table())
    new = table(20, seed=1)
    plain = new.with_columns(more=pl.lit("x"))
    lists = new.with_columns(pl.col("tags").str.split("|"), extra=1)
    for name, frame in (("a.csv", plain), ("b.parquet", lists)):
        frame.write_csv(tmp_path / name) if name == "a.csv" else frame.write_parquet(tmp_path / name)
    a, b = (next(read_rows(data.spec, tmp_path / name, 20)) for name in ("a.csv", "b.parquet"))
    assert a.ids.equal(b.ids)
    assert a.sequences.equal(b.sequences)
    new.with_columns(price=pl.lit(None, pl.String), tags=pl.lit("a")).write_parquet(tmp_path / "c.parquet")
    gone = next(read_rows(data.spec, tmp_path / "c.parquet", 20))
    place = data.spec["fields"].index("price")
    assert gone.ids[:, place].eq(data.spec["offsets"][place]).all()


def test_predict_says_in_one_line_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, table())
    flags = ["--data", str(tmp_path / "clicks.csv"), "--label", "click", "--arms", "gated", "--train.epochs", "1"]
    assert main(["run", "finalmlp", *flags, "--out", str(tmp_path / "run"), "--json"]) == 0
    table(20).with_columns(price=pl.lit("dear")).write_csv(tmp_path / "new.csv")
    capsys.readouterr()
    out = tmp_path / "scores.csv"
    assert main(["predict", str(tmp_path / "run"), "--data", str(tmp_path / "new.csv"), "--output", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "column 'price': holds text, as 'dear'" in said[0]
    assert not out.exists()


# -- gaps ----------------------------------------------------------------------------------------------------


def test_columns_of_gaps_are_noted(tmp_path: Path) -> None:
    some = pl.int_range(pl.len())
    frame = table().with_columns(
        price=pl.when(some % 10 < 3).then("price"),
        user_id=pl.when(some % 2 == 0).then("user_id"),
    )
    notes = read(tmp_path, frame).notes
    assert "price: 70% of its values are missing" in notes
    assert not any(note.startswith("user_id: ") for note in notes)


def test_a_column_of_numbers_but_for_some_cells_is_noted(tmp_path: Path) -> None:
    price = (
        pl.when(pl.int_range(pl.len()) == 17)
        .then(pl.lit("n.a."))
        .otherwise(pl.col("price").cast(pl.String))
        .alias("price")
    )
    notes = read(tmp_path, table().with_columns(price)).notes
    assert (
        "price is nearly all numbers, but not 'n.a.' in row 18 of clicks.csv; it is read as words: clear such"
        in str(notes)
    )
    assert not any("nearly" in note for note in read(tmp_path, table().with_columns(price), "price: categorical").notes)


def test_a_column_of_which_no_value_is_seen_again_is_noted(tmp_path: Path) -> None:
    frame = table().with_columns(key=pl.format("k{}", pl.int_range(pl.len())))
    (note,) = [note for note in read(tmp_path, frame).notes if note.startswith("key: ")]
    assert "none of its values is seen 2 times in training" in note
    assert not any(note.startswith("key: ") for note in read(tmp_path, frame, min_count=1).notes)


# -- leaks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leak", "auc"),
    [
        (pl.col("click") * 10.5 + pl.col("price") / 25, "1.0"),  # as a number
        (-pl.col("click") * 10.5 + pl.col("price") / 25, "0.0"),
        (pl.when(pl.col("click") == 1).then("price"), "1.0"),  # as a gap
        (pl.when(pl.col("click") == 0).then(pl.lit("no")).otherwise(pl.lit("yes")), "1.0"),
        (pl.when(pl.col("click") == 0).then(pl.lit(None)).otherwise("city"), "1.0"),
        (pl.format("{}{}", "click", "city"), "1.0"),
    ],
)
def test_a_column_that_is_the_label_is_named(tmp_path: Path, leak: pl.Expr, auc: str) -> None:
    data = read(tmp_path, table().with_columns(leak=leak))
    (warning,) = warnings(data)
    assert warning.startswith("warning: leak alone tells click in all 3")
    assert f"(AUC {auc})" in warning
    assert not warnings(read(tmp_path, table().with_columns(leak=leak), "leak: drop"))


def test_strong_or_unique_columns_are_no_leak(tmp_path: Path) -> None:
    number = pl.int_range(pl.len())
    frame = table().with_columns(
        strong=pl.when(number % 50 == 7).then(1 - pl.col("click")).otherwise("click") * 10.5 + pl.col("price") / 25,
        row_id=number,  # each its own label, and of no use on another row
        name=pl.format("row {}", number),
    )
    assert not warnings(read(tmp_path, frame))


def test_few_rows_prove_nothing(tmp_path: Path) -> None:
    frame = pl.DataFrame({"c": ["a", "b"] * 9, "click": [0, 1] * 9, "part": ["train"] * 12 + ["val", "test"] * 3})
    frame = frame.with_columns(click=pl.Series([0, 1] * 6 + [0, 0, 1, 1, 0, 1]))
    assert not warnings(read(tmp_path, frame, split_column="part"))


def test_a_leak_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, table().with_columns(clicked_at=pl.when(pl.col("click") == 1).then("price")))
    flags = ["--data", str(tmp_path / "clicks.csv"), "--label", "click", "--arms", "gated", "--train.epochs", "1"]
    assert main(["run", "finalmlp", *flags, "--out", str(tmp_path / "run"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["data"]["notes"]
    assert any(note.startswith("warning: clicked_at alone tells click") for note in notes)


# -- sequences and labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["a^b", "a,b"])
def test_mixed_separators_are_named(tmp_path: Path, odd: str) -> None:
    frame = table().with_columns(tags=pl.when(pl.int_range(pl.len()) == 16).then(pl.lit(odd)).otherwise("tags"))
    with pytest.raises(UserError) as raised:
        read(tmp_path, frame)
    assert str(raised.value) == (
        f"{tmp_path / 'clicks.csv'}, row 17, column 'tags': {odd!r} is divided by {odd[1]!r} and others by '|'; "
        'say `tags: {kind: sequence, separator: "|"}` in a columns file'
    )
    data = read(tmp_path, frame, 'tags: {kind: sequence, separator: "|"}')
    assert data.spec["num_sequences"] == 1


@pytest.mark.parametrize("cell", ["a|b,c", "Rome, Italy", "one"])
def test_separators_that_do_not_mix(tmp_path: Path, cell: str) -> None:
    frame = table().with_columns(tags=pl.when(pl.int_range(pl.len()) == 16).then(pl.lit(cell)).otherwise("tags"))
    assert read(tmp_path, frame).spec["num_sequences"] == 1


def test_a_label_of_three_words_is_refused(tmp_path: Path) -> None:
    frame = table().with_columns(click=pl.Series(["no", "yes", "maybe", "no"] * 100))
    with pytest.raises(UserError) as raised:
        read(tmp_path, frame)
    assert str(raised.value).endswith("column 'click': a label must have two values, and it has maybe, no, yes")
