"""Click prediction: will this row's label be one?

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC

from penstock.data.base import Data
from penstock.data.schema import TableBatch
from penstock.data.tables import read_rows
from penstock.errors import UserError
from penstock.nn.embeddings import RowTable
from penstock.nn.lazy_adam import LazyAdam
from penstock.ops.rows import rows_of
from penstock.tasks.base import Task, Training
from penstock.tasks.click_metrics import AUCError, Calibration, GroupAUC, LogLossError
from penstock.tasks.pretrained import FrozenRows, frozen_rows
from penstock.tasks.search import RetrainStage, SearchStage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class ClickTraining(Training):
    """How a click model is trained."""

    lazy_embeddings: bool = False
    """With adam and adamw: in a step, embeddings (their moments and decay too) of rows that the batch does not hold are left
    alone, so that a step does not cost more with a larger vocabulary. Default: all learn in every step, as published."""


class ClickPrediction(Task):
    """Binary cross-entropy on a model's logits, (ids (B, F), numeric (B, N), sequences (B, S, L)) -> (B,).

    Where rows have weights, each row's loss is multiplied by its own before the mean.

    Metrics: ``auc``, the exact area under the ROC curve; ``log_loss`` in nats; ``calibration``, mean predicted over mean
    observed; and for a table with a column of groups ``group_auc``, the mean AUC within groups. Each has its standard
    error over the choice of rows (or groups) beside it, as ``auc_error``.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("auc", "max")
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {"auc": "max", "log_loss": "min", "group_auc": "max"}

    def __init__(self, model: nn.Module, train: Training, data: Data) -> None:
        super().__init__(model, train, data)
        self._frozen: Sequence[FrozenRows] = ()
        self.lazy = isinstance(train, ClickTraining) and train.lazy_embeddings
        if self.lazy and train.optimizer == "sgd":
            raise UserError("--train.lazy-embeddings goes with --train.optimizer adam or adamw, not sgd")
        for module in model.modules():
            if isinstance(module, RowTable):
                module.sparse = self.lazy

    def on_train_start(self) -> None:
        # Not before: a checkpoint may have been loaded, and the model moved.
        self._frozen = frozen_rows(self.model, self.data)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for rows in self._frozen:
            rows.restore()

    def step(self, batch: TableBatch) -> tuple[Tensor, Tensor]:
        logits_B = self.model(*self.inputs(batch))
        weight = batch.weight.to(logits_B.dtype) if len(batch.weight) else None
        return F.binary_cross_entropy_with_logits(logits_B, batch.label.to(logits_B.dtype), weight), logits_B

    def new_metrics(self) -> MetricCollection:
        found: dict[str, Metric | MetricCollection] = {"auc": BinaryAUROC(thresholds=None), "auc_error": AUCError()}
        found |= {"log_loss_error": LogLossError(), "calibration": Calibration()}
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

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not self.lazy:
            return super().make_optimizer(groups)
        train = self.train_config
        return LazyAdam(groups, lr=train.lr, decoupled_weight_decay=train.optimizer == "adamw")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.lazy and gradient_clip_val:
            clip_norm([p.grad for p in self.model.parameters() if p.grad is not None], float(gradient_clip_val))
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

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
    def predict_file(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 1024
    ) -> pl.DataFrame:
        """Score the rows of a table.

        Returns:
            ``row`` (from 1, in the order of the file) and ``score``, the probability that the label is one.
        """
        return pl.concat(cls.predict_frames(model, spec, path, batch_size))

    @classmethod
    def predict_frames(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 8192
    ) -> Iterator[pl.DataFrame]:
        device = next(model.parameters()).device
        row = 0
        for batch in read_rows(spec, path, batch_size):
            with torch.no_grad():
                scores = model(*(x.to(device) for x in model_inputs(batch))).sigmoid().double().cpu().numpy()
            yield pl.DataFrame({"row": np.arange(row + 1, row + 1 + len(scores)), "score": scores})
            row += len(scores)
        if not row:  # a table without rows has columns, too
            yield pl.DataFrame(schema={"row": pl.Int64, "score": pl.Float64})


def falling_on_plateaus(optimizer: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    """FuxiCTR's rule: after each epoch without a better validation score the learning rate falls tenfold, down to 1e-6."""
    name, mode = task.monitor
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.1, patience=0, threshold=1e-6, threshold_mode="abs", min_lr=1e-6
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": f"val/{name}", "strict": False}}


def clip_norm(grads: list[Tensor], longest: float) -> None:
    """Scale gradients, sparse ones among them, down to a norm of ``longest`` over all; as `torch.nn.utils.clip_grad_norm_`."""
    parts = [rows_of(g)[1] if g.is_sparse else g for g in grads]
    factor = longest / (torch.nn.utils.get_total_norm(parts) + 1e-6)
    for grad in grads:
        grad.mul_(factor.clamp_max(1.0))


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
