"""What click models are judged by beside the area under the ROC curve of all rows: within groups, and calibration.

Shape legend: B rows of a batch, N rows of a split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_SUMS = ("predicted", "observed", "squares", "products")


class AUCError(Metric):
    """Standard error of the area under the ROC curve over the choice of rows (DeLong et al. 1988).

    An interval of 1.96 of them around the AUC covers the true one in 95 of 100 test sets, where seeds vary the model.
    """

    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores_B: Tensor, labels_B: Tensor) -> None:
        """Take in probabilities or logits and labels 0 or 1."""
        self.scores.append(scores_B.detach().double())
        self.labels.append(labels_B)

    def compute(self) -> Tensor:
        """Of all rows so far; NaN if a class has fewer than two."""
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        ones, zeros = scores[labels > 0], scores[labels <= 0]
        if min(len(ones), len(zeros)) < 2:
            return torch.tensor(math.nan)
        # Each row's share of the other class that it is rightly ranked against, by mid-ranks.
        among_all, among_ones, among_zeros = (_mid_ranks(x) for x in (torch.cat([ones, zeros]), ones, zeros))
        share_ones = (among_all[: len(ones)] - among_ones) / len(zeros)
        share_zeros = 1 - (among_all[len(ones) :] - among_zeros) / len(ones)
        return (share_ones.var() / len(ones) + share_zeros.var() / len(zeros)).sqrt().float()


class GroupAUC(Metric):
    """Mean area under the ROC curve within groups (users, sessions), weighted by their rows, and its standard error.

    Groups whose rows all have one label have no such area and are left out, as usual (Zhu et al. 2017).
    The error is over the choice of groups, however alike the rows of one are.
    """

    scores: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "labels", "groups"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores_B: Tensor, labels_B: Tensor, groups_B: Tensor) -> None:
        """Take in probabilities or logits, labels 0 or 1, and whole numbers that tell groups apart."""
        self.scores.append(scores_B.detach().double())
        self.labels.append(labels_B)
        self.groups.append(groups_B)

    def compute(self) -> dict[str, Tensor]:
        """``group_auc`` and ``group_auc_error`` of all rows so far; NaN if no group has both labels."""
        scores, labels, groups = (dim_zero_cat(x) for x in (self.scores, self.labels, self.groups))
        _, group = groups.unique(return_inverse=True)
        number = int(group.max()) + 1
        # Ranks within groups: sort by score, then stably by group; equal scores share their mean rank.
        order = scores.argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        group, scores, ones = group[order], scores[order], (labels[order] > 0).double()
        rows = torch.bincount(group, minlength=number)
        first = rows.cumsum(0) - rows
        rank = (torch.arange(1, len(group) + 1, device=group.device) - first[group]).double()
        fresh = torch.ones_like(group, dtype=torch.bool)
        fresh[1:] = (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])
        run = fresh.cumsum(0) - 1
        zeros = torch.zeros(int(run[-1]) + 1, dtype=rank.dtype, device=rank.device)
        mean_rank = (zeros.index_add(0, run, rank) / torch.bincount(run))[run]
        positives = torch.zeros(number, dtype=rank.dtype, device=rank.device).index_add(0, group, ones)
        total = torch.zeros_like(positives).index_add(0, group, ones * mean_rank)
        negatives = rows - positives
        both = (positives > 0) & (negatives > 0)
        area = (total - positives * (positives + 1) / 2) / (positives * negatives)
        area, weight = area[both], rows[both] / rows[both].sum()
        mean = (area * weight).sum() if len(area) else torch.tensor(math.nan)
        error = (weight * (area - mean)).square().sum().sqrt()
        return {"group_auc": mean.float(), "group_auc_error": error.float()}


class Calibration(Metric):
    """Mean predicted over mean observed label, and its standard error.

    1 is right on the whole, above it clicks are promised that do not come.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities_B: Tensor, labels_B: Tensor) -> None:
        """Take in probabilities and labels 0 or 1."""
        p_B, y_B = probabilities_B.detach().double(), labels_B.double()
        for name, x_B in zip(_SUMS, (p_B, y_B, p_B.square(), p_B * y_B), strict=True):
            setattr(self, name, getattr(self, name) + x_B.sum())

    def compute(self) -> dict[str, Tensor]:
        """``calibration`` and ``calibration_error`` (of a ratio of means, to first order) of all rows so far."""
        predicted, observed, squares, products = (getattr(self, name) for name in _SUMS)
        ratio = predicted / observed
        # The sum of (p - ratio y)^2, in which y^2 is y.
        around = squares - 2 * ratio * products + ratio.square() * observed
        return {"calibration": ratio.float(), "calibration_error": (around.clamp_min(0).sqrt() / observed).float()}


class LogLossError(Metric):
    """Standard error of the mean log loss over the choice of rows."""

    rows: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("rows", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities_B: Tensor, labels_B: Tensor) -> None:
        """Take in probabilities and labels 0 or 1."""
        p_B = probabilities_B.detach().double()
        loss_B = -torch.where(labels_B > 0, p_B, 1 - p_B).clamp_min(torch.finfo(p_B.dtype).tiny).log()
        self.rows += len(loss_B)
        self.total += loss_B.sum()
        self.squares += loss_B.square().sum()

    def compute(self) -> Tensor:
        """Of all rows so far."""
        mean = self.total / self.rows
        return ((self.squares / self.rows - mean.square()).clamp_min(0) / self.rows).sqrt().float()


def _mid_ranks(x_N: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean."""
    _, place, counts = x_N.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
