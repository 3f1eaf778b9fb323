"""Pre-trained vectors: how they are read, where tables start, and that frozen ones stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from penstock.cli import main
from penstock.data.base import Source
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.data.vectors import Vectors
from penstock.errors import UserError
from penstock.lab.store import open_run
from penstock.nn.embeddings import FieldEmbedding
from penstock.tasks.base import Training
from penstock.tasks.click_prediction import ClickPrediction
from penstock.tasks.pretrained import frozen_rows, start_from_vectors

KEYS = [f"i{n}" for n in range(5, 30)]  # of the items i0 .. i19


def vectors(width: int = 8) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).normal(size=(len(KEYS), width)).astype(np.float32)


def written(tmp_path: Path, name: str, width: int = 8) -> Path:
    path, values = tmp_path / name, vectors(width)
    wide = pl.DataFrame({"item": KEYS} | {f"v{n}": values[:, n] for n in range(width)})
    if name == "lists.parquet":
        pl.DataFrame({"vector": values.tolist(), "key": KEYS}).write_parquet(path)
    elif name.endswith(".parquet"):
        wide.write_parquet(path)
    elif name.endswith(".npz"):
        np.savez(path, key=np.array(KEYS), value=values)
    elif name.endswith((".csv", ".tsv")):
        wide.write_csv(path, separator="\t" if name.endswith(".tsv") else ",")
    else:
        head = [f"{len(KEYS)} {width}"] if name.endswith(".vec") else []
        rows = [" ".join([key, *map(repr, row.tolist())]) for key, row in zip(KEYS, values, strict=True)]
        path.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    return path


def read(tmp_path: Path, columns: str) -> TableData:
    draw = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "item": [f"i{n}" for n in draw.integers(0, 20, 400)],
            "city": draw.choice(["Oslo", "Rome", "Lima"], 400),
            "price": draw.uniform(5, 25, 400),
            "history": ["^".join(f"i{n}" for n in draw.integers(0, 20, 3)) for _ in range(400)],
            "click": draw.integers(0, 2, 400),
        }
    )
    frame.write_csv(tmp_path / "clicks.csv")
    (tmp_path / "columns.yaml").write_text(columns, encoding="utf-8")
    config = TableConfig(columns=str(tmp_path / "columns.yaml"))
    return read_table(config, Source(tmp_path / "clicks.csv", None, "click"))


@pytest.mark.parametrize("name", ["lists.parquet", "wide.parquet", "a.csv", "a.tsv", "a.npz", "a.txt", "a.vec"])
def test_all_formats_read_alike(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    data = read(tmp_path, f"item: {{pretrained: {name}}}\nhistory: {{share: item}}\n")
    (found,) = data.vectors
    assert f"{name}: vectors for 15 of 20 values of item" in data.notes
    for place, row in zip(found.ids.tolist(), found.values, strict=True):
        field, word = data.schema.locate(place)
        assert field == "item"
        np.testing.assert_array_equal(row, vectors()[KEYS.index(word)])


def test_wide_vectors_are_projected() -> None:
    draw = np.random.default_rng(0)
    values = (draw.normal(size=(50, 3)) @ draw.normal(size=(3, 20))).astype(np.float32)
    ids = np.arange(50)
    exact, share = Vectors(Path("v"), "item", ids, values, False).of_width(3)
    assert share == pytest.approx(1)
    # Rank 3 in width 3: all inner products are kept.
    np.testing.assert_allclose(exact @ exact.T, values @ values.T, rtol=1e-4, atol=1e-4)
    two, share = Vectors(Path("v"), "item", ids, values, False).of_width(2)
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())
    np.testing.assert_allclose(np.linalg.svd(two, compute_uv=False), singular[:2], rtol=1e-5)
    with pytest.raises(UserError, match="v: its vectors have width 20 and the model's table is wider, 21; set dim to"):
        Vectors(Path("v"), "item", ids, values, False).of_width(21)


class Tiny(nn.Module):
    def __init__(self, num_ids: int) -> None:
        super().__init__()
        self.linear, self.embedding = FieldEmbedding(num_ids, 1), FieldEmbedding(num_ids, 8)

    def forward(self, ids: torch.Tensor, numeric: object = None, sequences: object = None) -> torch.Tensor:
        return self.linear(ids).sum((1, 2)) + self.embedding(ids).sum(1).square().sum(1)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_frozen_rows_survive_every_optimiser(tmp_path: Path, optimizer: Any) -> None:
    written(tmp_path, "a.npz")
    data = read(tmp_path, "item: {pretrained: a.npz, freeze: true}\n")
    torch.manual_seed(0)
    model = Tiny(data.schema.num_ids)
    start_from_vectors(model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (rows,) = frozen_rows(model, data)
    task = ClickPrediction(model, Training(steps=5, optimizer=optimizer, lr=0.1, weight_decay=0.1), data)
    trainer = lightning.Trainer(max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, data.train(64, 0))
    after = model.state_dict()
    frozen = torch.zeros(data.schema.num_ids, dtype=torch.bool)
    frozen[rows.ids] = True
    assert frozen.sum() == 15
    assert torch.equal(after["embedding.table.weight"][frozen], before["embedding.table.weight"][frozen])
    assert (after["embedding.table.weight"][~frozen] != before["embedding.table.weight"][~frozen]).any(1).all()
    assert (after["linear.table.weight"] != before["linear.table.weight"]).all()
    # What is kept is what a checkpoint holds, and not what a new model starts from.
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Tiny(data.schema.num_ids)
    task = ClickPrediction(again, task.train_config, data)
    trainer = lightning.Trainer(max_steps=8, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, data.train(64, 0), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert trainer.global_step == 8
    assert torch.equal(again.embedding.table.weight[frozen], before["embedding.table.weight"][frozen])


@pytest.mark.parametrize("name", ["optfs", "finalmlp", "autoint", "optinter"])
def test_systems_keep_frozen_vectors(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "a.parquet", width=12)
    data = read(tmp_path, "item: {pretrained: a.parquet, freeze: true}\nhistory: {share: item}\n")
    flags = ["--data", str(tmp_path / "clicks.csv"), "--label", "click", "--json", "--dim", "8", "--train.epochs", "1"]
    flags += ["--table.columns", str(tmp_path / "columns.yaml"), "--arms", "gated"]
    if name in ("optfs", "optinter"):
        flags += ["--search.epochs", "2"]
    assert main(["run", name, *flags, "--out", str(tmp_path / "run")]) == 0
    notes = json.loads(capsys.readouterr().out)["data"]["notes"]
    assert any("a.parquet: width 12 becomes 8 by truncated SVD, which keeps" in note for note in notes)
    model = open_run(tmp_path / "run").model()
    weight = model.net.embedding.table.weight if name == "optinter" else model.embedding.table.weight
    expected, _ = data.vectors[0].of_width(8)
    np.testing.assert_array_equal(weight.detach()[data.vectors[0].ids].numpy(), expected)
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "cells" / "gated.seed0.json").unlink()
    assert main(["run", name, "--resume", str(tmp_path / "run"), "--json"]) == 0


def test_too_narrow_vectors_stop_a_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "a.csv", width=4)
    read(tmp_path, "item: {pretrained: a.csv}\n")
    flags = ["--data", str(tmp_path / "clicks.csv"), "--label", "click", "--out", str(tmp_path / "run")]
    assert main(["run", "optfs", *flags, "--table.columns", str(tmp_path / "columns.yaml")]) == 2
    assert "a.csv: its vectors have width 4 and the model's table is wider, 8; set dim to 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "text", "message"),
    [
        ("item: {pretrained: no.csv}", "", "no.csv: there is no such file of vectors"),
        ("item: {pretrained: columns.yaml}", "", "columns.yaml: vectors come in a .parquet, .csv"),
        ("item: {freeze: true}", "", "item: freeze is for vectors; give pretrained: FILE too"),
        ("item: {pretrained: a.txt, freeze: 3}", "", "freeze is 3 and must be true or false"),
        ("price: {pretrained: a.txt}", "i1 1\n", "price: pretrained vectors belong to words, and the column has no"),
        ("item: {pretrained: a.txt, hash_buckets: 5}", "i1 1\n", "item: pretrained vectors belong to words"),
        ("history: {pretrained: a.txt, share: item}", "i1 1\n", "the column shares the ids of item; give it there"),
        ("item: {pretrained: a.txt}", "x 1 2\n", "a.txt: none of its 1 keys is a value of item, whose values are as i"),
        (
            "item: {pretrained: a.txt}",
            "i1 1 2\ni2 1\n",
            "a.txt, line 2: must be a word and 2 numbers, all by one space",
        ),
        ("item: {pretrained: a.txt}", "i1 1 2\ni2 1 x\n", "a.txt, line 2: must be a word and 2 numbers"),
        ("item: {pretrained: a.txt}", "i1 1 2\ni1 1 3\n", "a.txt: 'i1' has two vectors; a value can start from one"),
        ("item: {pretrained: a.txt}", "i1 1 2\ni2 1 nan\n", "a.txt: the vector of 'i2' holds what is no finite number"),
        ("item: {pretrained: b.csv}", "k,v\ni1,1\ni2,x\n", "b.csv, row 2, column 'v': 'x' is not a finite number"),
        ("item: {pretrained: b.csv}", "k\ni1\n", "b.csv: has the one column 'k'; a key and its numbers are needed"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, columns: str, text: str, message: str) -> None:
    (tmp_path / ("b.csv" if "b.csv" in columns else "a.txt")).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read(tmp_path, columns)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arrays_and_lists_are_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", keys=np.array(["i1"]))
    with pytest.raises(UserError, match=r"must hold the arrays key \(K,\) and value \(K, W\)"):
        read(tmp_path, "item: {pretrained: a.npz}")
    np.savez(tmp_path / "a.npz", key=np.array(["i1"]), value=np.zeros(3))
    with pytest.raises(UserError, match=r"key \(1,\) and value \(3,\) must be"):
        read(tmp_path, "item: {pretrained: a.npz}")
    pl.DataFrame({"key": ["i1", "i2"], "v": [[1.0, 2.0], [1.0]]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2, column 'v': 1 numbers, where the first row has 2"):
        read(tmp_path, "item: {pretrained: a.parquet}")
