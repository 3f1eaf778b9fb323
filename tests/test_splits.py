"""Splits by time and by user."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock.data.base import Source
from penstock.data.rawtables import RawTable
from penstock.data.tables import TableConfig, TableData, _split_chunks, read_table
from penstock.data.times import times
from penstock.errors import UserError


def table(rows: int = 1000, seed: int = 0) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    second = draw.permutation(rows) // 4  # four rows at a time
    return pl.DataFrame(
        {
            "city": draw.choice(["Oslo", "Rome", "Lima"], rows),
            "user": [f"u{n}" for n in draw.integers(0, 150, rows)],
            "second": second,
            "date": [datetime(2024, 2, 28, 23) + timedelta(minutes=int(n)) for n in second],
            "click": draw.integers(0, 2, rows),
        }
    )


def read(
    tmp_path: Path, frame: pl.DataFrame, name: str = "a.csv", test: Path | None = None, **how: object
) -> TableData:
    path = tmp_path / name
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path)
    return read_table(TableConfig(**how), Source(path, test, "click"))  # type: ignore[arg-type]


def codes(tmp_path: Path, *, has_test: bool = False, name: str = "a.csv", **how: object) -> np.ndarray:  # type: ignore[type-arg]
    config = TableConfig(**how)  # type: ignore[arg-type]
    return np.concatenate([part for _, part in _split_chunks(RawTable(tmp_path / name), config, has_test, "scan")])


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
@pytest.mark.parametrize("column", ["second", "date"])
def test_the_latest_rows_are_the_test(tmp_path: Path, column: str, name: str) -> None:
    frame = table()
    data = read(tmp_path, frame, name, split="time", time_column=column)
    assert {s: len(rows.label) for s, rows in data.splits.items()} == {"train": 800, "validation": 100, "test": 100}
    second = frame["second"].to_numpy()
    np.testing.assert_array_equal(
        codes(tmp_path, name=name, split="time", time_column=column), (second >= 200) + 1 * (second >= 225)
    )
    assert column not in data.spec["fields"]
    assert f"{column} splits the rows and is no feature; name it in a columns file to make it one" in data.notes


def test_rows_of_one_moment_stay_together(tmp_path: Path) -> None:
    read(tmp_path, table(), split="time", time_column="second", validation_ratio=0.0999, test_ratio=0.1001)
    split = codes(tmp_path, split="time", time_column="second", validation_ratio=0.0999, test_ratio=0.1001)
    assert pl.DataFrame({"t": table()["second"], "s": split}).group_by("t").n_unique()["s"].max() == 1


def test_a_time_column_is_a_feature_if_asked(tmp_path: Path) -> None:
    (tmp_path / "columns.yaml").write_text("second: numeric\n")
    data = read(tmp_path, table(), split="time", time_column="second", columns=str(tmp_path / "columns.yaml"))
    assert "second" in data.spec["fields"]
    assert not any("splits the rows" in note for note in data.notes)


def test_beside_a_test_file_time_divides_the_rest(tmp_path: Path) -> None:
    table(100, seed=1).write_csv(tmp_path / "test.csv")
    frame = table()
    data = read(tmp_path, frame, test=tmp_path / "test.csv", split="time", time_column="second")
    assert {s: len(rows.label) for s, rows in data.splits.items()} == {"train": 900, "validation": 100, "test": 100}
    assert codes(tmp_path, has_test=True, split="time", time_column="second").max() == 1


def test_all_rows_of_a_user_are_in_one_split(tmp_path: Path) -> None:
    frame = table()
    data = read(tmp_path, frame, split="user", user_column="user", group_column="user")
    assert "user" not in data.spec["fields"]
    split = codes(tmp_path, split="user", user_column="user")
    found = pl.DataFrame({"user": frame["user"], "split": split})
    assert found.group_by("user").n_unique()["split"].max() == 1
    users = found.unique()["split"].value_counts(sort=True)["count"].to_list()
    assert 0.7 < users[0] / sum(users) < 0.9
    assert (codes(tmp_path, split="user", user_column="user", seed=1) != split).any()
    # A user's split does not depend on who else is there.
    frame[:300].write_csv(tmp_path / "b.csv")
    np.testing.assert_array_equal(codes(tmp_path, name="b.csv", split="user", user_column="user"), split[:300])


def test_dates_of_all_forms(tmp_path: Path) -> None:
    words = ["1970-01-02", "1970-01-01 00:00:10", "1970-01-01T00:00:10.5Z", "1970-01-01T01:00:00+01:00", "19700103"]
    pl.DataFrame({"t": words}).write_csv(tmp_path / "t.csv")
    (chunk,) = RawTable(tmp_path / "t.csv").chunks()
    assert times(chunk, "t").tolist() == [86400, 10, 10.5, 0, 172800]
    zoned = pl.Series("t", [datetime(1970, 1, 2)]).dt.replace_time_zone("UTC")
    zoned.to_frame().write_parquet(tmp_path / "t.parquet")
    (chunk,) = RawTable(tmp_path / "t.parquet").chunks()
    assert times(chunk, "t").tolist() == [86400]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["2024-01-01", "2024-01-02", "31.12.2024"],
            "row 3, column 't': '31.12.2024' is no time; it must be an ISO date",
        ),
        (["1", "2", "2024-01-02"], "row 3, column 't': '2024-01-02' is no time; it must be a number, as seconds since"),
        (
            ["2024-01-01", "", "2024-01-03"],
            "row 2, column 't': the time is missing; a split by time needs one in every",
        ),
        (["1", "inf", "2"], "row 2, column 't': 'inf' is no time"),
    ],
)
def test_times_that_do_not_parse(tmp_path: Path, cells: list[str], message: str) -> None:
    frame = pl.DataFrame({"t": cells, "c": ["a", "b", "c"], "click": [0, 1, 0]})
    with pytest.raises(UserError) as raised:
        read(tmp_path, frame, split="time", time_column="t")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_in_one_part_and_dates_in_another_do_not_mix(tmp_path: Path) -> None:
    for place, cells in enumerate((["1", "2"], ["2024-01-01", "2024-01-02"])):
        pl.DataFrame({"t": cells, "c": ["a", "b"], "click": [0, 1]}).write_parquet(tmp_path / f"{place}.parquet")
    with pytest.raises(UserError, match=r"1\.parquet, row 1, column 't': numbers and dates are mixed"):
        read_table(TableConfig(split="time", time_column="t"), Source(tmp_path, None, "click"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"split": "time"}, "split=time and time_column='': one goes with the other"),
        ({"time_column": "second"}, "split=random and time_column='second': one goes with the other"),
        ({"split": "user", "time_column": "second"}, "split=user and time_column='second'"),
        ({"split": "user", "user_column": "u"}, "no column 'u' to split by; did you mean 'user'?"),
        (
            {"split": "time", "time_column": "second", "split_column": "city"},
            "split_column='city': give one of the two",
        ),
    ],
)
def test_settings_must_go_together(tmp_path: Path, how: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, table(), **how)
    assert message in str(raised.value)


def test_a_missing_user_is_named(tmp_path: Path) -> None:
    frame = table().with_columns(user=pl.when(pl.int_range(pl.len()) == 6).then(None).otherwise("user"))
    with pytest.raises(UserError, match="row 7, column 'user': the user is missing"):
        read(tmp_path, frame, split="user", user_column="user")
