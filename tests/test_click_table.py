"""The made-up click log: the shape it promises, the truth in it, and parts that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from penstock.data.base import Source
from penstock.data.clicktable import CriteoLike
from penstock.data.rawtables import CRITEO
from penstock.data.tables import TableConfig, read_table
from penstock.errors import UserError
from tools.click_table import main, write


def table(log: CriteoLike, part: int, rows: int) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(pa.Table.from_batches(log.blocks(part, rows))))


@pytest.fixture(scope="module")
def log() -> CriteoLike:
    return CriteoLike(seed=3)


def test_it_has_the_shape_of_criteo(log: CriteoLike) -> None:
    rows = table(log, 0, 100_000)
    assert rows.columns == ["click", *CRITEO[1:]]
    assert rows["click"].mean() == pytest.approx(0.2562, abs=0.01)
    assert rows["C3"].str.contains("^[0-9a-f]{8}$").all()
    assert (rows["C9"].n_unique(), rows["C6"].n_unique()) == (3, 16)
    assert rows["C3"].n_unique() > 30_000
    assert rows["I12"].null_count() == pytest.approx(77_000, rel=0.02)
    # Zipf: the commonest word of V has a share of about ln 2 / ln(V + 1).
    top = rows["C6"].value_counts(sort=True)["count"][0] / rows.height
    assert top == pytest.approx(np.log(2) / np.log(17), abs=0.01)


def test_no_two_words_of_a_column_are_alike(log: CriteoLike) -> None:
    for column in log.columns:
        assert len(column.words.unique()) == len(column.words)


def test_rows_are_a_function_of_seed_and_part(log: CriteoLike) -> None:
    one = table(log, 1, 70_000)
    assert one.equals(table(CriteoLike(seed=3), 1, 70_000))
    assert one[:65_536].equals(table(log, 1, 65_536)), "blocks do not hang together"
    assert not one["C1"].equals(table(log, 0, 70_000)["C1"])
    assert not one["C1"].equals(table(CriteoLike(seed=4), 1, 70_000)["C1"])
    with pytest.raises(UserError, match="seed=-1"):
        CriteoLike(-1)


def test_words_tell_of_clicks_and_two_together_tell_more(log: CriteoLike) -> None:
    rows = table(log, 0, 400_000)
    alone = _spread(rows, ["C25"]) + _spread(rows, ["C8"])
    assert _spread(rows, ["C25"]) > 0.001
    assert _spread(rows, ["C25", "C8"]) > 1.2 * alone


def _spread(rows: pl.DataFrame, by: list[str]) -> float:
    """Variance of the share of clicks between the values of some columns."""
    groups = rows.group_by(by).agg(pl.len(), pl.col("click").mean()).filter(pl.col("len") > 500)
    weights = groups["len"].to_numpy()
    return float(np.cov(groups["click"].to_numpy(), fweights=weights))


def test_parts_are_one_table(tmp_path: Path) -> None:
    parts = write(tmp_path / "log", 2500, part_rows=1000)
    assert [pl.read_parquet(part).height for part in parts] == [1000, 1000, 500]
    data = read_table(TableConfig(), Source(tmp_path / "log", None, "click"))
    assert sum(data.describe()["rows"].values()) == 2500
    with pytest.raises(UserError, match="is there already"):
        write(tmp_path / "log", 10)


def test_a_part_that_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CriteoLike.blocks

    def breaks(self: CriteoLike, part: int, rows: int) -> Iterator[pa.RecordBatch]:
        yield from whole(self, part, rows)
        if part == 1:
            raise OSError("the disk is full")

    monkeypatch.setattr(CriteoLike, "blocks", breaks)
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "log", 20, part_rows=10)
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["part-00000.parquet"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["click_table", str(tmp_path / "log"), "--rows", "30"])
    assert main() == 0
    assert main() == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["click_table", str(tmp_path / "none"), "--rows", "0"])
    assert main() == 2
    assert not (tmp_path / "none").exists()
