"""Tables that FuxiCTR has encoded: ids, words and splits are taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from penstock.cli import main
from penstock.data.base import Source
from penstock.data.tables import TableConfig, TableData, read_rows, read_table
from penstock.errors import UserError

FEATURES: list[dict[str, dict[str, Any]]] = [
    {"user": {"type": "meta"}},
    {"price": {"source": "", "type": "numeric"}},
    {"city": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 5}},
    {
        "history": {
            "source": "",
            "type": "sequence",
            "share_embedding": "item",
            "feature_encoder": "layers.MaskedAveragePooling()",
            "padding_idx": 0,
            "max_len": 3,
            "vocab_size": 9,
        }
    },
    {"item": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 9}},
    {"image": {"type": "embedding", "pretrain_dim": 4}},
]


def folder(tmp_path: Path, *, features: object = FEATURES, parts: bool = False) -> Path:
    """As FuxiCTR 2.3 leaves it: padding in front, ids from 1, the unseen word last."""
    path = tmp_path / "tiny_x1"
    path.mkdir(parents=True)
    content = {"dataset_id": "tiny_x1", "num_fields": 4, "labels": ["click"], "features": features}
    (path / "feature_map.json").write_text(json.dumps(content))
    cities = {"__PAD__": 0, "Oslo": 1, "Rome": 2, "Lima": 3, "__OOV__": 4}
    items = {"__PAD__": 0, **{f"i{n}": n for n in range(1, 8)}, "__OOV__": 8}
    (path / "feature_vocab.json").write_text(json.dumps({"city": cities, "item": items, "history": items}))
    draw = np.random.default_rng(0)
    for split, rows in (("train", 300), ("valid", 100), ("test", 100)):
        histories = [[0] * (3 - n) + draw.integers(1, 9, n).tolist() for n in draw.integers(0, 4, rows)]
        frame = pl.DataFrame(
            {
                "user": draw.integers(1, 20, rows),
                "price": draw.normal(size=rows),
                "city": draw.integers(1, 5, rows),
                "history": histories,
                "item": draw.integers(1, 9, rows),
                "click": draw.integers(0, 2, rows).astype(float),
            }
        )
        if parts:
            (path / split).mkdir()
            frame[: rows // 2].write_parquet(path / split / "part-000000.parquet")
            frame[rows // 2 :].write_parquet(path / split / "part-000001.parquet")
        else:
            frame.write_parquet(path / f"{split}.parquet")
    return path


def read(path: Path, label: str | None = None, test: Path | None = None, **settings: object) -> TableData:
    return read_table(TableConfig(**settings), Source(path, test, label))  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [False, True])
def test_ids_are_taken_over(tmp_path: Path, parts: bool) -> None:
    path = folder(tmp_path, parts=parts)
    data = read(path)
    assert {s: len(rows.label) for s, rows in data.splits.items()} == {"train": 300, "validation": 100, "test": 100}
    city, item, price, history = data.schema.fields
    assert [f.name for f in data.schema.fields] == ["city", "item", "price", "history"]
    assert (city.offset, item.offset, price.offset, history.offset) == (0, 5, 14, 5)
    assert data.spec["num_ids"] == 15
    given = pl.read_parquet(path / ("test/*.parquet" if parts else "test.parquet"))
    batch = data.splits["test"].batch()
    assert (batch.ids - np.array([0, 5])).tolist() == given.select("city", "item").to_numpy().tolist()
    np.testing.assert_allclose(batch.numeric[:, 0], given["price"], rtol=1e-6)
    assert batch.label.tolist() == given["click"].to_list()
    for row, expected in zip((batch.sequences[:, 0] - 5).tolist(), given["history"].to_list(), strict=True):
        items = [i for i in expected if i]
        assert row == items + [0] * (3 - len(items))
    assert data.schema.locate(2) == ("city", "Rome")
    assert data.schema.locate(13) == ("item", "(unseen)")
    assert any("image, of type embedding" in note for note in data.notes)


def test_words_need_not_be_known(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "feature_vocab.json").unlink()
    assert read(path / "feature_map.json").schema.locate(2) == ("city", "(id 2)")


def test_groups_come_from_a_column_of_type_meta(tmp_path: Path) -> None:
    data = read(folder(tmp_path), group_column="user")
    assert data.spec["group"] == "user"
    assert len(np.unique(data.splits["test"].batch().group)) > 10


def test_what_cannot_be_taken_over(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(UserError, match=r"feature_map.json: no label 'clik'; did you mean 'click'\?"):
        read(path, "clik")
    frame = pl.read_parquet(path / "test.parquet")
    with pytest.raises(UserError, match="holds several tables; give one of them"):
        next(read_rows(read(path).spec, path, 10))
    (path / "valid.parquet").rename(path / "valid_part_0.h5")
    with pytest.raises(UserError, match=r"holds valid_part_0.h5 and no valid.parquet; FuxiCTR before version 2.3"):
        read(path)
    frame.write_parquet(path / "valid.parquet")
    frame.with_columns(city=pl.Series([*range(1, 4), 5] * 25)).write_parquet(path / "test.parquet")
    with pytest.raises(UserError, match=r"test.parquet, row 4, column 'city': '5' is no id from 0 to 4"):
        read(path)
    frame.drop("city").write_parquet(path / "test.parquet")
    with pytest.raises(UserError, match="lacks 'city'"):
        read(path)
    (path / "test.parquet").unlink()
    (path / "valid_part_0.h5").unlink()
    with pytest.raises(UserError, match=r"neither test.parquet nor test/"):
        read(path)
    assert len(read(path, test=path / "valid.parquet").splits["test"].label) == 100


@pytest.mark.parametrize("settings", [{"columns": "a.yaml"}, {"split": "time", "time_column": "t"}])
def test_settings_without_effect_are_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"is encoded and split already; \w+ has no effect on it"):
        read(folder(tmp_path), **settings)


def test_an_old_map_is_refused(tmp_path: Path) -> None:
    features = [{"city": {"type": "categorical", "source": ""}}]
    with pytest.raises(UserError, match="city: has no vocab_size; FuxiCTR before"):
        read(folder(tmp_path / "a", features=features))
    with pytest.raises(UserError, match="has no list of features; FuxiCTR before"):
        read(folder(tmp_path, features={"city": {}}))


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = folder(tmp_path), tmp_path / "run"
    flags = ["--train.epochs", "1", "--arms", "gated", "--out", str(out), "--json"]
    assert main(["run", "optfs", "--data", str(path), "--search.epochs", "2", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"]["test"] == 100
    assert main(["predict", str(out), "--data", str(path / "test.parquet"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 100
