"""What click models follow of FuxiCTR, in whose code and results most of them are published: activations and penalties.

Shape legend: B batch, X width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from penstock.nn.embeddings import FieldEmbedding
from penstock.ops.rows import rows_of, sparse_rows

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


def regularization(model: nn.Module, *, embedding: Regularizer = None, net: Regularizer = None) -> Tensor:
    """FuxiCTR's penalty: sum of (lambda / p) |w|^p over embeddings and first-order weights, and over all else.

    Args:
        model: its tables are the parameters of its `FieldEmbedding`s.
        embedding: lambda with p = 2, or "l1(x)", "l2(x)" or "l1_l2(x,y)".
        net: the same for all other parameters.

    Raises:
        ValueError: for another form.
    """
    total = next(model.parameters()).new_zeros(())
    for w, terms in _penalised(model, embedding, net):
        for power, weight in terms:
            total = total + weight / power * (w.abs().sum() if power == 1 else w.square().sum())
    return total


@torch.no_grad()
def add_regularization(model: nn.Module, *, embedding: Regularizer = None, net: Regularizer = None) -> None:
    """Add the gradients of `regularization` to those that are there: the same, in one pass over the weights.

    Of a table with a sparse gradient only the rows in it are penalised (the lazy form).
    """
    for w, terms in _penalised(model, embedding, net):
        for power, weight in terms:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
            if w.grad.is_sparse:
                rows_U, grad_UD = rows_of(w.grad)
                own_UD = w[rows_U]
                grad_UD.add_(own_UD.sign() if power == 1 else own_UD, alpha=weight)
                w.grad = sparse_rows(rows_U, grad_UD, len(w))
            else:
                w.grad.add_(w.sign() if power == 1 else w, alpha=weight)


def _penalised(
    model: nn.Module, embedding: Regularizer, net: Regularizer
) -> Iterator[tuple[nn.Parameter, list[tuple[int, float]]]]:
    """Every trained parameter that has a penalty, and its (power, weight)s."""
    tables = {p for module in model.modules() if isinstance(module, FieldEmbedding) for p in module.parameters()}
    of_tables, of_net = parse_regularizer(embedding), parse_regularizer(net)
    for p in model.parameters():
        if p.requires_grad and (terms := of_tables if p in tables else of_net):
            yield p, terms


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
