"""Click metrics against scikit-learn, sums written out, and resampling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from penstock.cli import main
from penstock.tasks.click_metrics import AUCError, Calibration, GroupAUC, LogLossError


def rows(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with ties, labels that follow them, and groups."""
    make = torch.Generator().manual_seed(seed)
    scores = torch.randint(20, (number,), generator=make) / 20
    labels = (torch.rand(number, generator=make) < 0.2 + 0.5 * scores).long()
    return scores, labels, torch.randint(number // 4, (number,), generator=make) * 10**15


def test_group_auc_is_the_weighted_mean_of_the_groups() -> None:
    scores, labels, groups = rows(500)
    metric = GroupAUC()
    for part in torch.arange(500).split(130):
        metric.update(scores[part], labels[part], groups[part])
    areas, weights = [], []
    for group in groups.unique():
        own = groups == group
        if 0 < labels[own].sum() < own.sum():
            areas.append(roc_auc_score(labels[own], scores[own]))
            weights.append(int(own.sum()))
    assert len(areas) < len(groups.unique()), "some group has one label and is left out"
    mean = np.average(areas, weights=weights)
    assert float(metric.compute()["group_auc"]) == pytest.approx(mean, abs=1e-6)
    error = np.sqrt(np.sum((np.array(weights) * (np.array(areas) - mean)) ** 2)) / np.sum(weights)
    assert float(metric.compute()["group_auc_error"]) == pytest.approx(error, rel=1e-5)


def test_without_a_group_of_both_labels_there_is_no_group_auc() -> None:
    metric = GroupAUC()
    metric.update(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert math.isnan(float(metric.compute()["group_auc"]))


def test_the_error_of_the_auc_is_delongs() -> None:
    scores, labels, _ = rows(300)
    metric = AUCError()
    metric.update(scores, labels)
    ones, zeros = scores[labels > 0].double(), scores[labels == 0].double()
    wins = (ones[:, None] > zeros).double() + 0.5 * (ones[:, None] == zeros)
    right = (wins.mean(1).var() / len(ones) + wins.mean(0).var() / len(zeros)).sqrt()
    assert float(metric.compute()) == pytest.approx(float(right), rel=1e-5)


def test_the_error_of_the_auc_is_how_much_it_varies() -> None:
    areas = [roc_auc_score(labels, scores) for scores, labels, _ in (rows(400, seed) for seed in range(300))]
    metric = AUCError()
    metric.update(*rows(400, 1000)[:2])
    assert float(metric.compute()) == pytest.approx(np.std(areas), rel=0.2)


def test_calibration_is_predicted_over_observed() -> None:
    metric = Calibration()
    metric.update(torch.tensor([0.2, 0.4]), torch.tensor([0, 1]))
    metric.update(torch.tensor([0.9]), torch.tensor([1]))
    assert float(metric.compute()["calibration"]) == pytest.approx(1.5 / 2)


def test_errors_of_calibration_and_log_loss_are_how_much_they_vary() -> None:
    def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        make = torch.Generator().manual_seed(seed)
        p = 0.05 + 0.9 * torch.rand(500, generator=make)
        return p, (torch.rand(500, generator=make) < 0.8 * p).long()

    def log_loss(p: torch.Tensor, y: torch.Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy(p, y.float()))

    samples = [drawn(seed) for seed in range(400)]
    ratio, loss = Calibration(), LogLossError()
    for metric in (ratio, loss):
        p, y = drawn(1000)
        for part in torch.arange(500).split(170):
            metric.update(p[part], y[part])
    ratios = [float(p.sum() / y.sum()) for p, y in samples]
    assert float(ratio.compute()["calibration_error"]) == pytest.approx(np.std(ratios), rel=0.15)
    assert float(loss.compute()) == pytest.approx(np.std([log_loss(p, y) for p, y in samples]), rel=0.15)


def test_a_column_of_users_gives_the_auc_within_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    table = pl.DataFrame({"user_id": draw.integers(0, 40, 800), "item": draw.integers(0, 9, 800).astype(str)})
    clicks = draw.random(800) < 0.2 + 0.06 * table["item"].cast(pl.Int64).to_numpy()
    table.with_columns(click=pl.Series(clicks.astype(int))).write_csv(tmp_path / "clicks.csv")
    flags = ["--data", str(tmp_path / "clicks.csv"), "--train.epochs", "2", "--search.epochs", "2", "--arms", "ungated"]
    out = ["--out", str(tmp_path / "run"), "--json"]
    assert main(["run", "optfs", *flags, "--table.group-column", "user_id", *out]) == 0
    metrics = json.loads(capsys.readouterr().out)["arms"]["ungated"]["metrics"]
    assert 0 < metrics["group_auc"]["mean"] < 1
    assert 0 < metrics["auc_error"]["mean"] < 0.1
    assert metrics["calibration"]["mean"] == pytest.approx(1, abs=0.4)
    assert main(["run", "optfs", *flags, "--table.group-column", "usr_id", "--out", str(tmp_path / "no")]) == 2
    assert "did you mean 'user_id'" in capsys.readouterr().err
