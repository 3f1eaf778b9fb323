"""RWKV-4's time mixing: a decaying average of values, read through a sigmoid receptance gate.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), as used by Zoology.

Shape legend: B batch, L length, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from penstock.gates import SigmoidGate
from penstock.nn.causal_lm import Span, State
from penstock.systems.sequence.zoology.mixers import Mixer, memory_of


class RWKVTimeMixer(Mixer):
    """Attention-like averaging with a decay a channel: y = W_o (sigmoid(r) * wkv).

    Keys, values and receptance are linear functions of a mix of the current and the previous token.

    Args:
        d_model: width D, 2 or more.
        l_max: taken for the authors' sake, whose kernel needs it; any length will do.
        n_layer: layers of the model, 2 or more: the start depends on how deep a layer stands.
        layer_idx: of this layer, from 0.
        gated: False leaves the receptance out: the ungated twin.

    Raises:
        ValueError: for fewer than two channels or layers.

    Source: Peng et al. 2023, eq. 11-20 and appendix E.
    """

    def __init__(
        self,
        d_model: int = 512,
        l_max: int | None = None,
        *,
        n_layer: int = 12,
        layer_idx: int = 0,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if d_model < 2 or n_layer < 2:
            raise ValueError(f"d_model={d_model} and n_layer={n_layer} must be 2 or more")
        depth = layer_idx / (n_layer - 1)  # 0 in the first layer, 1 in the last
        shallow = 1 - layer_idx / n_layer
        place = torch.arange(d_model) / (d_model - 1)
        zigzag = (torch.arange(d_model) + 1) % 3 - 1
        mix = (torch.arange(d_model) / d_model) ** shallow
        self.time_decay = nn.Parameter(-5 + 8 * place ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        self.time_mix_k = nn.Parameter(mix)
        self.time_mix_v = nn.Parameter(mix + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix**0.5)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.receptance: SigmoidGate | None = None
        if gated:
            self.receptance = SigmoidGate(d_model, d_model, passes="channel", bias=False)
            self.receptance.unit_dims = 1
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        memory = memory_of(span, number)
        if span is not None:
            x_BLD = span.hide_padding(x_BLD)
        before_BLD = self._previous(x_BLD, memory)
        xk, xv, xr = (x_BLD * mu + before_BLD * (1 - mu) for mu in (self.time_mix_k, self.time_mix_v, self.time_mix_r))
        k_BLD = self.key(xk)
        if span is not None and span.mask is not None:
            k_BLD = k_BLD.masked_fill(~span.mask[..., None], torch.finfo(k_BLD.dtype).min / 2)
        y_BLD = wkv(k_BLD, self.value(xv), -self.time_decay.exp(), self.time_first, memory)
        if self.receptance is not None:
            y_BLD = y_BLD * self.receptance(xr)
        return self.output(y_BLD)

    @staticmethod
    def _previous(x_BLD: Tensor, memory: State | None) -> Tensor:
        """Each token's predecessor, zeros before the first."""
        first_B1D = torch.zeros_like(x_BLD[:, :1])
        if memory is not None:
            first_B1D = memory.get("token", first_B1D)
            memory["token"] = x_BLD[:, -1:].clone()
        return torch.cat([first_B1D, x_BLD[:, :-1]], 1)


def wkv(k_BLD: Tensor, v_BLD: Tensor, decay_D: Tensor, first_D: Tensor, memory: State | None = None) -> Tensor:
    """wkv_t = (sum_{i < t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v).

    The sums of all positions are found together, in log2(L) rounds that each double how far back they reach. Each
    sum is held relative to the exponential of its largest exponent so far, so that none overflows.

    Args:
        k_BLD, v_BLD: keys and values.
        decay_D: w, below 0.
        first_D: u, what the current token has more.
        memory: holds and gets the sums so far.

    Returns:
        (B, L, D), in the dtype of ``v_BLD``.
    """
    wide = torch.promote_types(k_BLD.dtype, torch.float32)
    k_BLD, values, decay_D, first_D = k_BLD.to(wide), v_BLD.to(wide), decay_D.to(wide), first_D.to(wide)
    # The largest exponents are constants to the gradient, which passes through the sums alone.
    own_BLD = (k_BLD - k_BLD.detach()).exp()
    weighted, total, top = _behind(memory, own_BLD * values, own_BLD, k_BLD.detach())
    reach = 1
    while reach < top.shape[1]:
        back = reach * decay_D
        peak = torch.maximum(top[:, :-reach] + back.detach(), top[:, reach:])
        past, now = (top[:, :-reach] + back - peak).exp(), (top[:, reach:] - peak).exp()
        weighted = torch.cat([weighted[:, :reach], past * weighted[:, :-reach] + now * weighted[:, reach:]], 1)
        total = torch.cat([total[:, :reach], past * total[:, :-reach] + now * total[:, reach:]], 1)
        top = torch.cat([top[:, :reach], peak], 1)
        reach *= 2
    if memory is not None:
        memory.update(weighted=weighted[:, -1:].clone(), total=total[:, -1:].clone(), top=top[:, -1:].clone())
    peak = torch.maximum(top[:, :-1], (first_D + k_BLD).detach())
    past, now = (top[:, :-1] - peak).exp(), (first_D + k_BLD - peak).exp()
    return ((past * weighted[:, :-1] + now * values) / (past * total[:, :-1] + now)).to(v_BLD.dtype)


def _behind(memory: State | None, *sums_BLD: Tensor) -> list[Tensor]:
    """Weighted sum, total and largest exponent of each token, behind those of all tokens before this call."""
    if memory is not None and "top" in memory:
        before = [memory[name] for name in ("weighted", "total", "top")]
    else:
        nothing = torch.zeros_like(sums_BLD[0][:, :1])
        before = [nothing, nothing, nothing + torch.finfo(nothing.dtype).min / 2]
    return [torch.cat([first, sums], 1) for first, sums in zip(before, sums_BLD, strict=True)]
