"""What all tasks share: the optimiser, its schedule, and the training, validation and test steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning as L
import polars as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from penstock.data.base import Data
from penstock.gates import Gate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Training:
    """How an arm is trained; every arm of a run has the same budget."""

    steps: int = 400
    """Optimiser steps; 0 counts by `epochs` instead."""
    epochs: int = 0
    """Passes over the training split, where `steps` is 0."""
    batch_size: int = 32
    """Samples a step, over all processes together."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw decays weights apart from the gradient; adam and sgd add weight_decay * w to it."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Of matrices; gates, biases and norms have none."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    """Of the learning rate: flat, cosine to a tenth, or up and down once."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero (not for constant)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    validate_every: int = 0
    """Steps between validations; 0: after each epoch, or ten times where `steps` counts."""
    validate_batches: int = 0
    """Batches a validation looks at; 0: the whole split. The test always sees all of its own."""
    patience: int = 0
    """Stop after so many validations without improvement and keep the best weights; 0 trains to the end."""


class Task(L.LightningModule):
    """A model being trained on one kind of problem.

    A task defines `step`, `new_metrics` and `update`; a system that trains in its own way overrides just what
    differs. Metrics end in ``results.json`` under the names `new_metrics` gives them, beside ``loss``.

    Args:
        model: the arm to train.
        train: how.
        data: what on; kept for its ``spec`` and figures, not trained on directly.
    """

    #: The validation metric that early stopping and the best checkpoint follow, and whether more is better.
    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    #: The metrics a person compares by, most telling first, and whether more is better.
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {"loss": "min"}

    def __init__(self, model: nn.Module, train: Training, data: Data) -> None:
        super().__init__()
        self.model = model
        self.train_config = train
        self.data = data
        self.seed = 0
        self.metrics: Mapping[str, MetricCollection] = nn.ModuleDict(  # type: ignore[assignment]
            {"validation": self.new_metrics(), "testing": self.new_metrics()}
        )
        self._sums: dict[str, list[float]] = {}

    # -- what a task defines ---------------------------------------------------------------------------------

    @abstractmethod
    def step(self, batch: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch, to be minimised, and whatever `update` needs."""

    @abstractmethod
    def new_metrics(self) -> MetricCollection:
        """Fresh metrics of a split, by the names they have in ``results.json``."""

    @abstractmethod
    def update(self, metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        """Add a batch's outputs to a split's metrics."""

    def reported_loss(self, loss: Tensor, outputs: Any, batch: Any) -> Tensor:
        """The loss that is logged and compared; default: `step`'s own. Override to leave regularisers out."""
        return loss

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics computed from the others, as perplexity from the loss."""
        return {}

    def size(self, batch: Any) -> int:
        """How many samples are in a batch."""
        first = batch
        while not isinstance(first, Tensor):
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
        return len(first)

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """The model's positional arguments for a batch, as used for cost and export."""

    def figures(self) -> dict[str, Figure]:
        """Pictures a person wants to see of the trained model, by title."""
        return {}

    @classmethod
    def speed(cls, build: Callable[[Mapping[str, Any]], nn.Module], spec: Mapping[str, Any]) -> dict[str, float]:
        """How fast a model is at several sizes of input, by a name with its unit; for `penstock compare`.

        Args:
            build: makes the model (with fresh weights) for data of a ``spec``.
            spec: of the data.
        """
        return {}

    @classmethod
    @abstractmethod
    def predict_file(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 1024
    ) -> pl.DataFrame:
        """Apply a trained model to the user's data: one row a sample."""

    @classmethod
    def predict_frames(cls, model: nn.Module, spec: Mapping[str, Any], path: Path) -> Iterator[pl.DataFrame]:
        """The same in pieces, one or more; a task whose data may not fit in memory overrides it."""
        with torch.no_grad():
            frame = cls.predict_file(model, spec, path)
        yield frame

    # -- what Lightning calls --------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, outputs = self.step(batch)
        self.log("train/loss", self.reported_loss(loss, outputs, batch).detach(), batch_size=self.size(batch))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("validation", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("testing", batch)

    def on_validation_epoch_end(self) -> None:
        self._finish("validation", "val")

    def on_test_epoch_end(self) -> None:
        self._finish("testing", "test")

    def _evaluate(self, split: str, batch: Any) -> None:
        loss, outputs = self.step(batch)
        total = self._sums.setdefault(split, [0.0, 0.0])
        total[0] += float(self.reported_loss(loss, outputs, batch)) * self.size(batch)
        total[1] += self.size(batch)
        self.update(self.metrics[split], outputs, batch)

    def _finish(self, split: str, prefix: str) -> None:
        total, count = self.trainer.strategy.reduce(
            torch.tensor(self._sums.pop(split), dtype=torch.float64), reduce_op="sum"
        ).tolist()
        values = {"loss": total / max(count, 1)}
        values |= {name: float(value) for name, value in self.metrics[split].compute().items()}
        self.metrics[split].reset()
        values |= self.derived(values)
        for name, value in values.items():
            self.log(f"{prefix}/{name}", value, rank_zero_only=False, sync_dist=False)

    # -- the optimiser ---------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights with decay; gates, biases, norms and whatever the model exempts without."""
        gates = {id(p) for m in self.model.modules() if isinstance(m, Gate) for p in m.parameters()}
        no_decay: Callable[[], set[str]] = getattr(self.model, "no_weight_decay", set)
        exempt = no_decay()
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                bare = parameter.ndim < 2 or id(parameter) in gates or name in exempt
                (free if bare else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.train_config.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The configured optimiser of these groups."""
        train = self.train_config
        if train.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=train.lr)
        # One pass over weights, gradients and moments instead of a dozen.
        return (torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam)(groups, lr=train.lr, fused=True)

    def configure_optimizers(self) -> Any:
        train = self.train_config
        optimizer = self.make_optimizer(self.parameter_groups())
        if train.schedule == "constant":
            return optimizer
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int, total: int) -> float:
        """The learning rate's factor at a step: up linearly in the warm-up, then down by a cosine."""
        train = self.train_config
        rise = max(int(total * (0.3 if train.schedule == "one-cycle" else train.warmup)), 1)
        if step < rise:
            return (step + 1) / rise
        progress = min((step - rise) / max(total - rise, 1), 1.0)
        floor = 0.0 if train.schedule == "one-cycle" else 0.1
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
