"""A directory of Parquet parts read by two processes: what each keeps, and that everything else is as for one.

Most tests run two threads in the place of the processes, each with its own end of a gloo group.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch.distributed import HashStore

from penstock._version import __version__
from penstock.cli import main
from penstock.data import leaks, ondisk, tables
from penstock.data.base import Source
from penstock.data.parts import Processes, deal, reading_together
from penstock.data.schema import TableBatch
from penstock.data.tables import SPLITS, TableConfig, TableData, read_table
from penstock.errors import UserError
from penstock.lab.store import FORMAT, load, open_run
from penstock.systems.recommendation.optinter.crossed import CrossConfig, CrossedTable

T = TypeVar("T")
SIZES = (300, 90, 410, 0, 200)


def frame(rows: int, draw: np.random.Generator) -> pl.DataFrame:
    item, age = draw.zipf(1.4, rows) % 80, draw.normal(40, 10, rows).round(2)
    click = draw.random(rows) < 1 / (1 + np.exp(-(age - 40) / 5 - (item % 3) + 1))
    return pl.DataFrame(
        {
            "user": [f"u{x}" for x in draw.integers(0, 30, rows)],
            "item": pl.Series([f"i{x}" for x in item], dtype=pl.String),
            "age": pl.Series(age).set(pl.Series(draw.random(rows) < 0.1, dtype=pl.Boolean), None),
            "tags": ["|".join(f"t{x}" for x in draw.integers(0, 9, draw.integers(1, 4))) for _ in range(rows)],
            "day": draw.integers(0, 60, rows),
            "click": click.astype(np.int8),
        },
        schema_overrides={"user": pl.String, "tags": pl.String},
    )


def saved(folder: Path, **changes: Callable[[int, pl.DataFrame], pl.Series]) -> Path:
    """Parts of `SIZES` rows; ``changes`` give columns, from the part's number and its frame."""
    draw, folder = np.random.default_rng(0), folder / "parts"
    folder.mkdir()
    for number, rows in enumerate(SIZES):
        part = frame(rows, draw)
        part = part.with_columns([make(number, part).alias(name) for name, make in changes.items()])
        part.write_parquet(folder / f"{number}.parquet", row_group_size=64)
    return folder


def in_two(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives in each of two processes that read together."""
    store = HashStore()

    def one(rank: int) -> T:
        with reading_together(Processes(store, rank, 2)):
            return work()

    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=60) for future in [pool.submit(one, rank) for rank in range(2)]]


def both(path: Path, **settings: Any) -> tuple[TableData, list[TableData]]:
    """The table as one process reads it, and as two do."""
    config, source = TableConfig(**settings), Source(path, label="click")
    return read_table(config, source), in_two(lambda: read_table(config, source))


def rows_of(*batches: TableBatch) -> NDArray[np.float64]:
    """Rows as numbers, in an order of their own."""
    whole = [torch.cat([batch[part].double().flatten(1) for batch in batches]) for part in (0, 1, 2, 4)]
    rows = torch.cat([*whole, torch.cat([batch.label for batch in batches])[:, None].double()], 1).numpy()
    return rows[np.lexsort(rows.T)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.data.rawtables._BLOCK_ROWS", 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"numeric": "bucket", "group_column": "user"},
        {"numeric": "quantile", "min_count": 1},
        {"numeric": "standardize", "split": "user", "user_column": "user"},
        {"numeric": "minmax", "split": "time", "time_column": "day"},
        {"hash_above": 20},
    ],
)
def test_everything_but_the_rows_is_as_for_one_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    alone, two = both(saved(tmp_path), **settings)
    for data in two:
        assert data.spec == alone.spec
        assert data.describe() == alone.describe()
        assert len(data.splits["train"].label) < 0.7 * alone.num_rows("train")
    for split in SPLITS:
        own = [data.splits[split].batch() for data in two]
        np.testing.assert_array_equal(rows_of(*own), rows_of(alone.splits[split].batch()))


def test_samples_counts_on_disk_and_leaks_are_brought_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_SAMPLE", 100)
    monkeypatch.setattr(tables, "_HELD", 40)
    monkeypatch.setattr(leaks, "_ROWS", 200)
    path = saved(tmp_path, told=lambda number, part: part["click"] * 2.5 + (number == 4) * part["age"].fill_null(0))
    alone, two = both(path, numeric="quantile")
    assert [data.spec for data in two] == [alone.spec] * 2
    assert any("told alone tells click in all" in note for note in alone.notes)
    assert [data.notes for data in two] == [alone.notes] * 2


def test_an_epoch_has_every_row_once_with_one_weight_in_equal_steps(tmp_path: Path) -> None:
    alone, two = both(saved(tmp_path))
    whole = [list(data.train(64, seed=3)) for data in two]
    assert [len(batches) for batches in whole] == [len(alone.train(64, seed=3))] * 2
    assert all(len(data.train(64, seed=3)) == len(whole[0]) for data in two)
    np.testing.assert_array_equal(rows_of(*whole[0], *whole[1]), rows_of(*alone.train(64, seed=3)))
    assert max(len(a.label) + len(b.label) for a, b in zip(*whole, strict=True)) <= 66
    # The mean over processes of each one's mean loss is that of all rows.
    weights = {float(batch.weight[0]) / len(batch.label) for batches in whole for batch in batches}
    assert max(weights) == pytest.approx(min(weights))
    assert max(weights) == pytest.approx(2 * len(whole[0]) / alone.num_rows("train"))
    assert not len(next(iter(two[0].test(64))).weight)


def test_the_order_is_of_seed_epoch_and_rank_and_resumes(tmp_path: Path) -> None:
    data = both(saved(tmp_path))[1][1]
    batches = data.train(64, seed=3)
    first, second = [[b.ids for b in batches] for _ in range(2)]
    assert not torch.equal(first[0], second[0])
    again = data.train(64, seed=3)
    iterator = iter(again)
    for _ in range(4):
        next(iterator)
    resumed = data.train(64, seed=3)
    resumed.load_state_dict(again.state_dict())
    assert all(torch.equal(a, b.ids) for a, b in zip(first[4:], resumed, strict=True))


def test_rows_on_disk_are_divided_too(tmp_path: Path) -> None:
    alone, two = both(saved(tmp_path), memory_mb=0)
    assert all(isinstance(data.train(64, 0), ondisk.DiskBatches) for data in two)
    assert [data.notes for data in two] == [alone.notes] * 2
    own = [batch for data in two for batch in data.train(64, 0)]
    np.testing.assert_array_equal(rows_of(*own), rows_of(*alone.train(64, 0)))


def test_a_split_in_one_part_is_held_whole_by_all(tmp_path: Path) -> None:
    def where(number: int, part: pl.DataFrame) -> pl.Series:
        names = ["test"] if number == 1 else ["train", "valid", "train"]
        return pl.Series([names[row % len(names)] for row in range(len(part))], dtype=pl.String)

    alone, two = both(saved(tmp_path, where=where), split_column="where")
    for data in two:
        assert set(data.shares) == {"train", "validation"}
        assert data.describe() == alone.describe()
        np.testing.assert_array_equal(data.splits["test"].ids, alone.splits["test"].ids)


def test_a_table_of_one_part_is_read_by_all(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    frame(500, np.random.default_rng(0)).write_parquet(folder / "only.parquet")
    alone, two = both(folder)
    for data in two:
        assert not data.shares
        np.testing.assert_array_equal(data.splits["train"].ids, alone.splits["train"].ids)


@pytest.mark.parametrize("what", ["gap", "classes"])
def test_a_fault_in_one_part_ends_all_with_the_same_line(tmp_path: Path, what: str) -> None:
    def click(number: int, part: pl.DataFrame) -> pl.Series:
        if what == "classes":
            return pl.Series([number] * len(part), dtype=pl.Int64)
        return part["click"].set(pl.Series(np.arange(len(part)) == 7), None) if number == 2 else part["click"]

    path, said = saved(tmp_path, click=click), []

    def failing() -> None:
        try:
            read_table(TableConfig(), Source(path, label="click"))
        except UserError as error:
            said.append(str(error))
            raise

    wanted = (
        r"2\.parquet, row 8, column 'click': the label is missing" if what == "gap" else "two values, and it has 0, 1"
    )
    with pytest.raises(UserError, match=wanted):
        in_two(failing)
    assert len(said) == 2
    assert len(set(said)) == 1


def test_what_one_process_cannot_do_ends_the_other(tmp_path: Path) -> None:
    path, turn = saved(tmp_path), count()

    def one_fails() -> TableData:
        if next(turn):
            raise UserError("the disk of this machine is full")
        return read_table(TableConfig(), Source(path, label="click"))

    with pytest.raises(UserError, match="the disk of this machine is full"):
        in_two(one_fails)


def test_crosses_are_those_of_all_rows(tmp_path: Path) -> None:
    source = Source(saved(tmp_path), label="click")

    def crossed() -> CrossedTable:
        return CrossedTable(read_table(TableConfig(), source), CrossConfig(), dim=4)

    alone = crossed()
    for data in in_two(crossed):
        assert data.spec == alone.spec
        assert data.describe() == alone.describe()


def test_parts_are_dealt_evenly() -> None:
    assert deal([10, 10, 10, 10], 2) == [[0, 2], [1, 3]]
    assert deal([1, 6, 1, 4], 2) == [[1], [0, 2, 3]]
    assert deal([0, 0, 5], 3) == [[2], [0], [1]]


# -- the command line --------------------------------------------------------------------------------------------


def run(path: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--label", "click", "--train.epochs", "1", "--train.batch-size", "64", "--accelerator", "cpu"]
    return subprocess.run(
        [sys.executable, "-m", "penstock", "run", "dnn", "--data", str(path), *arguments, "--out", str(out),
         "--devices", "2", "--strategy", "ddp", *more],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_two_processes_test_as_one_does(tmp_path: Path) -> None:
    path, out = saved(tmp_path), tmp_path / "run"
    done = run(path, out, "--table.group-column", "user", "--train.lazy-embeddings")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "each process holds the rows of its own parts: train" in done.stderr
    opened = open_run(out)
    data = opened.system.load_data(opened.config, opened.source)
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == json.loads(json.dumps(data.describe()))
    task = opened.system.task(load(out).eval(), opened.config.train, data)
    metrics = task.new_metrics()
    with torch.no_grad():
        for batch in data.test(64):
            task.update(metrics, task.step(batch)[1], batch)
    for name, value in metrics.compute().items():
        assert results["arms"]["gated"]["metrics"][name]["mean"] == pytest.approx(float(value), abs=1e-6), name


def test_resume_starts_as_many_processes_as_the_run_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"format": FORMAT, "system": "dnn", "version": __version__, "hardware": {"devices": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(about))
    monkeypatch.setattr("penstock.cli._launch", lambda options, arguments: 40 + options.hardware.devices)
    assert main(["run", "dnn", "--resume", str(tmp_path)]) == 42


def test_a_fault_in_one_part_is_one_line_and_code_2(tmp_path: Path) -> None:
    path = saved(tmp_path)
    broken = bytearray((path / "2.parquet").read_bytes())
    broken[4:2000] = bytes(1996)
    (path / "2.parquet").write_bytes(broken)
    done = run(path, tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"penstock: {path / '2.parquet'}: not a readable Parquet file")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
