"""Queries, keys and values whose smoothness is known, and what pyramid attention makes of them (PSA, Li et al. 2025).

Shape legend: L length, K head width, T frames, Y rows, X columns; tensors are (1, 1, L, K), one batch entry and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.ops import pyramid_attention
from penstock.systems.sequence.psa.model import CurvePoint, error_vs_density

#: Ends of levels 1, 2, 4 and 8 at which the claims are judged: density 0.1875.
QUOTA = (0.0625, 0.125, 0.25, 0.75)
#: From density 0.08 to 0.83; with 32 blocks and more, all of them fill whole tiles of the kernel.
SETTINGS = (
    (0.03125, 0.03125, 0.03125, 0.53125),
    QUOTA,
    (0.125, 0.25, 0.5, 1.0),
    (0.25, 0.5, 0.75, 1.0),
    (0.75, 0.875, 1.0, 1.0),
)
_BLOCK, _WIDTH = 32, 32


def autoregressive(
    smoothness: float, generator: torch.Generator, *, length: int = 1024, heads: int = 1, width: int = _WIDTH
) -> tuple[Tensor, ...]:
    """Queries, keys and values, each channel a stationary AR(1) sequence of unit variance and this coefficient."""
    noise = torch.randn(3, length, 1, heads, width, generator=generator)
    x = [noise[:, 0]]
    for t in range(1, length):
        x.append(smoothness * x[-1] + (1 - smoothness**2) ** 0.5 * noise[:, t])
    return torch.stack(x, -2).unbind()


def smooth_video(
    correlation: float, generator: torch.Generator, *, size: tuple[int, int, int] = (8, 16, 16)
) -> tuple[Tensor, ...]:
    """Queries, keys and values of a video (T, Y, X) in raster order: white noise smoothed along each axis.

    The filter is a periodic Gaussian of standard deviation ``correlation`` cells; the result has unit variance.
    """
    x_3KTYX = torch.randn(3, _WIDTH, *size, generator=generator)
    for axis, cells in enumerate(size, 2):
        distance = torch.arange(cells).minimum(cells - torch.arange(cells))
        weights = torch.fft.rfft((-0.5 * (distance / correlation).square()).exp())
        shape = [-1 if other == axis else 1 for other in range(5)]
        x_3KTYX = torch.fft.irfft(torch.fft.rfft(x_3KTYX, dim=axis) * weights.view(shape), cells, axis)
    x_3KTYX = x_3KTYX / x_3KTYX.std((1, 2, 3, 4), keepdim=True)
    return x_3KTYX.flatten(2).mT[:, None, None].unbind()


def curves(
    tensors: tuple[Tensor, ...], *settings: tuple[float, float, float, float], **options: Any
) -> dict[str, list[CurvePoint]]:
    """`error_vs_density` in tiles of 32 by 32, importance from all tokens."""
    q, k, v = tensors
    return error_vs_density(q, k, v, settings, block_m=_BLOCK, block_n=_BLOCK, sample="all", **options)


def smooth_sequences(seed: int, smoothness: float) -> dict[str, float]:
    """Relative errors of pyramid and binary attention at density 0.1875 on AR(1) sequences, and their ratio."""
    found = curves(autoregressive(smoothness, torch.Generator().manual_seed(seed)), QUOTA)
    pyramid, binary = found["pyramid"][0], found["binary"][0]
    return {
        "pyramid": pyramid.error,
        "binary": binary.error,
        "ratio": binary.error / pyramid.error,
        "density_pyramid": pyramid.density,
        "density_binary": binary.density,
    }


def token_order(seed: int, correlation: float) -> dict[str, float]:
    """Relative errors at density 0.1875 on a smooth video, in raster and in Gilbert order."""
    tensors = smooth_video(correlation, torch.Generator().manual_seed(seed))
    measured = {}
    orders: dict[str, dict[str, Any]] = {
        "raster": {},
        "gilbert": {"rearrange": "gilbert", "width": 16, "height": 16, "depth": 8},
    }
    for order, options in orders.items():
        for name, points in curves(tensors, QUOTA, **options).items():
            measured[f"{order}_{name}"] = points[0].error
    return measured


def error_when_constant(seed: int) -> float:
    """Largest difference from dense attention, float64, where keys and values are constant in groups of eight.

    Every tile has a random level above zero.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, 256, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 32, 16, generator=generator, dtype=torch.float64).repeat_interleave(8, 3).unbind()
    levels = 2 ** torch.randint(4, (1, 2, 8, 8), generator=generator)
    pyramid = pyramid_attention(q, k, v, levels, block_size=_BLOCK)
    return float((pyramid - F.scaled_dot_product_attention(q, k, v)).abs().max())
