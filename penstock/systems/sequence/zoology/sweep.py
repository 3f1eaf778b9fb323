"""Recall against width: the same task learned by each mixer at several widths, with the best of a few learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from penstock.data.loader import Batches
from penstock.data.recall import RecallData
from penstock.lab.results import Results
from penstock.systems.sequence.zoology.model import LanguageModel
from penstock.tasks.associative_recall import AssociativeRecall, example_means
from penstock.tasks.base import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass
class Sweep:
    """Which cells, and how long each trains."""

    mixers: tuple[str, ...] = ("hybrid", "baseconv", "h3")
    """Arms to sweep."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Widths of the model."""
    lrs: tuple[float, ...] = (5e-3, 1e-2)
    """Learning rates to choose from, by validation accuracy."""
    steps: int = 282
    """Optimiser steps a cell and learning rate; one that has learned the task stops early."""


@dataclass(frozen=True)
class Cell:
    """One mixer at one width, with its best learning rate."""

    accuracy: float
    lr: float
    state_bytes: int | None


def train_cell(build: Callable[[], LanguageModel], data: RecallData, train: Training, sweep: Sweep, seed: int) -> Cell:
    """Train with each learning rate and test the one that is best on the validation split.

    Args:
        build: a fresh model.
        data: what on.
        train: batch size, weight decay.
        sweep: learning rates and steps.
        seed: of weights and order.
    """
    best: tuple[float, Cell] | None = None
    for lr in sweep.lrs:
        torch.manual_seed(seed)
        model = build()
        reached = _train(model, data, train, lr, sweep.steps, seed)
        if best is None or reached > best[0]:
            accuracy = accuracy_of(model, data.test(train.batch_size))
            best = reached, Cell(accuracy, lr, model.state_size(data.spec["window"]))
    assert best is not None
    return best[1]


def _train(model: LanguageModel, data: RecallData, train: Training, lr: float, steps: int, seed: int) -> float:
    """The validation accuracy reached, with a cosine to zero and no warm-up."""
    task = AssociativeRecall(model, train, data)
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.train(train.batch_size, seed)
    done, reached = 0, 0.0
    while done < steps and reached <= task.stop_above:
        task.train()
        for batch in batches:
            loss, _ = task.step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
        reached = accuracy_of(model, data.validation(train.batch_size))
    return reached


@torch.no_grad()
def accuracy_of(model: nn.Module, batches: Batches) -> float:
    """Mean accuracy over the examples, in evaluation mode."""
    model.eval()
    return float(torch.cat([example_means(model(b.inputs).argmax(-1) == b.labels, b.labels) for b in batches]).mean())


def sweep_figure(results: Results, sweep: Sweep) -> Figure:
    """Accuracy against width, and against what must be remembered, a line a mixer; every seed is a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, mixer in enumerate(sweep.mixers):
        points = [
            (width, state, accuracy)
            for width in sweep.widths
            for state, accuracy in zip(
                results.trial("width_sweep", f"{mixer}_{width}_state_bytes"),
                results.trial("width_sweep", f"{mixer}_{width}_accuracy"),
                strict=True,
            )
        ]
        _line(left, [(width, accuracy) for width, _, accuracy in points], mixer, place)
        _line(right, [(state / 1024, accuracy) for _, state, accuracy in points if state], mixer, place)
    left.set(xlabel="width", ylabel="test accuracy", ylim=(-0.03, 1.03))
    right.set(xlabel="state size (KiB)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    left.legend()
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], label: str, place: int) -> None:
    """A marker a seed, and a line through their means."""
    at = sorted({x for x, _ in points})
    means = [sum(y for x, y in points if x == one) / sum(x == one for x, _ in points) for one in at]
    axes.plot(at, means, color=f"C{place}", label=label)
    axes.scatter([x for x, _ in points], [y for _, y in points], color=f"C{place}", s=16)
