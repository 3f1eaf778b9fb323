"""Search, harden, rewind, train again: the two stages of papers that first decide what a network keeps.

The search trains weights and gates together while a temperature sharpens the gates, and takes a snapshot of the weights
early on. Then the gates are made hard, the weights go back to the snapshot, and the network is trained again with its
gates fixed. Both stages are mixins: put one before the task that says what is learned, and run them as two `Stage`s:

    class ClickSearch(SearchStage, ClickPrediction): ...
    class ClickRetrain(RetrainStage, ClickPrediction): ...

    searching = ClickSearch(model, train, data, search, penalty_weight=0.1)  # first stage
    retraining = ClickRetrain(model, train, data, searching)  # second stage, built when the first has finished
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from penstock.data.base import Data
from penstock.tasks.base import Task, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class Searchable(Protocol):
    """What a model must offer to be searched."""

    def gate_parameters(self) -> Iterable[nn.Parameter]:
        """What the search decides; may be empty (an ungated twin)."""

    def set_temperature(self, temperature: float) -> None:
        """Sharpen the gates; the model must hold the temperature in a buffer."""

    def penalty(self) -> Tensor:
        """How open the gates are, to be kept small."""

    def kept_share(self) -> float:
        """Share of what is gated that would be kept if the gates were hardened now."""

    def harden(self) -> None:
        """Decide: from here on gates are what they were rounded to, also after loading the state."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights a rewind puts back, without gates."""

    def rewind(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put them back."""


@dataclass
class Search:
    """How gates are searched for."""

    epochs: int = 8
    """Passes over the training split before gates are made hard; at least 2."""
    rewind_epoch: int = 1
    """Weights go back to what they were at the start of this epoch, from 0."""
    final_temperature: float = 200.0
    """Of the gates in the last epoch; the first has 1, and it grows by the same factor each epoch."""

    def check(self) -> None:
        """Raise `ValueError` for settings that give no search."""
        if self.epochs < 2:
            raise ValueError(f"search.epochs={self.epochs}: the temperature needs 2 epochs or more to rise")
        if not 0 <= self.rewind_epoch < self.epochs:
            raise ValueError(
                f"search.rewind_epoch={self.rewind_epoch} must be from 0 to {self.epochs - 1}, an epoch of the search"
            )
        if not self.final_temperature > 0:
            raise ValueError(f"search.final_temperature={self.final_temperature} must be above 0")

    def temperature(self, epoch: int) -> float:
        """Of an epoch: 1 in the first, ``final_temperature`` in the last, geometric between."""
        return float(self.final_temperature ** (epoch / (self.epochs - 1)))


class Record(TypedDict):
    """One epoch of a search."""

    epoch: int
    temperature: float
    kept: float


class _Staged(Task):
    """What both stages share: gates apart from weights in the optimiser, and the record of the search."""

    def __init__(self, model: nn.Module, train: Training, data: Data) -> None:
        super().__init__(model, train, data)
        if not isinstance(model, Searchable):
            raise TypeError(
                f"{type(model).__name__} does not offer what a search needs (penstock.tasks.search.Searchable)"
            )
        self.record: list[Record] = []

    @property
    def searched(self) -> Searchable:
        """The model, as what it offers to a search."""
        assert isinstance(self.model, Searchable)
        return self.model

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights with decay, as the papers have it; gates without, and only while they can learn."""
        gates = [p for p in self.searched.gate_parameters() if p.requires_grad]
        frozen = {id(p) for p in self.searched.gate_parameters()}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in frozen]
        groups = [
            {"params": weights, "weight_decay": self.train_config.weight_decay},
            {"params": gates, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["search_record"] = [dict(one) for one in self.record]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.record = checkpoint["search_record"]


class SearchStage(_Staged):
    """First stage: weights and gates together, with the penalty, to the end of the schedule.

    Args:
        model: a `Searchable`.
        train: of the whole run; its budget is replaced by the search's, and there is no early stopping.
        data: what on.
        search: the schedule.
        penalty_weight: of the model's penalty in the loss, 0 or more.
    """

    def __init__(self, model: nn.Module, train: Training, data: Data, search: Search, *, penalty_weight: float) -> None:
        search.check()
        if penalty_weight < 0:
            raise ValueError(f"penalty_weight={penalty_weight} must not be below 0")
        super().__init__(model, replace(train, steps=0, epochs=search.epochs, validate_every=0, patience=0), data)
        self.search = search
        self.penalty_weight = penalty_weight
        self.snapshot: dict[str, Tensor] | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Not at the start or end of epochs, which a run resumed between batches may not see.
        self._record_epochs_before(self.current_epoch)
        self.searched.set_temperature(self.search.temperature(self.current_epoch))
        if self.snapshot is None and self.current_epoch >= self.search.rewind_epoch:
            self.snapshot = self.searched.snapshot()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = self.searched.penalty()
        self.log("train/penalty", penalty.detach(), batch_size=self.size(batch))
        return super().training_step(batch, batch_idx) + self.penalty_weight * penalty

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/kept", self.searched.kept_share())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["search_snapshot"] = self.snapshot

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.snapshot = checkpoint["search_snapshot"]

    def finish(self) -> None:
        """Make the gates hard and rewind the weights."""
        assert self.snapshot is not None, "the search ended before its rewind epoch"
        self._record_epochs_before(self.search.epochs)
        self.searched.harden()
        self.searched.rewind(self.snapshot)

    def _record_epochs_before(self, epoch: int) -> None:
        if (last := len(self.record)) < epoch:
            temperature = self.search.temperature(last)
            self.record.append({"epoch": last, "temperature": temperature, "kept": self.searched.kept_share()})


class RetrainStage(_Staged):
    """Second stage: weights alone, by the run's own budget and early stopping, with the gates as they are.

    Args:
        model: a `Searchable`.
        train: of the run.
        data: what on.
        search: the first stage, which is finished here; ``None`` for a twin that was never searched.
    """

    def __init__(self, model: nn.Module, train: Training, data: Data, search: SearchStage | None = None) -> None:
        super().__init__(model, train, data)
        if search is not None:
            search.finish()
            self.record = search.record
        for parameter in self.searched.gate_parameters():
            parameter.requires_grad_(False)

    def figures(self) -> dict[str, Figure]:
        return super().figures() | ({"What the search kept": record_figure(self.record)} if self.record else {})


def record_figure(record: list[Record]) -> Figure:
    """The share kept after each epoch of the search, and the temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    epochs = [one["epoch"] + 1 for one in record]
    axes.plot(epochs, [one["kept"] for one in record], marker="o", label="kept if hardened now")
    axes.set(xlabel="epoch of the search", ylabel="share kept", ylim=(0, 1.03))
    other = axes.twinx()
    other.plot(epochs, [one["temperature"] for one in record], linestyle=":", color="grey")
    other.set(yscale="log", ylabel="temperature (dotted)")
    return figure
