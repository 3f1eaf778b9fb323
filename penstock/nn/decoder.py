"""What decoder-only language models share: RMS norm, rotary positions, SwiGLU.

Shape legend: B batch, L length, D width, H heads, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps), times a learned weight; (..., D) -> (..., D).

    Statistics are float32 at least, whatever the input's precision.

    Args:
        dim: width D.
        eps: added to the mean square.
        zero_centred: the weight is stored as its difference from one (Qwen3-Next) and applied before casting back.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, zero_centred: bool = False) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.zero_centred:
            return F.rms_norm(wide, (x.shape[-1],), 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
        return F.rms_norm(wide, (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def rotary_tables(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), angles in float32.

    Args:
        positions: (..., L) integers.
        dim: how many channels rotate, even.
        base: of the geometric series of frequencies.
        dtype: of the result.

    Returns:
        two tensors (..., L, dim): each frequency twice, for the half-split rotation.
    """
    powers = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions[..., None].float() * base**-powers
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHLK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` channels of each head by its position; the rest pass as they are.

    Args:
        x_BHLK: queries or keys.
        cos, sin: (B, L, R) or (L, R) from `rotary_tables`.
    """
    width = cos.shape[-1]
    if not width:
        return x_BHLK
    turned, rest = x_BHLK[..., :width], x_BHLK[..., width:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class SwiGLU(nn.Module):
    """Feed-forward with a SiLU-gated hidden layer (Shazeer 2020): (..., D) -> (..., D).

    Args:
        dim: width D.
        hidden: hidden width F.
        activation: of the gating half.
    """

    def __init__(self, dim: int, hidden: int, *, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.activation = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
