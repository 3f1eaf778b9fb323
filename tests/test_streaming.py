"""Tables larger than the memory: counted and kept on disk, shuffled by blocks, scored piece by piece, with bars throughout."""

from __future__ import annotations

import errno
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from penstock.cli import main
from penstock.data import ondisk, tables
from penstock.data.base import Source, counted, progress
from penstock.data.loader import Batches
from penstock.data.ondisk import DiskBatches, Store, batches, release
from penstock.data.parts import Peers
from penstock.data.rawtables import RawTable
from penstock.data.schema import Field, Label, Rows, Schema
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.errors import UserError
from penstock.lab.predict import predict, write_frames
from penstock.lab.progress import Reporter
from penstock.tasks.click_prediction import ClickPrediction


def saved(path: Path, rows: int = 3000, *, seed: int = 0) -> Path:
    """A table with columns of few and of many words, numbers and sequences."""
    draw = np.random.default_rng(seed)
    table = pl.DataFrame(
        {
            "few": draw.choice(["a", "b", "c"], rows),
            "many": [f"w{int(x)}" for x in draw.zipf(1.3, rows) % 5000],
            "count": draw.integers(-3, 400, rows),
            "tags": ["|".join(draw.choice(["x", "y", "z", "q"], draw.integers(1, 4))) for _ in range(rows)],
            "click": draw.integers(0, 2, rows),
        }
    )
    table.write_parquet(path) if path.suffix == ".parquet" else table.write_csv(path)
    return path


def read(path: Path, **settings: object) -> TableData:
    return read_table(TableConfig(**settings), Source(path, None, "click"))  # type: ignore[arg-type]


# -- rows on disk --------------------------------------------------------------------------------------------


def stored(folder: Path | None, rows: int, fields: int = 2) -> Rows:
    """Rows whose first id is their number."""
    schema = Schema.lay_out([Field(f"c{i}", "categorical") for i in range(fields)], [Label("y", ("0", "1"))])
    store = Store(schema, rows, folder)
    for part in np.array_split(np.arange(rows, dtype=np.int32), 3):
        ids = np.tile(part[:, None], (1, fields))
        empty = np.empty((len(part), 0), np.float32)
        label = (part[:, None] % 7 == 0).astype(np.float32)
        store.append(Rows(ids, empty, np.empty((len(part), 0, 0), np.int32), label, np.empty((len(part), 0), np.int64)))
    return store.finish()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a block, eight blocks a window."""
    monkeypatch.setattr(ondisk, "_BLOCK_BYTES", 10 * 12)
    monkeypatch.setattr(ondisk, "_WINDOW", 8)
    monkeypatch.setattr(ondisk, "_AHEAD", 2)


def order(found: Batches) -> Tensor:
    """The numbers of an epoch's rows."""
    return torch.cat([batch.ids[:, 0] for batch in found])


def test_rows_on_disk_make_the_same_batches_in_order(tmp_path: Path, small_blocks: None) -> None:
    here, there = (batches(stored(folder, 1003), 64) for folder in (None, tmp_path / "rows"))
    assert isinstance(there, DiskBatches)
    assert len(here) == len(there) == 16
    for a, b in zip(here, there, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("size", [1003, 1000, 80, 81, 7, 1])
def test_every_row_comes_once_an_epoch_in_another_order(tmp_path: Path, small_blocks: None, size: int) -> None:
    rows = stored(tmp_path / "rows", size)
    epochs = batches(rows, 32, shuffle=True, seed=3)
    first, second = order(epochs), order(epochs)
    for epoch in (first, second):
        assert torch.equal(epoch.sort().values, torch.arange(size))
    assert torch.equal(first, order(batches(rows, 32, shuffle=True, seed=3)))
    if size > 7:
        assert not torch.equal(first, second)
        assert not torch.equal(first, order(batches(rows, 32, shuffle=True, seed=4)))


def test_labels_stay_with_their_rows(tmp_path: Path, small_blocks: None) -> None:
    for batch in batches(stored(tmp_path / "rows", 1003), 32, shuffle=True):
        assert torch.equal(batch.label, (batch.ids[:, 1] % 7 == 0).float())


def test_a_window_has_blocks_from_everywhere_and_mixes_their_rows(tmp_path: Path, small_blocks: None) -> None:
    found = order(batches(stored(tmp_path / "rows", 10_000), 100, shuffle=True))
    for window in found.split(80):
        places = window.sort().values
        assert int((places.diff() != 1).sum()) + 1 <= 9, "eight blocks, one of them cut by the end of the ring"
        assert int(places[-1] - places[0]) > 2000, "from everywhere"
        assert int((window.diff() == 1).sum()) < 10, "rows of a block are not in order any more"


def test_blocks_are_cut_elsewhere_in_each_epoch(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ondisk, "_WINDOW", 1)
    epochs = batches(stored(tmp_path / "rows", 1000), 10, shuffle=True)
    assert len({int(order(epochs)[:10].min()) % 10 for _ in range(20)}) > 3


@pytest.mark.parametrize("stop", [1, 3, 9])
def test_an_epoch_goes_on_where_it_stopped(tmp_path: Path, small_blocks: None, stop: int) -> None:
    rows = stored(tmp_path / "rows", 1003)
    whole, before, after = (batches(rows, 32, shuffle=True) for _ in range(3))
    first, expected = order(whole), order(whole)
    assert torch.equal(order(before), first)
    list(itertools.islice(before, stop))
    after.load_state_dict(before.state_dict())
    assert torch.equal(order(after), expected[32 * stop :])
    assert torch.equal(order(after), order(whole))


def test_processes_share_the_batches_of_one(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stored(tmp_path / "rows", 1003)
    alone = [batch.ids[:, 0] for batch in batches(rows, 32, shuffle=True)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append([batch.ids[:, 0] for batch in batches(rows, 32, shuffle=True)])
    for batch, shares in zip(alone, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(shares).sort().values, batch.sort().values)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what is mapped from /proc")
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_leaves_nothing_mapped_in_memory(tmp_path: Path, shuffle: bool) -> None:
    rows = stored(tmp_path / "rows", 100_000, fields=39)
    assert rows.ids.sum() > 0
    assert _mapped_mb(tmp_path) > 10
    release(rows)
    for batch in batches(rows, 20_000, shuffle=shuffle):
        assert len(batch.ids) == 20_000
        assert _mapped_mb(tmp_path) < 1


def _mapped_mb(folder: Path) -> float:
    """What the files of a folder take up in this process's memory."""
    total, ours = 0.0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) / 1024
    return total


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(Schema.lay_out([Field("c", "categorical")], [Label("y")]), 3, tmp_path / "rows")
    store.paths = [Path("/dev/full")] * 5
    nothing = np.zeros((3, 0), np.float32)
    row = Rows(np.zeros((3, 1), np.int32), nothing, np.zeros((3, 0, 0), np.int32), np.zeros((3, 1), np.float32))
    with pytest.raises(UserError, match="the disk is full; set TMPDIR"):
        store.append(row)
    monkeypatch.setattr(tables, "_HELD", 0)
    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(UserError, match="the disk is full; set TMPDIR"):
        read(saved(tmp_path / "clicks.csv"))


# -- counting on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 50, 300])
def test_words_counted_on_disk_are_those_counted_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = saved(tmp_path / "clicks.csv")
    monkeypatch.setattr("penstock.data.rawtables._BLOCK_BYTES", 1 << 12)
    expected = read(path)
    monkeypatch.setattr(tables, "_HELD", limit)
    spills = []
    spill = tables._Counts.spill
    monkeypatch.setattr(tables._Counts, "spill", lambda self: (spills.append(self), spill(self)))
    assert read(path).schema == expected.schema
    assert len(spills) > 3


def test_order_is_by_count_then_first_sight(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    counts = tables._Counts(tmp_path / "counts")
    seen: list[str | None] = []
    for number in range(20):
        words = [None if x % 17 == 0 else f"w{x}" for x in draw.zipf(1.5, 300) % 400]
        counts.add(pl.Series(words, dtype=pl.String), number)
        seen += words
        if number % 6 == 5:
            counts.spill()
    tally = Counter(word for word in seen if word is not None)  # holds words in the order of first sight
    expected = sorted((word for word in tally if tally[word] >= 2), key=lambda word: -tally[word])
    assert list(counts.words(2, Peers())) == expected
    assert len({tally[word] for word in expected}) < len(expected), "some are tied"


def test_the_largest_column_is_the_one_put_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_HELD", 300)
    spilled = set()
    spill = tables._Counts.spill
    monkeypatch.setattr(tables._Counts, "spill", lambda self: (spilled.add(self.folder.name), spill(self)))
    read(saved(tmp_path / "clicks.parquet"))
    assert spilled == {"1"}


# -- predictions piece by piece --------------------------------------------------------------------------------


def pieces(count: int, *, fails: bool = False) -> Iterator[pl.DataFrame]:
    yield pl.DataFrame(schema={"row": pl.Int64, "score": pl.Float64, "says": pl.String})
    for number in range(count):
        rows = range(3 * number + 1, 3 * number + 4)
        yield pl.DataFrame({"row": rows, "score": [0.5, 0.25, None], "says": ["a,b", 'c"', None]})
    if fails:
        raise UserError("row 31: is not a number")


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_predictions_are_written_piece_by_piece(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"scores{ending}"
    assert write_frames(pieces(4), path) == 12
    reader = {".csv": pl.read_csv, ".parquet": pl.read_parquet, ".jsonl": pl.read_ndjson}[ending]
    assert reader(path).equals(pl.concat(pieces(4)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_predictions_that_fail_leave_no_file(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UserError, match="row 31"):
        write_frames(pieces(10, fails=True), tmp_path / f"scores{ending}")
    assert not list(tmp_path.iterdir())


def test_a_wrong_output_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    def never() -> Iterator[pl.DataFrame]:
        raise AssertionError("asked for predictions")
        yield

    with pytest.raises(UserError, match=r"end it in \.csv, \.parquet, \.jsonl"):
        write_frames(never(), tmp_path / "scores.txt")
    with pytest.raises(UserError, match="does not exist"):
        write_frames(never(), tmp_path / "none" / "scores.csv")


def test_row_groups_of_parquet_are_not_those_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.lab.predict._GROUP_ROWS", 10)
    path = tmp_path / "scores.parquet"
    write_frames(pieces(9), path)
    found = pyarrow.parquet.read_metadata(path)
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [12, 12, 3]


class Sum(nn.Module):
    """Scores a row by its ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.01))

    def forward(self, ids: Tensor, *others: Tensor) -> Tensor:
        return self.scale * ids.sum(1)


def test_a_table_is_scored_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "clicks.csv")
    spec = read(path).spec
    monkeypatch.setattr("penstock.data.rawtables._BLOCK_BYTES", 1 << 12)
    read_rows: list[int] = []
    chunks = RawTable._csv_frames

    def counting(self: RawTable, columns: list[str]) -> Iterator[pl.DataFrame]:
        for frame in chunks(self, columns):
            read_rows.append(frame.height)
            yield frame

    monkeypatch.setattr(RawTable, "_csv_frames", counting)
    frames = ClickPrediction.predict_frames(Sum(), spec, path)
    first = list(itertools.islice(frames, 1))
    assert len(read_rows) == 1, "the first block of the file is scored before the second is read"
    whole = pl.concat([*first, *frames])
    assert len(read_rows) > 5
    assert whole["row"].to_list() == list(range(1, 3001))
    again = ClickPrediction.predict_file(Sum(), spec, path, batch_size=100)
    np.testing.assert_allclose(whole["score"].to_numpy(), again["score"].to_numpy(), rtol=1e-6)


def test_a_table_without_rows_gives_a_header(tmp_path: Path) -> None:
    spec = read(saved(tmp_path / "clicks.csv")).spec
    empty = tmp_path / "empty.csv"
    empty.write_text("few,many,count,tags,click\n")
    assert write_frames(ClickPrediction.predict_frames(Sum(), spec, empty), tmp_path / "scores.csv") == 0
    assert (tmp_path / "scores.csv").read_text() == "row,score\n"


# -- bars ----------------------------------------------------------------------------------------------------


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.bars: list[tuple[str, int]] = []
        self.steps: list[list[tuple[int, str]]] = []

    @contextmanager
    def bar(self, title: str, total: int, *, announce: bool = True) -> Iterator[None]:
        self.bars.append((title, total))
        self.steps.append([])
        yield

    def advance(self, step: int, note: str) -> None:
        self.steps[-1].append((step, note))


@pytest.fixture
def heard() -> Iterator[Heard]:
    found = Heard()
    token = progress.set(found)
    yield found
    progress.reset(token)


def test_reading_says_how_far_it_is(tmp_path: Path, heard: Heard) -> None:
    spec = read(saved(tmp_path / "clicks.parquet")).spec
    expected = [("scan clicks.parquet", 3000), ("count the values of clicks.parquet", 3000)]
    assert heard.bars == [*expected, ("encode clicks.parquet", 3000)]
    assert all(steps[-1] == (3000, "") for steps in heard.steps)
    list(ClickPrediction.predict_frames(Sum(), spec, tmp_path / "clicks.parquet"))
    assert heard.bars[-1] == ("predict clicks.parquet", 3000)


def test_rows_of_a_text_file_are_known_once_it_was_read(tmp_path: Path, heard: Heard) -> None:
    read(saved(tmp_path / "clicks.csv"))
    assert [total for _, total in heard.bars] == [0, 3000, 3000]
    assert heard.steps[0][-1] == (3000, "3,000 rows")


def test_nobody_need_listen(tmp_path: Path) -> None:
    with counted("something", 3) as advance:
        advance(3)


def test_bars_are_for_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "clicks.csv")
    for terminal in (True, False):
        reporter, shown = Reporter(), io.StringIO()
        reporter.console = Console(file=shown, force_terminal=terminal)
        with reporter.reading():
            read(path)
        assert ("encode clicks.csv" in shown.getvalue()) == terminal
        assert progress.get() is None
    monkeypatch.setattr("penstock.lab.progress._LONG", 0.0)
    with reporter.reading():
        read(path)
    assert "encode clicks.csv: done in" in shown.getvalue()
    assert "..." not in shown.getvalue()


def test_a_run_shows_reading_training_and_testing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(Reporter, "bar", lambda self, *given, **more: heard.bar(*given))
    monkeypatch.setattr(Reporter, "advance", lambda self, *given: heard.advance(*given))
    flags = ["--label", "click", "--arms", "ungated", "--train.epochs", "1", "--data", str(saved(tmp_path / "c.csv"))]
    assert main(["run", "finalmlp", *flags, "--out", str(tmp_path / "run")]) == 0
    titles = [title for title, _ in heard.bars]
    wanted = ["scan c.csv", "count the values of c.csv", "encode c.csv", "ungated seed 0 train", "ungated seed 0 test"]
    assert [title for title in titles if title in wanted] == wanted, "each once, in this order"
    test = heard.bars[titles.index("ungated seed 0 test")]
    assert heard.steps[titles.index("ungated seed 0 test")][-1] == (test[1], "")
    scores = tmp_path / "scores.parquet"
    assert main(["predict", str(tmp_path / "run"), "--data", str(tmp_path / "c.csv"), "--output", str(scores)]) == 0
    assert heard.bars[-1][0] == "predict c.csv"
    assert pl.read_parquet(scores).height == 3000


def test_scores_in_half_precision_are_near_and_refused_where_nothing_is_gained(tmp_path: Path) -> None:
    table = saved(tmp_path / "clicks.parquet")
    flags = ["--data", str(table), "--arms", "ungated", "--train.epochs", "1", "--quick", "--json"]
    for name in ("finalmlp", "optfs"):
        more = ["--backbone", "fm"] if name == "optfs" else []
        assert main(["run", name, *flags, *more, "--out", str(tmp_path / name)]) == 0
    full, half = (predict(tmp_path / "finalmlp", table, precision=how)["score"] for how in ("32", "bf16"))
    assert 0 < float((full - half).abs().max()) < 0.01  # type: ignore[arg-type]
    with pytest.raises(UserError, match="optfs has no layer that would be quicker"):
        predict(tmp_path / "optfs", table, precision="bf16")
