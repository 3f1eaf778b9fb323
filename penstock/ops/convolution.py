"""Causal convolutions over a sequence: short ones a channel, with a state for decoding, and long ones by FFT.

Shape legend: B batch, L length, D channels, W taps of a short filter, T taps of a long one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.ops.dispatch import choose

#: Up to this many taps the direct form of `long_convolution` is faster than transforms on a CPU, without and with a
#: backward pass.
_DIRECT_TAPS, _DIRECT_TAPS_TRAINED = 64, 16


def causal_depthwise_conv(
    x_BLD: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own filter; position t sees t - W + 1 to t.

    Args:
        x_BLD: the sequence.
        weight: (D, 1, W); tap W - 1 meets the current position.
        bias: (D,).
        initial_state: (B, D, W), the last W inputs before this sequence, newest last (its oldest entry is not
            read); zeros if not given.
        mask_BL: true where a token is real; the filter meets real tokens only, as if padding were not there, and what
            comes out at padding means nothing.

    Returns:
        the output (B, L, D), and the last W (real) inputs (B, D, W) to go on from.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    channels, one, taps = weight.shape
    if one != 1 or x_BLD.shape[-1] != channels:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x_BLD.shape)}: it must be (D, 1, W)")
    x_BDL = x_BLD.transpose(1, 2)
    if initial_state is None:
        initial_state = x_BDL.new_zeros(x_BLD.shape[0], channels, taps)
    elif initial_state.shape != (x_BLD.shape[0], channels, taps):
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)}; it must be (B, D, W) = ({x_BLD.shape[0]}, {channels}, {taps})"
        )
    seen = torch.cat([initial_state, x_BDL], -1)
    order = None
    if mask_BL is not None:
        # Padding moves in front of everything, so that real tokens are neighbours, and what they give moves back.
        real = torch.cat([mask_BL.new_ones(mask_BL.shape[0], taps), mask_BL], 1)
        order = real.to(torch.uint8).argsort(dim=1, stable=True)[:, None].expand_as(seen)
        seen = seen.gather(2, order)
    y_BDL = F.conv1d(seen[..., 1:], weight, bias, groups=channels)
    if order is not None:
        whole = torch.zeros_like(seen).scatter(2, order, F.pad(y_BDL, (taps, 0)))
        y_BDL = whole[..., taps:]
    # A copy: a view would keep the whole sequence alive.
    return y_BDL.transpose(1, 2), seen[..., seen.shape[-1] - taps :].clone()


def long_convolution(
    x_BLD: Tensor,
    filters: Tensor,
    skip: Tensor | float | None = None,
    *,
    backend: Literal["fft", "direct"] | None = None,
) -> Tensor:
    """Convolve each channel causally with a filter as long as the sequence: y_t = sum_{s <= t} f_{t-s} x_s + skip x_t.

    Args:
        x_BLD: the sequence.
        filters: (D, T); taps beyond the length of the sequence have nothing to meet.
        skip: (D,) or a number, the weight of the input added to the output.
        backend: "fft" (L log L, transforms in float32 at least) or "direct" (L T); default by the number of taps.

    Returns:
        (B, L, D).

    Raises:
        ValueError: if ``filters`` has not one row a channel.
    """
    length, channels = x_BLD.shape[1:]
    if filters.ndim != 2 or len(filters) != channels:
        raise ValueError(f"filters are {tuple(filters.shape)}; they must be (D, T) with D = {channels}")
    filters = filters[:, :length]
    taps = filters.shape[1]
    trained = torch.is_grad_enabled() and (x_BLD.requires_grad or filters.requires_grad)
    few = taps <= (_DIRECT_TAPS_TRAINED if trained else _DIRECT_TAPS)
    form = choose("long_convolution", backend, ("fft", "direct"), lambda: "direct" if few else "fft")
    x_BDL = x_BLD.transpose(1, 2)
    if form == "direct":
        y_BDL = F.conv1d(F.pad(x_BDL, (taps - 1, 0)), filters.flip(-1)[:, None], groups=channels)
    else:
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        size = 2 * length
        spectrum = torch.fft.rfft(x_BDL.to(wide), size) * torch.fft.rfft(filters.to(wide), size)
        y_BDL = torch.fft.irfft(spectrum, size)[..., :length].to(x_BLD.dtype)
    y_BLD = y_BDL.transpose(1, 2)
    return y_BLD if skip is None else y_BLD + x_BLD * skip
