"""Regression by a mixture of experts, of one label or several at once (numbers and two-class labels together).

Shape legend: B batch, T tasks (labels), E experts, F id fields, N numeric columns, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from penstock.data.mixtures import LabelTask, MixtureData, PlantedMixture
from penstock.data.schema import TableBatch
from penstock.data.tables import read_rows
from penstock.gates import watch
from penstock.gates.core import GateNotFoundError, spec_of
from penstock.nn.experts import collect_losses
from penstock.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A gate value above this counts as an open expert.
OPEN = 1e-5


class Outputs(NamedTuple):
    """What a step hands to the metrics.

    Attributes:
        predictions: (B, T) as the model gives them: standardised numbers, logits of binary labels.
        loss: the weighted loss of the labels alone, without the model's regularisers.
        rows: of each gate over experts, (B, E); only in evaluation.
    """

    predictions: Tensor
    loss: Tensor
    rows: list[Tensor]


class SquaredError(Metric):
    """Mean squared error, and the same over the labels' variance, of the predictions given to it."""

    full_state_update = False
    count: Tensor
    errors: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        for name in ("count", "errors", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, given: Tensor) -> None:
        predicted, given = predicted.double(), given.double()
        self.count += given.numel()
        self.errors += (predicted - given).square().sum()
        self.total += given.sum()
        self.squares += given.square().sum()

    def compute(self) -> dict[str, Tensor]:
        mse = self.errors / self.count
        variance = self.squares / self.count - (self.total / self.count).square()
        return {f"{self.prefix}mse": mse, f"{self.prefix}nmse": mse / variance}


class ExpertUse(Metric):
    """How many experts a sample uses, and how many are never used.

    ``experts_per_sample``: mean number of gate values above 1e-5; ``share_within_k``: share of samples with at most k
    of them; ``dead_experts``: share of experts that no sample uses by any gate.
    """

    full_state_update = False
    count: Tensor
    used: Tensor
    within: Tensor
    peak: Tensor

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        for name in ("count", "used", "within"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("peak", torch.zeros(1), dist_reduce_fx="max")  # becomes (E,) with the first rows

    def update(self, rows: list[Tensor]) -> None:
        for row_BE in rows:
            number_B = (row_BE > OPEN).sum(-1)
            self.count += len(row_BE)
            self.used += number_B.sum()
            self.within += (number_B <= self.top_k).sum()
            self.peak = torch.maximum(self.peak, row_BE.amax(0))

    def compute(self) -> dict[str, Tensor]:
        return {
            "experts_per_sample": self.used / self.count,
            "share_within_k": self.within / self.count,
            "dead_experts": (self.peak <= OPEN).double().mean(),
        }


class MixtureRegression(Task):
    """Squared error of numbers, cross-entropy of two-class labels, weighted; the model's own regularisers on top.

    A batch is a `TableBatch`; the model maps its ids (B, F), numeric (B, N) and sequences (B, S, L) to (B, T). What the
    model adds with `penstock.nn.experts.add_loss` is trained on, and left out of the reported loss. Numbers are
    predicted on the scale of ``spec["tasks"]``; ``mse`` is in the label's own unit. With several labels a metric's
    name begins with its label's.
    """

    monitor = ("loss", "min")
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "nmse": "min",
        "mse": "min",
        "auc": "max",
        "loss": "min",
        "experts_per_sample": "min",
    }
    data: MixtureData

    @cached_property
    def label_tasks(self) -> list[LabelTask]:
        """What each label is learned as."""
        return LabelTask.of(self.data.spec)

    def step(self, batch: TableBatch) -> tuple[Tensor, Outputs]:
        if self.training:
            with collect_losses() as regularisers:
                predictions_BT = self.model(*self.inputs(batch))
            loss = self.label_loss(predictions_BT, batch)
            return loss + sum(regularisers.values()), Outputs(predictions_BT, loss, [])
        predictions_BT, rows = self.watched(batch)
        loss = self.label_loss(predictions_BT, batch)
        return loss, Outputs(predictions_BT, loss, rows)

    def watched(self, batch: TableBatch) -> tuple[Tensor, list[Tensor]]:
        """Predictions (B, T) and the rows (B, E) of every gate over experts."""
        try:
            log = watch(self.model, _is_router, keep="values")
        except GateNotFoundError:
            return self.model(*self.inputs(batch)), []
        with log:
            predictions_BT = self.model(*self.inputs(batch))
        return predictions_BT, [row for rows in log.values().values() for row in rows]

    def label_loss(self, predictions_BT: Tensor, batch: TableBatch) -> Tensor:
        """Weighted sum of the labels' mean losses; a label given in no row of the batch adds nothing."""
        loss = predictions_BT.new_zeros(())
        for column, task in enumerate(self.label_tasks):
            predicted, given = _given(task, predictions_BT[:, column], _labels(batch)[:, column])
            if not len(given):
                continue
            if task.kind == "binary":
                loss = loss + task.weight * F.binary_cross_entropy_with_logits(predicted, given)
            else:
                loss = loss + task.weight * F.mse_loss(predicted, (given - task.mean) / task.std)
        return loss

    def reported_loss(self, loss: Tensor, outputs: Outputs, batch: TableBatch) -> Tensor:
        return outputs.loss

    def new_metrics(self) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {"experts": ExpertUse(int(getattr(self.model, "top_k", 1)))}
        for task in self.label_tasks:
            prefix = self._prefix(task)
            if task.kind == "binary":
                metrics[f"{prefix}auc"] = BinaryAUROC()
                metrics[f"{prefix}accuracy"] = BinaryAccuracy()
                metrics[f"{prefix}log_loss"] = MeanMetric()
            else:
                metrics[f"{prefix}error"] = SquaredError(prefix)
        return MetricCollection(metrics, compute_groups=False)

    def update(self, metrics: MetricCollection, outputs: Outputs, batch: TableBatch) -> None:
        metrics["experts"].update(outputs.rows)
        for column, task in enumerate(self.label_tasks):
            prefix = self._prefix(task)
            predicted, given = _given(task, outputs.predictions[:, column], _labels(batch)[:, column])
            if task.kind == "binary":
                metrics[f"{prefix}auc"].update(predicted.sigmoid(), given.long())
                metrics[f"{prefix}accuracy"].update(predicted.sigmoid(), given.long())
                losses = F.binary_cross_entropy_with_logits(predicted, given, reduction="none")
                metrics[f"{prefix}log_loss"].update(losses)
            else:
                metrics[f"{prefix}error"].update(predicted * task.std + task.mean, given)

    def _prefix(self, task: LabelTask) -> str:
        return f"{task.name}_" if len(self.label_tasks) > 1 else ""

    def inputs(self, batch: TableBatch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.ids, batch.numeric, batch.sequences

    @torch.no_grad()
    def figures(self) -> dict[str, Figure]:
        self.eval()
        batches = list(self.data.test(self.train_config.batch_size))
        seen = [self.watched(batch)[1] for batch in batches]
        if not seen or not seen[0]:
            return {}
        gates = [torch.cat(rows).double() for rows in zip(*seen, strict=True)]
        names = [task.name for task in self.label_tasks] if len(gates) == len(self.label_tasks) else []
        figures = {"How much each expert is used": _use_figure(gates, names)}
        if isinstance(self.data.truth, PlantedMixture):
            region = torch.from_numpy(self.data.truth.region(torch.cat([b.numeric for b in batches]).numpy()))
            figures["Which expert answers in which planted region"] = _region_figure(gates[0], region)
        return figures

    @classmethod
    def predict_file(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 1024
    ) -> pl.DataFrame:
        """Predictions by label: a number in its own unit, or the likelier class and the second one's probability."""
        return pl.concat(cls.predict_frames(model, spec, path, batch_size))

    @classmethod
    def predict_frames(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 8192
    ) -> Iterator[pl.DataFrame]:
        tasks = LabelTask.of(spec)
        yield _predicted(tasks, torch.empty(0, len(tasks)))  # a table without rows has columns, too
        for batch in read_rows(spec, path, batch_size):
            with torch.no_grad():
                predictions_BT = model(batch.ids, batch.numeric, batch.sequences)
            yield _predicted(tasks, predictions_BT)


def _predicted(tasks: Sequence[LabelTask], predictions_BT: Tensor) -> pl.DataFrame:
    columns: dict[str, pl.Series] = {}
    for task, predicted in zip(tasks, predictions_BT.double().unbind(1), strict=True):
        if task.kind == "binary":
            likelier = [task.classes[int(logit > 0)] for logit in predicted]
            columns[task.name] = pl.Series(likelier, dtype=pl.String)
            columns[f"{task.name}_probability"] = pl.Series(predicted.sigmoid().numpy())
        else:
            columns[task.name] = pl.Series((predicted * task.std + task.mean).numpy())
    return pl.DataFrame(columns)


def _is_router(name: str, module: nn.Module) -> bool:
    spec = spec_of(module)
    return spec is not None and spec.passes == "expert"


def _labels(batch: TableBatch) -> Tensor:
    return batch.label.unflatten(0, (len(batch.label), -1)) if batch.label.ndim == 1 else batch.label


def _given(task: LabelTask, predicted: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and labels of the rows in which the label is given."""
    if not task.masked:
        return predicted, label
    given = label != 0
    return predicted[given], label[given]


def _use_figure(gates: list[Tensor], names: list[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 1.6 * len(gates)), layout="constrained")
    for number, row_BE in enumerate(gates):
        axes = figure.add_subplot(len(gates), 1, number + 1)
        places = torch.arange(row_BE.shape[1])
        axes.bar(places - 0.2, row_BE.mean(0), width=0.4, label="mean gate value")
        axes.bar(places + 0.2, (row_BE > OPEN).double().mean(0), width=0.4, label="share of samples that use it")
        axes.set(xlabel="expert", xticks=places, ylim=(0, 1.03), title=names[number] if names else "")
    figure.axes[0].legend()
    return figure


def _region_figure(row_BE: Tensor, region_B: Tensor) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    means = torch.stack([row_BE[region_B == r].mean(0) for r in range(int(region_B.max()) + 1)])
    image = axes.imshow(means, vmin=0, vmax=1)
    axes.set(xlabel="expert", ylabel="region", title="mean gate value")
    figure.colorbar(image)
    return figure
