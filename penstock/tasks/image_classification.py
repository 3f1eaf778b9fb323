"""Image classification: cross-entropy, accuracy, a confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from penstock.data import Batches
from penstock.data.images import ImageBatch, ImageData, normalise, read_unlabelled
from penstock.tasks.base import Task, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ImageClassification(Task):
    """A model (B, C, H, W) -> logits (B, classes), trained by cross-entropy.

    Args:
        model: the arm to train.
        train: how.
        data: what on.
        label_smoothing: share of the target spread over all classes while training, in [0, 1).
    """

    monitor = ("accuracy", "max")
    leaderboard: ClassVar[Mapping[str, Literal["min", "max"]]] = {"accuracy": "max", "loss": "min"}
    data: ImageData

    def __init__(self, model: nn.Module, train: Training, data: ImageData, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model, train, data)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        self.label_smoothing = label_smoothing

    def step(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.images)
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing), logits

    def new_metrics(self) -> MetricCollection:
        classes = len(self.data.spec["classes"])
        metrics = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if classes > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        # Not grouped: torchmetrics takes metrics that agree on the first batch for the same metric.
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: ImageBatch) -> None:
        metrics.update(outputs, batch.labels)

    def inputs(self, batch: ImageBatch) -> tuple[Tensor]:
        return (batch.images,)

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix of the test split."""
        return {"Confusion matrix (test)": confusion_figure(self.confusion(), self.data.spec["classes"])}

    def confusion(self) -> Tensor:
        """How many test images of each class (rows) were taken for each class (columns)."""
        classes = len(self.data.spec["classes"])
        predicted, labels = predict(self.model, self.data.test(256))
        pairs = labels * classes + predicted.argmax(-1)
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    @classmethod
    def predict_file(cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 256) -> pl.DataFrame:
        """Classify images: one row an image with ``file``, ``prediction`` and ``probability CLASS`` for each class.

        Args:
            model: a trained model.
            spec: of the data it was trained on.
            path: an image, a folder of images (nested or flat), or an ``.npz`` with images.
            batch_size: images at a time.

        Raises:
            UserError: if the images cannot be read.
        """
        names, pixels = read_unlabelled(Path(path), spec)
        unknown = torch.zeros(len(pixels), dtype=torch.int64)
        batches = Batches(
            lambda rows: ImageBatch(normalise(pixels(rows), spec), unknown[rows]), len(pixels), batch_size
        )
        probabilities = predict(model, batches)[0].softmax(-1)
        classes = spec["classes"]
        best = probabilities.argmax(-1).tolist()
        columns = {f"probability {name}": probabilities[:, i].tolist() for i, name in enumerate(classes)}
        return pl.DataFrame({"file": names, "prediction": [classes[i] for i in best]} | columns)


@torch.no_grad()
def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in evaluation mode, and labels (N,), of all batches, on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        found = [(model(batch.images.to(device)).float().cpu(), batch.labels) for batch in batches]
    finally:
        model.train(training)
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of images that the model puts in their class."""
    logits, labels = predict(model, batches)
    return float((logits.argmax(-1) == labels).double().mean())


def confusion_figure(counts: Tensor, classes: list[str]) -> Figure:
    """A confusion matrix as shares of each true class, with the counts where they can be read."""
    from matplotlib.figure import Figure

    size = min(max(3.5, 0.45 * len(classes) + 1.5), 12.0)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for true, row in enumerate(counts.tolist()):
            for taken, count in enumerate(row):
                if count:
                    colour = "white" if shares[true, taken] > 0.5 else "black"
                    axes.text(taken, true, str(count), ha="center", va="center", fontsize=7, color=colour)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    return figure
