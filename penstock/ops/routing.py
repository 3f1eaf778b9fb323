"""Pieces of differentiable routing: smooth steps, binary trees, Sinkhorn permutations, grouped products.

Shape legend: N entries (experts, leaves), G groups, I input width, O output width; ``...`` any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

Backend = Literal["auto", "reference", "grouped_mm"]


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """A sigmoid that is exactly 0 below -gamma/2 and exactly 1 above gamma/2, cubic and once differentiable.

    Its gradient outside the window is exactly zero: a saturated step no longer learns.

    Args:
        t: any shape.
        gamma: width of the window, above 0.

    Source: Hazimeh et al. 2020, "The Tree Ensemble Layer".
    """
    v = (t / gamma + 0.5).clamp(0, 1)
    return v * v * (3 - 2 * v)


def branch(mass: Tensor, left: Tensor) -> Tensor:
    """Divide each entry between two children: (..., N), shares (..., N) of the left ones -> (..., 2N), left first."""
    to_left = mass * left
    return torch.stack([to_left, mass - to_left], -1).flatten(-2)


def entropy(p: Tensor, eps: float = 1e-6) -> Tensor:
    """-sum p log(p + eps) over the last axis, nats: (..., N) -> (...); rows need not sum to one."""
    return -(p * (p + eps).log()).sum(-1)


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Scale exp(scores) towards a doubly stochastic matrix by normalising rows, then columns, in log space.

    Args:
        scores: (..., N, N); divide by a temperature to approach the permutation of the largest total score.
        iterations: of both normalisations; few of them leave the rows not quite summing to one.

    Returns:
        (..., N, N) in [0, 1], columns summing to one.

    Source: Mena et al. 2018, "Learning Latent Permutations with Gumbel-Sinkhorn Networks".
    """
    for _ in range(iterations):
        scores = scores.log_softmax(-1).log_softmax(-2)
    return scores.exp()


def assignment(scores: Tensor) -> Tensor:
    """The permutation matrix that collects the largest total score; no gradient.

    Args:
        scores: (..., N, N).

    Returns:
        (..., N, N), row i has its one in the column assigned to i; ties keep the lowest column.

    Raises:
        ValueError: if a score is not a number.
    """
    flat = scores.detach().flatten(0, -3) if scores.ndim > 2 else scores.detach()[None]
    if flat.isnan().any():
        raise ValueError("cannot assign by scores that are not numbers (NaN)")
    columns = [torch.from_numpy(linear_sum_assignment(one.double().cpu().numpy(), maximize=True)[1]) for one in flat]
    hard = F.one_hot(torch.stack(columns), scores.shape[-1])
    return hard.reshape(scores.shape).to(scores)


def grouped_matmul(x: Tensor, weight: Tensor, counts: Sequence[int], *, backend: Backend = "auto") -> Tensor:
    """Multiply consecutive groups of rows, each by its own matrix.

    Args:
        x: (N, I), the rows of group 0 first, then those of group 1, ...
        weight: (G, I, O).
        counts: rows in each of the G groups (may be 0); they sum to N.
        backend: "reference" is one product a group, for any dtype; "grouped_mm" is PyTorch's fused kernel
            (float32, bfloat16, float16; rows of whole 16 bytes); "auto" takes the fused one on CUDA where it can.

    Returns:
        (N, O).
    """
    if backend == "auto":
        backend = "grouped_mm" if x.is_cuda and _fits_grouped_mm(x, weight) else "reference"
    if backend == "reference" or not len(x):  # without rows the fused kernel has no backward
        return torch.cat([rows @ matrix for rows, matrix in zip(x.split(list(counts)), weight.unbind(), strict=True)])
    ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
    y = F.grouped_mm(x.contiguous(), weight, offs=ends)
    if y.requires_grad:
        # Its backward refuses broadcast gradients, such as those of y.sum().
        y.register_hook(Tensor.contiguous)
    return y


def _fits_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    return aligned and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
