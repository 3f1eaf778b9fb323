"""The plain click models against their formulas, and beside a system on one leaderboard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch

from penstock.cli import main
from penstock.data.tables import read_rows
from penstock.lab.cards import PLAIN_MODELS
from penstock.lab.plain import PLAIN
from penstock.lab.store import load, open_run
from penstock.nn.click_models import CLICK_MODELS, ClickModel, CrossNetworkV2
from penstock.tasks.click_prediction import model_inputs

IDS = torch.tensor([[0, 3, 5], [1, 2, 6]])


def model(name: str) -> ClickModel:
    torch.manual_seed(0)
    return ClickModel(7, 3, dim=4, **CLICK_MODELS[name]((5,))).double()  # type: ignore[arg-type]


def test_names_are_told_without_loading_a_model() -> None:
    assert set(PLAIN_MODELS) == set(CLICK_MODELS) == set(PLAIN)


def test_a_factorization_machine_is_its_formula() -> None:
    fm = model("fm")
    assert fm.linear is not None
    assert fm.embedding is not None
    e = fm.embedding.table.weight[IDS]
    pairs = sum((e[:, i] * e[:, j]).sum(-1) for i in range(3) for j in range(i))
    torch.testing.assert_close(fm(IDS), fm.bias + fm.linear.table.weight[IDS].sum((1, 2)) + pairs)


def test_logistic_regression_has_one_weight_an_id() -> None:
    assert sum(p.numel() for p in model("logistic_regression").parameters()) == 7 + 1


def test_deepfm_adds_a_perceptron_to_the_machine() -> None:
    deep = model("deepfm")
    assert deep.embedding is not None
    full = deep(IDS)
    e = deep.embedding.table.weight[IDS].flatten(1)
    perceptron = deep.streams[0](e).squeeze(1)
    del deep.streams[0]
    torch.testing.assert_close(full, deep(IDS) + perceptron)


def test_dualmlp_adds_two_perceptrons() -> None:
    dual = model("dualmlp")
    assert dual.embedding is not None
    e = dual.embedding.table.weight[IDS].flatten(1)
    torch.testing.assert_close(dual(IDS), dual.bias + sum(stream(e).squeeze(1) for stream in dual.streams))


def test_crosses_are_their_formula() -> None:
    torch.manual_seed(0)
    cross, x0 = CrossNetworkV2(6, 2).double(), torch.randn(3, 6).double()
    x = x0
    for layer in cross.layers:
        x = x0 * (x @ layer.weight.T + layer.bias) + x  # type: ignore[operator, union-attr]
    torch.testing.assert_close(cross(x0), x)


def test_dcnv2_reads_crosses_and_perceptron_together() -> None:
    dcn = model("dcnv2")
    assert dcn.read is not None
    assert dcn.read.in_features == 3 * 4 + 5
    assert dcn(IDS).shape == (2,)


def test_a_model_without_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="no part"):
        ClickModel(7, 3, linear=False)


def test_plain_models_stand_beside_a_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "board"
    flags = ["--quick", "--train.epochs", "2", "--search.epochs", "2", "--dim", "4", "--json", "--out", str(out)]
    assert main(["compare", "optfs", "fm", "dcnv2", *flags, "--train.lazy-embeddings"]) == 0
    board = json.loads(capsys.readouterr().out)
    assert open_run(out / "dcnv2").config.train.lazy_embeddings, "what a step costs is alike for all"
    assert {row["name"] for row in board["rows"]} == {"optfs", "optfs (ungated)", "fm", "dcnv2"}
    table = tmp_path / "new.csv"
    table.write_text("no\n1\n")
    assert main(["predict", str(out / "fm"), "--data", str(table), "--output", str(tmp_path / "p.csv")]) == 2
    assert "lacks" in capsys.readouterr().err, "a plain model is opened and asks for its columns"


def test_parts_of_a_comparison_are_exported_to_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "city": draw.choice(["Oslo", "Rome", "Lima"], 300),
            "device": draw.choice(["tv", "phone"], 300),
            "price": draw.normal(size=300),
            "tags": [draw.choice(["a", "b", "c"], draw.integers(0, 4)).tolist() for _ in range(300)],
            "click": draw.integers(0, 2, 300),
        }
    )
    table.write_parquet(tmp_path / "clicks.parquet")
    flags = ["--data", str(tmp_path / "clicks.parquet"), "--label", "click", "--table.numeric", "standardize"]
    flags += [
        "--train.epochs",
        "1",
        "--train.batch-size",
        "50",
        "--search.epochs",
        "2",
        "--out",
        str(tmp_path / "board"),
    ]
    names = ["optfs", "finalmlp", "autoint", "optinter", "dcnv2"]
    assert main(["compare", *names, *flags]) == 0
    for name in names:
        capsys.readouterr()
        assert main(["export", str(tmp_path / "board" / name), "--format", "onnx", "--json"]) == 0
        exported = json.loads(capsys.readouterr().out)
        model = load(tmp_path / "board" / name)
        session = onnxruntime.InferenceSession(exported["file"], providers=["CPUExecutionProvider"])
        batches = read_rows(open_run(tmp_path / "board" / name).spec, tmp_path / "clicks.parquet", 7)
        for batch, _ in zip(batches, range(3), strict=False):
            inputs = model_inputs(batch)
            assert len(inputs) == 3
            fed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
            with torch.no_grad():
                torch.testing.assert_close(
                    torch.from_numpy(session.run(None, fed)[0]), model(*inputs), atol=1e-5, rtol=0
                )


def test_a_plain_model_does_not_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "fm", "optfs"]) == 2
    assert "name a system first" in capsys.readouterr().err
