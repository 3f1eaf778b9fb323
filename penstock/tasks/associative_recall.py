"""Associative recall: name the value that stood beside a key the last time.

Shape legend: B batch, L length, V vocabulary, N asked positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from penstock.data.base import Data
from penstock.data.recall import UNLABELLED, RecallBatch, read_numbered
from penstock.errors import UserError
from penstock.nn.experts import collect_losses
from penstock.tasks.base import Task, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Outputs(NamedTuple):
    """What a step hands to the metrics: logits (B, L, V), and the cross-entropy without auxiliary losses."""

    logits: Tensor
    loss: Tensor


class AssociativeRecall(Task):
    """Cross-entropy at the labelled positions; the model maps (B, L) tokens to (B, L, V) logits.

    A batch is a `RecallBatch`. What modules add with `penstock.nn.experts.add_loss` is trained on and left out of the
    reported loss. Trained as the paper does: all parameters decay; where there is no warm-up, the learning rate is
    constant within an epoch and goes to zero by a cosine over the epochs; training ends when the validation accuracy is
    above ``stop_above``.

    Metrics: ``accuracy``, the mean over examples of the mean over an example's labelled positions; where the test holds
    several lengths or numbers of labelled positions, ``accuracy_length_<T>`` and ``accuracy_pairs_<N>`` too;
    ``from_context``, the share of answers that are some label of the example: without the binding of keys to values,
    ``accuracy`` stops at 1/N of it.

    Args:
        model, train, data: see `Task`.
        stop_above: validation accuracy at which training ends; 1 trains to the end.

    Source: Arora et al. 2023, sec. 4 and appendix; HazyResearch/zoology.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {"accuracy": "max", "loss": "min"}

    def __init__(self, model: nn.Module, train: Training, data: Data, *, stop_above: float = 0.99) -> None:
        super().__init__(model, train, data)
        self.stop_above = stop_above

    def step(self, batch: RecallBatch) -> tuple[Tensor, Outputs]:
        with collect_losses() as auxiliary:
            logits = self.model(batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=UNLABELLED)
        return loss + sum(auxiliary.values()), Outputs(logits, loss)

    def reported_loss(self, loss: Tensor, outputs: Outputs, batch: RecallBatch) -> Tensor:
        return outputs.loss

    def new_metrics(self) -> MetricCollection:
        return MetricCollection({name: MeanMetric() for name in ("accuracy", "from_context", *self._slices())})

    def _slices(self) -> list[str]:
        spec = self.data.spec
        lengths = [f"accuracy_length_{length}" for length in spec["lengths"]]
        pairs = [f"accuracy_pairs_{number}" for number in spec["pairs"]]
        return [*(lengths if len(lengths) > 1 else ()), *(pairs if len(pairs) > 1 else ())]

    def update(self, metrics: MetricCollection, outputs: Outputs, batch: RecallBatch) -> None:
        answers, labels = outputs.logits.argmax(-1), batch.labels
        accuracy_B = example_means(answers == labels, labels)
        among = (answers[:, :, None] == labels[:, None, :]).any(-1)
        metrics["accuracy"].update(accuracy_B)
        metrics["from_context"].update(example_means(among, labels))
        asked_B = (labels != UNLABELLED).sum(1)
        for name in self._slices():
            _, kind, value = name.split("_")
            rows = asked_B == int(value) if kind == "pairs" else torch.full_like(asked_B, labels.shape[1]) == int(value)
            if rows.any():
                metrics[name].update(accuracy_B[rows])

    def inputs(self, batch: RecallBatch) -> tuple[Tensor]:
        return (batch.inputs,)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{"params": trained, "weight_decay": self.train_config.weight_decay}]

    def _rate(self, step: int, total: int) -> float:
        train = self.train_config
        if train.schedule != "cosine" or train.warmup:
            return super()._rate(step, total)
        batches = len(self.data.train(train.batch_size, self.seed))
        return (1 + math.cos(math.pi * (step // batches) / math.ceil(total / batches))) / 2

    def on_validation_epoch_end(self) -> None:
        accuracy = float(self.metrics["validation"]["accuracy"].compute())
        super().on_validation_epoch_end()
        if accuracy > self.stop_above:
            self.trainer.should_stop = True

    def figures(self) -> dict[str, Figure]:
        device = next(self.model.parameters()).device
        distances, correct = [], []
        with torch.no_grad():
            for batch in self.data.test(self.train_config.batch_size):
                answers = self.model(batch.inputs.to(device)).argmax(-1).cpu()
                asked = batch.labels != UNLABELLED
                distances.append(key_distances(batch.inputs)[asked])
                correct.append((answers == batch.labels)[asked])
        return {"Accuracy by distance to the key (test)": distance_figure(torch.cat(distances), torch.cat(correct))}

    @classmethod
    @torch.no_grad()
    def predict_file(
        cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 1024
    ) -> pl.DataFrame:
        """Answer the labelled positions of a .npz or .jsonl file.

        Returns:
            one row an answer, in the order of the file: ``row`` and ``position`` from 1, the ``token`` that asks, the
            ``label``, the model's ``answer`` and its ``probability``, and whether it is ``correct``.

        Raises:
            UserError: for a file that cannot be read, or tokens and lengths the model has never seen.
        """
        device = next(model.parameters()).device
        columns: dict[str, list[Tensor]] = {
            name: [] for name in ("row", "position", "token", "label", "answer", "probability")
        }
        for numbers, segment in read_numbered(path):
            _check_fits(path, numbers, segment, spec)
            for rows in torch.arange(len(numbers)).split(batch_size):
                inputs, labels = segment.inputs[rows], segment.labels[rows]
                best = model(inputs.to(device)).float().softmax(-1).cpu().max(-1)
                example, position = (labels != UNLABELLED).nonzero(as_tuple=True)
                found = (numbers[rows][example], position + 1, *(
                    part[example, position] for part in (inputs, labels, best.indices, best.values)
                ))  # fmt: skip
                for column, values in zip(columns.values(), found, strict=True):
                    column.append(values)
        frame = pl.DataFrame({name: torch.cat(parts).numpy() for name, parts in columns.items()})
        return frame.with_columns(correct=pl.col("answer") == pl.col("label")).sort("row", "position")


def example_means(hits_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """Each example's share of hits among its labelled positions, (B, L) boolean -> (B,)."""
    asked_BL = labels_BL != UNLABELLED
    return (hits_BL & asked_BL).sum(1) / asked_BL.sum(1)


def key_distances(inputs_BL: Tensor) -> Tensor:
    """How many positions before stood the same token last, (B, L); 0 where it is new."""
    length = inputs_BL.shape[1]
    same_BLL = (inputs_BL[:, :, None] == inputs_BL[:, None, :]).tril(-1)
    latest_BL = (same_BLL * torch.arange(1, length + 1)).amax(-1)
    return torch.where(latest_BL > 0, torch.arange(1, length + 1) - latest_BL, 0)


def distance_figure(distances: Tensor, correct: Tensor, bins: int = 8) -> Figure:
    """Accuracy of the answers in groups of equal size, from the nearest key to the farthest.

    Args:
        distances: (N,) as `key_distances` gives them.
        correct: (N,) boolean.
        bins: groups at most.
    """
    from matplotlib.figure import Figure

    edges = np.unique(np.quantile(distances.numpy(), np.linspace(0, 1, bins + 1)).astype(int))
    group = np.clip(np.searchsorted(edges, distances.numpy(), side="right") - 1, 0, max(len(edges) - 2, 0))
    present = np.unique(group)
    spans = [(int(distances.numpy()[group == g].min()), int(distances.numpy()[group == g].max())) for g in present]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(present)), [float(correct.numpy()[group == g].mean()) for g in present])
    axes.set(
        xticks=range(len(present)),
        xticklabels=[str(low) if low == high else f"{low}-{high}" for low, high in spans],
        xlabel="positions since the key",
        ylabel="accuracy",
        ylim=(0, 1.03),
    )
    return figure


def _check_fits(path: Path, numbers: Tensor, segment: RecallBatch, spec: Mapping[str, Any]) -> None:
    if segment.inputs.shape[1] > spec["window"]:
        raise UserError(
            f"{path}: row {int(numbers[0])}: length {segment.inputs.shape[1]}; the model was trained for up to {spec['window']}"
        )
    too_large = (torch.maximum(segment.inputs, segment.labels) >= spec["vocab_size"]).any(1)
    if too_large.any():
        row = int(too_large.int().argmax())
        token = int(torch.maximum(segment.inputs[row], segment.labels[row]).max())
        raise UserError(
            f"{path}: row {int(numbers[row])}: token {token}; the model knows tokens 0 to {spec['vocab_size'] - 1}"
        )
