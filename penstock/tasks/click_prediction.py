"""Click prediction: will this row's label be one?

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC

from penstock.data.schema import TableBatch
from penstock.data.tables import read_rows
from penstock.tasks.base import Task
from penstock.tasks.click_metrics import AUCError, Calibration, GroupAUC
from penstock.tasks.search import RetrainStage, SearchStage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ClickPrediction(Task):
    """Binary cross-entropy on a model's logits, (ids (B, F), numeric (B, N), sequences (B, S, L)) -> (B,).

    Where rows have weights, each row's loss is multiplied by its own before the mean.

    Metrics: ``auc``, the exact area under the ROC curve, with ``auc_error``, its standard error over the choice of rows;
    ``log_loss`` in nats; ``calibration``, mean predicted over mean observed; and for a table with a column of groups
    ``group_auc``, the mean AUC within groups.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("auc", "max")
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {"auc": "max", "log_loss": "min"}

    def step(self, batch: TableBatch) -> tuple[Tensor, Tensor]:
        logits_B = self.model(*self.inputs(batch))
        weight = batch.weight.to(logits_B.dtype) if len(batch.weight) else None
        return F.binary_cross_entropy_with_logits(logits_B, batch.label.to(logits_B.dtype), weight), logits_B

    def new_metrics(self) -> MetricCollection:
        found: dict[str, Metric | MetricCollection] = {"auc": BinaryAUROC(thresholds=None), "auc_error": AUCError()}
        found["calibration"] = Calibration()
        if self.data.spec.get("group"):
            found["group_auc"] = GroupAUC()
        return MetricCollection(found, compute_groups=False)

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: TableBatch) -> None:
        probabilities, label = outputs.detach().sigmoid(), batch.label.long()
        for name, metric in metrics.items():
            if name == "group_auc":
                metric.update(probabilities, label, batch.group[:, 0])
            else:
                metric.update(probabilities, label)

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {"log_loss": metrics["loss"]}

    def inputs(self, batch: TableBatch) -> tuple[Any, ...]:
        return model_inputs(batch)

    def figures(self) -> dict[str, Figure]:
        device = next(self.model.parameters()).device
        scores, labels = [], []
        with torch.no_grad():
            for batch in self.data.test(self.train_config.batch_size):
                inputs = (x.to(device) for x in self.inputs(batch))
                scores.append(self.model(*inputs).sigmoid().float().cpu())
                labels.append(batch.label)
        return {"Calibration (test)": calibration_figure(torch.cat(scores).numpy(), torch.cat(labels).numpy())}

    @classmethod
    @torch.no_grad()
    def predict_file(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 1024
    ) -> pl.DataFrame:
        """Score the rows of a table.

        Returns:
            ``row`` (from 1, in the order of the file) and ``score``, the probability that the label is one.
        """
        device = next(model.parameters()).device
        scores = [
            model(*(x.to(device) for x in model_inputs(batch))).sigmoid().double().cpu().numpy()
            for batch in read_rows(spec, path, batch_size)
        ]
        score = np.concatenate([*scores, np.empty(0)])
        return pl.DataFrame({"row": np.arange(1, len(score) + 1), "score": score})


def model_inputs(batch: TableBatch) -> tuple[Tensor, ...]:
    """A batch as positional arguments, without the parts at the end that the table does not have."""
    parts = [batch.ids, batch.numeric, batch.sequences]
    while len(parts) > 1 and parts[-1].shape[1] == 0:
        parts.pop()
    return tuple(parts)


class ClickSearch(SearchStage, ClickPrediction):
    """Click prediction while gates are searched for."""


class ClickRetrain(RetrainStage, ClickPrediction):
    """Click prediction with the gates that a search found."""


def calibration_figure(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], bins: int = 10) -> Figure:
    """Mean label against mean score in groups of equal size; a calibrated model is on the diagonal."""
    from matplotlib.figure import Figure

    groups = [group for group in np.array_split(np.argsort(scores, kind="stable"), bins) if len(group)]
    predicted = [float(scores[group].mean()) for group in groups]
    observed = [float(labels[group].mean()) for group in groups]
    top = 1.05 * max(*predicted, *observed)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, top], [0, top], linestyle=":", color="grey")
    axes.plot(predicted, observed, marker="o")
    axes.set(xlabel="mean score", ylabel="share of ones", xlim=(0, top), ylim=(0, top))
    return figure
