"""Gated convolutions: BaseConv, Hyena and H3, whose convolved sequence is multiplied by a projection of the input.

Arora et al., "Zoology" (2023), sec. 4 (BaseConv); Poli et al., "Hyena Hierarchy" (2023); Fu et al., "Hungry Hungry
Hippos" (2022).

When decoding, short convolutions remember their last inputs and long ones all inputs so far.

Shape legend: B batch, L length of this call, T tokens so far or taps, D width, W taps of a short filter, H heads,
K width of a head, N state size, M = N / 2 complex modes, F width of a filter's MLP.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.nn.causal_lm import Span, State
from penstock.ops import causal_depthwise_conv, long_convolution
from penstock.systems.sequence.zoology.mixers import LinearGate, Mixer, hide_padding, memory_of, remember

#: Positional features of an implicit filter: time, cosine and sine.
_FEATURES = 3


class ShortConv(nn.Module):
    """Causal depthwise convolution of W taps with bias: (B, L, D) -> (B, L, D); initialised as `torch.nn.Conv1d`."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(dim, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, x_BLD: Tensor, memory: State | None = None, name: str = "short") -> Tensor:
        before = None if memory is None else memory.get(name)
        y_BLD, last_BDW = causal_depthwise_conv(x_BLD, self.weight, self.bias, before)
        if memory is not None:
            memory[name] = last_BDW
        return y_BLD


class LongConv(nn.Module):
    """Causal convolution with a filter as long as the sequence, a skip of weight one added: (B, L, D) -> (B, L, D)."""

    @abstractmethod
    def filters(self, length: int) -> Tensor:
        """The first ``length`` taps, (D, T)."""

    def forward(self, x_BLD: Tensor, memory: State | None = None) -> Tensor:
        seen_BTD = remember(memory, "inputs", x_BLD)
        return convolve_so_far(x_BLD, seen_BTD, self.filters(seen_BTD.shape[1]), 1.0)


class ExplicitLongConv(LongConv):
    """A filter of one free number a channel and tap, N(0, 1) at the start; ``l_max`` taps."""

    def __init__(self, dim: int, l_max: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(dim, l_max))

    def filters(self, length: int) -> Tensor:
        return self.filter[:, :length]


class ImplicitLongConv(LongConv):
    """A filter that is a small MLP of the position, Linear(3, 16), ReLU, Linear(16, D); ``l_max`` taps."""

    features: Tensor

    def __init__(self, dim: int, l_max: int, hidden: int = 16) -> None:
        super().__init__()
        self.register_buffer("features", positional_features(l_max))
        self.mlp = nn.Sequential(nn.Linear(_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def filters(self, length: int) -> Tensor:
        return self.mlp(self.features[:length]).T


class BaseConv(Mixer):
    """y = conv(u) * (u W^T + b) + u, the minimal gated convolution (Zoology, definition 4.1).

    Args:
        d_model: width D.
        l_max: taps of a long convolution, and then the longest sequence.
        kernel_size: taps of a short convolution, or -1 for a long one; a list has one entry a layer.
        implicit_long_conv: whether a long filter is an MLP of the position.
        use_act: SiLU on both factors.
        gated: False leaves the gate out: the ungated twin.
        layer_idx: of the layer, from 0.

    Raises:
        ValueError: for a kernel size of neither kind, or a list that has none for this layer.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        implicit_long_conv: bool = True,
        use_act: bool = False,
        gated: bool = True,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int):
            if layer_idx >= len(kernel_size):
                raise ValueError(f"kernel_size={list(kernel_size)} has no entry for layer {layer_idx}: one a layer")
            kernel_size = kernel_size[layer_idx]
        if kernel_size < 1 and kernel_size != -1:
            raise ValueError(f"kernel_size={kernel_size} must be 1 or more, or -1 for a long convolution")
        self.d_model, self.kernel_size, self.use_act = d_model, kernel_size, use_act
        if kernel_size == -1:
            self.max_length = l_max
        self.conv = (
            ShortConv(d_model, kernel_size)
            if kernel_size > 0
            else ImplicitLongConv(d_model, l_max)
            if implicit_long_conv
            else ExplicitLongConv(d_model, l_max)
        )
        self.gate = LinearGate(d_model, activation=use_act) if gated else None

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        self.check_length(x_BLD.shape[1])
        y_BLD = self.conv(x_BLD if span is None else span.hide_padding(x_BLD), memory_of(span, number))
        if self.use_act:
            y_BLD = F.silu(y_BLD)
        if self.gate is not None:
            y_BLD = y_BLD * self.gate(x_BLD)
        return y_BLD + x_BLD

    def state_size(self, length: int) -> int:
        return self.d_model * (self.kernel_size if self.kernel_size > 0 else length)


class ShortProjection(nn.Module):
    """A linear map and a short convolution over its result: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.conv = ShortConv(dim, taps)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None, memory: State | None, name: str) -> Tensor:
        return self.conv(hide_padding(self.proj(x_BLD), mask_BL), memory, name)


class ShortConvGate(Gate):
    """A gate that is a `ShortProjection` of the input: linear, unbounded, one value a token and channel.

    Args:
        dim: width D.
        taps: of the short convolution.
    """

    passes = "channel"
    range = (float("-inf"), float("inf"))
    neutral = (0.0, 1.0)
    unit_dims = 1

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.projection = ShortProjection(dim, taps)

    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor | None = None, memory: State | None = None, name: str = "gate"
    ) -> Tensor:
        return self.projection(x_BLD, mask_BL, memory, name)


class HyenaFilter(nn.Module):
    """Hyena's implicit filter: a sine MLP of the position under a decaying window.

    h(t) = MLP(z_t) exp(-t |delta|), where every sine of the MLP has the same learned frequencies.

    Args:
        dim: width D.
        l_max: taps.
        order: width F of the MLP.
    """

    features: Tensor
    times: Tensor
    deltas: Tensor

    def __init__(self, dim: int, l_max: int, order: int) -> None:
        super().__init__()
        self.skip = nn.Parameter(torch.randn(dim))
        self.features = nn.Parameter(positional_features(l_max))  # the authors train it, at first at a rate of its own
        self.register_buffer("times", torch.linspace(0, 1, l_max)[:, None])
        self.register_buffer("deltas", torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, dim))
        self.layers = nn.ModuleList([nn.Linear(_FEATURES, order), nn.Linear(order, order), nn.Linear(order, order)])
        self.output = nn.Linear(order, dim, bias=False)
        self.frequencies = nn.Parameter(torch.ones(order))

    def forward(self, length: int) -> Tensor:
        """The first ``length`` taps, (D, T)."""
        h_TF = self.features[:length].clone()  # PyTorch's FLOP counter fails on modules that are fed a parameter's view
        for layer in self.layers:
            h_TF = torch.sin(self.frequencies * layer(h_TF))
        return (self.output(h_TF) * torch.exp(-self.times[:length] * self.deltas.abs())).T


class Hyena(Mixer):
    """Hyena of order two: two gates before and after a long convolution, all of short-convolved projections.

    Args:
        d_model: width D.
        l_max: taps of the long convolution and the longest sequence.
        filter_order: width of the filter's MLP.
        short_filter_order: taps of the short convolutions.
        gated: False leaves both gates out: the ungated twin.
        layer_idx: taken so that all mixers are built alike.

    Source: Poli et al. 2023, sec. 3.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        filter_order: int = 64,
        short_filter_order: int = 3,
        gated: bool = True,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.d_model, self.max_length = d_model, l_max
        self.pre_gate = ShortConvGate(d_model, short_filter_order) if gated else None
        self.post_gate = ShortConvGate(d_model, short_filter_order) if gated else None
        self.value = ShortProjection(d_model, short_filter_order)
        self.filter = HyenaFilter(d_model, l_max, filter_order)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        self.check_length(x_BLD.shape[1])
        mask_BL, memory = None if span is None else span.mask, memory_of(span, number)
        v_BLD = self.value(x_BLD, mask_BL, memory, "value")
        if self.pre_gate is not None:
            v_BLD = v_BLD * self.pre_gate(x_BLD, mask_BL, memory, "pre_gate")
        v_BLD = hide_padding(v_BLD, mask_BL)
        seen_BTD = remember(memory, "inputs", v_BLD)
        y_BLD = convolve_so_far(v_BLD, seen_BTD, self.filter(seen_BTD.shape[1]), self.filter.skip)
        if self.post_gate is not None:
            y_BLD = y_BLD * self.post_gate(x_BLD, mask_BL, memory, "post_gate")
        return self.out_proj(y_BLD)

    def state_size(self, length: int) -> int:
        return self.d_model * length


class ShiftKernel(nn.Module):
    """The state-space model whose state is its last N inputs: tap l is sum_n B_n C_{n + l}, B being one at n = 0.

    Args:
        dim: width D.
        d_state: N.
    """

    B: Tensor

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        bound = d_state**-0.5
        self.C = nn.Parameter(torch.empty(dim, d_state).uniform_(-bound, bound))
        self.D = nn.Parameter(torch.randn(dim))
        start = torch.zeros(dim, d_state)
        start[:, 0] = 1
        self.register_buffer("B", start)

    def forward(self, length: int) -> Tensor:
        """``length`` taps, (D, T); those from N on are zero."""
        size = self.C.shape[1]
        taps_DN = F.conv1d(F.pad(self.C, (0, size - 1))[None], self.B[:, None], groups=len(self.C)).squeeze(0)
        return F.pad(taps_DN, (0, max(length - size, 0)))[:, :length]


class DiagonalKernel(nn.Module):
    """The diagonal state-space model S4D-Lin, discretised bilinearly (Gu et al. 2022).

    K_l = 2 Re sum_n C_n B_n dt / (1 - dt A_n / 2) ((1 + dt A_n / 2) / (1 - dt A_n / 2))^l, with A_n = -1/2 + i pi n at
    the start.

    Args:
        heads: H, one kernel each.
        d_state: N, even.
    """

    def __init__(self, heads: int, d_state: int) -> None:
        super().__init__()
        modes = d_state // 2
        self.C = nn.Parameter(torch.randn(heads, modes, 2) * 0.5**0.5)
        self.B = nn.Parameter(torch.stack([torch.ones(heads, modes), torch.zeros(heads, modes)], -1))
        self.D = nn.Parameter(torch.randn(heads))
        self.log_dt = nn.Parameter(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.inv_A_real = nn.Parameter(torch.full((heads, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().expand(heads, -1).clone())

    def forward(self, length: int) -> Tensor:
        """``length`` taps, (H, T), in float32 at least."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        b_HM, c_HM = (torch.view_as_complex(part.to(wide).contiguous()) for part in (self.B, self.C))
        dt_H1 = self.log_dt.to(wide).exp()[:, None]
        half_HM = torch.complex(-self.inv_A_real.to(wide).exp(), self.A_imag.to(wide)) * dt_H1 / 2
        pole_HM = (1 + half_HM) / (1 - half_HM)
        # The power l = a S + b is a product of two: a matrix product of S x S powers instead of as many as taps.
        block = math.isqrt(max(length - 1, 0)) + 1
        steps_S = torch.arange(block, device=dt_H1.device, dtype=wide)
        fine_HMS, coarse_HMS = ((pole_HM.log()[..., None] * steps_S * stride).exp() for stride in (1, block))
        weights_HM1 = (c_HM * b_HM * dt_H1 / (1 - half_HM))[..., None]
        taps_HSS = (coarse_HMS * weights_HM1).transpose(1, 2) @ fine_HMS
        return 2 * taps_HSS.real.flatten(1)[:, :length]


class H3(Mixer):
    """Two state-space models with two products: q * SSM(shift(k) v), the query being the gate.

    Args:
        d_model: width D, a multiple of ``head_dim``.
        d_state: N of both state-space models, even.
        l_max: taps at most; ``None``: as many as there are tokens.
        head_dim: K; a head takes the outer product of its keys and values.
        gated: False leaves the query gate out: the ungated twin.
        layer_idx: taken so that all mixers are built alike.

    Raises:
        ValueError: if ``head_dim`` does not divide ``d_model`` or ``d_state`` is odd.

    Source: Fu et al. 2022, sec. 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        l_max: int | None = None,
        head_dim: int = 1,
        gated: bool = True,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        if d_model % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide d_model={d_model}")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state} must be even and at least 2: its modes come in conjugate pairs")
        self.d_model, self.d_state, self.l_max, self.head_dim = d_model, d_state, l_max, head_dim
        self.query_gate = LinearGate(d_model) if gated else None
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.shift = ShiftKernel(d_model, d_state)
        self.diagonal = DiagonalKernel(d_model // head_dim, d_state)
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        mask_BL, memory = None if span is None else span.mask, memory_of(span, number)
        k_BLD, v_BLD = (hide_padding(proj(x_BLD), mask_BL) for proj in (self.k_proj, self.v_proj))
        seen_BTD = remember(memory, "keys", k_BLD)
        k_BLD = convolve_so_far(k_BLD, seen_BTD, self.shift(self._taps(seen_BTD)), self.shift.D)

        k_BLHK, v_BLHK = (part.unflatten(-1, (-1, self.head_dim)) for part in (k_BLD, v_BLD))
        kv = (v_BLHK[..., :, None] * k_BLHK[..., None, :]).flatten(2)  # (B, L, H V K), V being K wide too
        seen = remember(memory, "products", kv)
        each = self.head_dim**2
        taps = self.diagonal(self._taps(seen)).repeat_interleave(each, 0)
        y = convolve_so_far(kv, seen, taps, self.diagonal.D.repeat_interleave(each))
        y_BLHVK = y.unflatten(-1, (-1, self.head_dim, self.head_dim))
        if self.query_gate is not None:
            y_BLHVK = y_BLHVK * self.query_gate(x_BLD).unflatten(-1, (-1, 1, self.head_dim))
        # Queries, keys and values are split head first, the result is merged head last, as the authors do.
        return self.output_linear(y_BLHVK.sum(-1).transpose(2, 3).flatten(2).to(x_BLD.dtype))

    def _taps(self, seen_BTD: Tensor) -> int:
        return seen_BTD.shape[1] if self.l_max is None else min(seen_BTD.shape[1], self.l_max)

    def state_size(self, length: int) -> int:
        return self.d_model * self.d_state


def positional_features(l_max: int) -> Tensor:
    """(T, 3): time from 0 to 1, and the real and imaginary part of exp(-i f w), w = 2 pi n / T and f = 1e-4."""
    angles = 2 * math.pi * torch.arange(l_max) / l_max * 1e-4
    return torch.stack([torch.linspace(0, 1, l_max), angles.cos(), -angles.sin()], -1)


def convolve_so_far(x_BLD: Tensor, seen_BTD: Tensor, filters_DT: Tensor, skip: Tensor | float) -> Tensor:
    """The last L outputs of a long convolution over all T inputs seen, ``skip`` times the input added.

    Args:
        x_BLD: the inputs of this call, which are the last of ``seen_BTD``.
        seen_BTD: all inputs so far.
        filters_DT: one row a channel.
        skip: (D,) or a number.
    """
    length, taps = x_BLD.shape[1], filters_DT.shape[1]
    if length > 1 or seen_BTD.shape[1] == 1:
        return long_convolution(seen_BTD, filters_DT, skip)[:, -length:]
    newest_first_TD = filters_DT.T.flip(0).to(x_BLD.dtype)  # one output needs no transform
    return (seen_BTD[:, -taps:] * newest_first_TD).sum(1, keepdim=True) + x_BLD * skip
