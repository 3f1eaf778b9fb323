"""RecBole's atomic files: typed headers, users and items joined, ratings cut into labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock.cli import main
from penstock.data.base import Source
from penstock.data.recbole import open_table
from penstock.data.tables import TableConfig, TableData, read_rows, read_table
from penstock.errors import UserError


def atomic(tmp_path: Path, rows: int = 600) -> Path:
    """A small ml-100k: 40 users, 30 items, of which the last of each has no row of its own."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "ml"
    folder.mkdir()
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for row in range(rows):
        user, item = draw.integers(0, 40), draw.integers(0, 30)
        inter.append(f"u{user}\t{item}\t{draw.integers(1, 6)}\t{881250949 + row}")
    users = ["user_id:token\tage:float\tjob:token", *(f"u{n}\t{20 + n}\t{'ab'[n % 2]}" for n in range(39))]
    items = ["item_id:token\tgenre:token_seq\ttimestamp:float\tvector:float_seq"]
    items += [f"{n}\t{'Drama War' if n % 2 else 'Comedy'}\t{n}.5\t0.1 0.2" for n in range(29)]
    for name, lines in (("ml.inter", inter), ("ml.user", users), ("ml.item", items)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read(path: Path, label: str = "rating", **settings: object) -> TableData:
    return read_table(TableConfig(**{"label_threshold": 4, **settings}), Source(path, None, label))  # type: ignore[arg-type]


def test_types_are_kinds(tmp_path: Path) -> None:
    data = read(atomic(tmp_path), numeric="standardize")
    assert {f.name: (f.kind, f.separator) for f in data.schema.fields} == {
        "user_id": ("categorical", ""),
        "item_id": ("categorical", ""),
        "job": ("categorical", ""),
        "timestamp": ("numeric", ""),
        "age": ("numeric", ""),
        "item.timestamp": ("numeric", ""),
        "genre": ("sequence", " "),
    }
    assert any("timestamp of ml.item is called item.timestamp" in note for note in data.notes)
    assert any(note.startswith("vector: ") for note in data.notes)


def test_rows_are_joined_to_their_user_and_item(tmp_path: Path) -> None:
    folder = atomic(tmp_path)
    frame = pl.concat(chunk.frame for chunk in open_table(folder).chunks())
    assert frame.height == 600
    ids, users, items = frame["user_id"].to_list(), frame["age"].to_list(), frame["genre"].to_list()
    assert users == [None if user == "u39" else str(20 + int(user[1:])) for user in ids]
    expected = [None if item == "29" else "Drama War" if int(item) % 2 else "Comedy" for item in frame["item_id"]]
    assert items == expected
    assert open_table(folder / "ml.inter").columns == list(frame.columns)


def test_a_rating_is_cut(tmp_path: Path) -> None:
    folder = atomic(tmp_path)
    data = read(folder)
    rating = pl.concat(chunk.frame for chunk in open_table(folder).chunks())["rating"].cast(pl.Float64)
    labels = np.concatenate([rows.label[:, 0] for rows in data.splits.values()])
    assert labels.sum() == (rating >= 4).sum()
    assert "rating: 'below 4' became 0 and '4 or more' became 1" in data.notes
    with pytest.raises(UserError, match="; a rating becomes a label with label_threshold"):
        read(folder, label_threshold=None)
    with pytest.raises(UserError, match="label_threshold=4 is for a label that is a number, and this is text"):
        read(folder, "user_id")
    with pytest.raises(UserError, match="rating = 'below 9', so that no AUC"):
        read(folder, label_threshold=9)


def test_new_rows_may_come_joined_or_not(tmp_path: Path) -> None:
    folder = atomic(tmp_path)
    data = read(folder)
    joined = next(read_rows(data.spec, folder, 50))
    table = pl.concat(chunk.frame for chunk in open_table(folder).chunks())
    table.write_csv(tmp_path / "flat.csv")
    flat = next(read_rows(data.spec, tmp_path / "flat.csv", 50))
    for a, b in zip(joined[:3], flat[:3], strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ml.inter", "user_id\trating:float\n1\t5\n", "header: 'user_id' has no type; RecBole's read NAME:TYPE"),
        ("ml.inter", "a:token\ta:float\n1\t5\n", "header: 'a' names more than one column"),
        ("ml.user", "id:token\tage:float\n1\t5\n", "shares no column of tokens with ml.inter, as user_id:token"),
        ("ml.user", "user_id:token\tage:float\nu1\t5\nu2\tx\n", "ml.user, row 2, column 'age': 'x' is not a finite"),
        (
            "ml.item",
            "item_id:token\tg:token\n1\ta\n2\tb\n1\tc\n",
            "row 3, column 'item_id': '1' has a row already, row 1",
        ),
        ("other.inter", "user_id:token\n1\n", "holds ml.inter, other.inter; give one of them"),
    ],
)
def test_files_that_cannot_be_joined(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = atomic(tmp_path)
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read(folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_without_a_key_are_joined_to_nothing(tmp_path: Path) -> None:
    folder = atomic(tmp_path)
    with (folder / "ml.user").open("a") as file:
        file.write("\t5\tc\n\t6\td\n")
    with (folder / "ml.inter").open("a") as file:
        file.write("\t3\t5\t1\n")
    last = list(open_table(folder).chunks())[-1].frame.tail(1)
    assert last.select("user_id", "age", "job", "genre").row(0) == (None, None, None, "Drama War")


def test_users_alone_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no interactions; give .*ml\.inter"):
        read(atomic(tmp_path) / "ml.user")


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = atomic(tmp_path), tmp_path / "run"
    flags = ["--label", "rating", "--table.label-threshold", "4", "--train.epochs", "1", "--arms", "gated"]
    assert main(["run", "finalmlp", "--data", str(folder), *flags, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["fields"]["genre"] == 5
    assert main(["predict", str(out), "--data", str(folder / "ml.inter"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 600
