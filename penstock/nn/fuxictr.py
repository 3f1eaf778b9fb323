"""What click models follow of FuxiCTR, in whose code and results most of them are published: activations and penalties.

Shape legend: B batch, X width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: A weight of half the sum of squares, or "l1(x)", "l2(x)", "l1_l2(x,y)".
Regularizer: TypeAlias = float | str | None


class Dice(nn.Module):
    """x (p + alpha (1 - p)) with p = sigmoid of the normalised x: (B, X) -> (B, X) (Zhou et al. 2018, eq. 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-9, momentum=0.01)
        self.alpha = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BX: Tensor) -> Tensor:
        p_BX = self.bn(x_BX).sigmoid()
        return x_BX * (p_BX + self.alpha * (1 - p_BX))


def activation(name: str, dim: int) -> nn.Module:
    """A fresh activation for a layer of width ``dim``.

    Args:
        name: relu, sigmoid, tanh, softmax, prelu or dice in any case, or the name of a class in ``torch.nn``.

    Raises:
        ValueError: for a name that is neither.
    """
    known: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "softmax": partial(nn.Softmax, dim=-1),
        "prelu": partial(nn.PReLU, dim, init=0.1),
        "dice": partial(Dice, dim),
    }
    if name.lower() in known:
        return known[name.lower()]()
    try:
        made = getattr(nn, name)()
    except (AttributeError, TypeError):
        made = None
    if not isinstance(made, nn.Module):
        raise ValueError(f"activation {name!r}: it must be one of {', '.join(known)}, or an activation of torch.nn")
    return made


def penalty(parameters: Iterable[Tensor], terms: Iterable[tuple[int, float]]) -> Tensor | float:
    """Sum of (weight / power) |w|^power over all numbers of ``parameters`` and all ``terms``, see `parse_regularizer`."""
    parameters = list(parameters)
    return sum(
        weight / power * (w.abs().sum() if power == 1 else w.square().sum())
        for power, weight in terms
        for w in parameters
    )


def parse_regularizer(regularizer: Regularizer) -> list[tuple[int, float]]:
    """(power, weight) of each term.

    Args:
        regularizer: a number x (the same as "l2(x)"), "l1(x)", "l2(x)", "l1_l2(x,y)", or ``None``.

    Raises:
        ValueError: for anything else, or a negative weight.
    """
    if regularizer is None:
        return []
    text = str(regularizer).replace(" ", "")
    found = re.fullmatch(r"(?:(l1|l2|l1_l2)\((.+)\)|([^()]+))", text)
    powers = {"l1": [1], "l2": [2], "l1_l2": [1, 2], None: [2]}[found[1]] if found else []
    try:
        weights = [float(part) for part in (found[2] or found[3]).split(",")] if found else []
    except ValueError:
        weights = []
    if not weights or len(weights) != len(powers) or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(
            f"regularizer {regularizer!r}: it must be a number of 0 or more, 'l1(x)', 'l2(x)' or 'l1_l2(x,y)'"
        )
    return [(power, weight) for power, weight in zip(powers, weights, strict=True) if weight]
