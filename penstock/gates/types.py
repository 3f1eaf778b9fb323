"""Gate types that more than one system uses.

Shape legend: B batch, L length, D width, U units, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates.core import Gate, Passes, Routing


class SigmoidGate(Gate):
    """A sigmoid of a linear function of the input: (..., D) -> (..., U), values in (0, 1).

    Args:
        dim: width D of the input.
        units: number U of gate values for each input.
        passes: what the units are.
        bias: whether the linear map has a bias.
        scale: multiplies the sigmoid; 2 makes a gate that starts at one (range (0, 2)).
    """

    def __init__(
        self, dim: int, units: int, *, passes: Passes = "feature", bias: bool = True, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.passes = passes
        self.range = (0.0, scale)
        self.scale = scale
        self.proj = nn.Linear(dim, units, bias=bias)

    def logits(self, x: Tensor) -> Tensor:
        """The values before the sigmoid, (..., U)."""
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid() * self.scale


class ParameterGate(Gate):
    """A learned value a unit that does not depend on the input: () -> (U...), sigmoid of a free parameter.

    Args:
        shape: of the units.
        init: of the parameter before the sigmoid.
        passes: what the units are.
    """

    def __init__(self, *shape: int, init: float = 0.0, passes: Passes = "feature") -> None:
        super().__init__()
        self.passes = passes
        self.logit = nn.Parameter(torch.full(shape, init))

    def logits(self) -> Tensor:
        """The values before the sigmoid."""
        return self.logit

    def forward(self) -> Tensor:
        return self.logit.sigmoid()


class TopKRouter(Gate):
    """Linear router that keeps the K largest logits and takes their softmax: (..., D) -> `Routing`.

    Args:
        dim: width D of the input.
        num_experts: E.
        top_k: K, from 1 to E.
        bias: whether the linear map has a bias.
        noise: learned Gaussian noise on the logits while training (Shazeer et al. 2017, eq. 4).

    Raises:
        ValueError: if ``top_k`` is not between 1 and ``num_experts``.
    """

    passes = "expert"
    kind = "simplex"

    def __init__(self, dim: int, num_experts: int, top_k: int, *, bias: bool = False, noise: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be from 1 to num_experts={num_experts}")
        self.num_experts, self.top_k = num_experts, top_k
        self.proj = nn.Linear(dim, num_experts, bias=bias)
        self.noise = nn.Linear(dim, num_experts, bias=False) if noise else None

    def logits(self, x: Tensor) -> Tensor:
        """(..., E) scores of the experts, noisy while training if asked for."""
        logits = self.proj(x)
        if self.noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        return logits

    def forward(self, x: Tensor) -> Routing:
        logits = self.logits(x)
        kept, indices = logits.topk(self.top_k, dim=-1)
        return Routing(kept.softmax(-1), indices, logits)


class FunctionGate(Gate):
    """A gate from a function, for trying an idea: ``FunctionGate(torch.sigmoid)``."""

    def __init__(self, function: Callable[..., Tensor], *, passes: Passes = "feature") -> None:
        super().__init__()
        self.function = function
        self.passes = passes

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)
