"""A run on a table of clicks as people make them: from the folder of the data, looked at, gone on with, used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock import ClickClassifier
from penstock.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and a run on it, made there with relative paths."""
    path = tmp_path_factory.mktemp("clicks")
    draw = np.random.default_rng(0)
    columns = {"city": draw.choice(["Oslo", "Rome", "Lima"], 400), "user_id": draw.integers(0, 30, 400)}
    pl.DataFrame(columns | {"click": draw.integers(0, 2, 400)}).write_csv(path / "clicks.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        flags = ["--data", "clicks.csv", "--label", "click", "--table.group-column", "user_id", "--train.epochs", "1"]
        assert main(["run", "finalmlp", *flags, "--arms", "gated", "--out", "run", "--json"]) == 0
        assert main(["compare", "finalmlp", "fm", *flags, "--out", "both"]) == 0
    return path


def test_a_run_on_a_relative_path_can_be_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "run" / "results.json").read_text())["arms"]
    assert main(["run", "finalmlp", "--resume", str(folder / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"] == before


def test_a_run_on_other_data_is_not_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "clicks.csv").read_text()
    (folder / "clicks.csv").write_text("\n".join(whole.splitlines()[:300]) + "\n")
    try:
        assert main(["run", "finalmlp", "--resume", str(folder / "run")]) == 2
        assert "the data is not what it was" in capsys.readouterr().err
        assert not (folder / "run" / ".lock").exists()
    finally:
        (folder / "clicks.csv").write_text(whole)


def test_auc_within_groups_is_on_the_leaderboard_where_there_are_groups(folder: Path) -> None:
    for name in ("run", "both"):
        board = json.loads((folder / name / "results.json").read_text())["leaderboard"]
        assert board == {"auc": "max", "log_loss": "min", "group_auc": "max"}


def test_compare_shows_what_the_columns_are(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    flags = ["--data", "clicks.csv", "--label", "click", "--train.epochs", "1", "--out", "again"]
    assert main(["compare", "finalmlp", "fm", *flags]) == 0
    said = capsys.readouterr()
    assert "user_id  categorical" in said.err
    assert "group_auc" not in said.out


def test_ablation_leaves_out_standard_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", str(folder / "run"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert {"loss", "auc", "group_auc"} <= row.keys()
    assert not any("_error" in name for name in row)


def test_predictions_begin_when_there_is_something_to_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(folder / "run"), "--data", str(folder / "nothing.csv")]) == 2
    assert capsys.readouterr().out == ""
    (folder / "empty.csv").write_text("city,user_id\n")
    assert main(["predict", str(folder / "run"), "--data", str(folder / "empty.csv")]) == 0
    assert capsys.readouterr().out == "row,score\n"
    assert main(["predict", str(folder / "run"), "--data", str(folder / "empty.csv"), "--seed", "3"]) == 2
    assert "arm gated was not trained with seed 3" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--train.lr", "--train.patience", "--train.weight-decay", "--train.epochs"])
def test_negative_settings_leave_no_folder(folder: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    flags = ["--data", str(folder / "clicks.csv"), "--label", "click", "--out", str(folder / "bad")]
    assert main(["run", "fm", *flags, flag, "-1"]) == 2
    assert "=-1" in capsys.readouterr().err
    assert not (folder / "bad").exists()


def test_the_estimator_starts_from_vectors(folder: Path) -> None:
    table = pl.read_csv(folder / "clicks.csv")
    pl.DataFrame({"city": ["Oslo", "Rome"], "a": [1.0, 2.0], "b": [3.0, 4.0]}).write_csv(folder / "vectors.csv")
    columns = {"city": {"kind": "categorical", "pretrained": str(folder / "vectors.csv"), "freeze": True}}
    model = ClickClassifier(model="fm", dim=2, epochs=1, columns=columns, random_state=0)
    model.fit(table.drop("click"), table["click"])
    city = next(one for one in model.schema_.fields if one.name == "city")
    rows = [city.offset + 1 + city.words.index(word) for word in ("Oslo", "Rome")]
    tables = [p for p in model.model_.parameters() if p.ndim == 2 and p.shape == (model.schema_.num_ids, 2)]
    assert any(t[rows].tolist() == [[1.0, 3.0], [2.0, 4.0]] for t in tables)
