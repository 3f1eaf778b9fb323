"""Attention, and attention whose update a look-up gate lets through at few positions only.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023), sec. 5 and appendix.

Shape legend: B batch, L length of this call, T tokens seen so far with this call's, D width, H heads, K head width,
R positions that get an update.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.nn.causal_lm import Span, State, causal_attention
from penstock.nn.conditional import may_skip
from penstock.nn.experts import add_loss
from penstock.systems.sequence.zoology.mixers import Mixer, TokenSpan, memory_of, remember

Selection = Literal["sigmoid", "softmax", "two_way_softmax", "seen_before"]
Scope = Literal["sequence", "prefix"]


class MHA(Mixer):
    """Causal multi-head softmax attention without positions of its own: (B, L, D) -> (B, L, D).

    Args:
        d_model: width D.
        num_heads: H, a divisor of D.
        bias: of the queries', keys' and values' map; the output's always has one.
        dropout: of the attention weights while training.
        layer_idx: taken so that all mixers are built alike.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self, d_model: int, *, num_heads: int = 1, bias: bool = True, dropout: float = 0.0, layer_idx: int = 0
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model}")
        self.d_model, self.num_heads, self.dropout = d_model, num_heads, dropout
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        q, k, v = (self._heads(part) for part in self.Wqkv(x_BLD).chunk(3, -1))
        y = causal_attention(q, k, v, span, number, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def at(self, x_BLD: Tensor, places_BR: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """What `forward` gives at some positions of this call, (B, R, D), without computing the others."""
        weights = self.Wqkv.weight.split([self.d_model, 2 * self.d_model])
        biases = (None, None) if self.Wqkv.bias is None else self.Wqkv.bias.split([self.d_model, 2 * self.d_model])
        length, memory = x_BLD.shape[1], memory_of(span, number)
        chosen_BRD = x_BLD.gather(1, places_BR[..., None].expand(-1, -1, self.d_model))
        q = self._heads(F.linear(chosen_BRD, weights[0], biases[0]))
        k, v = (self._heads(part) for part in F.linear(x_BLD, weights[1], biases[1]).chunk(2, -1))
        k, v = remember(memory, "keys", k, 2), remember(memory, "values", v, 2)
        here_BR1 = (places_BR + k.shape[2] - length)[..., None]
        times_T = torch.arange(k.shape[2], device=x_BLD.device)
        allowed_BRT = times_T <= here_BR1
        if span is not None and span.key_mask is not None:
            allowed_BRT = allowed_BRT & span.key_mask[:, None] | (times_T == here_BR1)
        y = F.scaled_dot_product_attention(q, k, v, allowed_BRT[:, None])
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def state_size(self, length: int) -> int:
        return 2 * self.d_model * length


class LookupGate(Gate):
    """Which positions get an update from attention: a value a position from a linear function of its hidden state.

    While training every position has its value. In evaluation the k highest keep theirs and all others are zero,
    where k is ``n_lookups`` or the square root of the length, rounded up. With scope "sequence" (the paper's) they are
    the highest of the whole sequence, so whether a position is updated depends on later ones: that is **not causal
    across positions**. With scope "prefix" a position keeps its value if it is among the k highest up to itself, which
    needs no later ones. Decoding with a cache cannot know later positions and always goes by the prefix.

    Args:
        dim: width D.
        selection: "sigmoid" of the score; "softmax" of the scores over positions, for a sequence of T times 1 (in
            scope "prefix" over those up to each); "two_way_softmax" against a second score, with a learned temperature
            that starts at 0.3 sqrt(D).
        n_lookups: k; ``None``: the square root of the length.
        scope: see above.

    Raises:
        ValueError: if ``n_lookups`` is below one.

    Shapes: (B, L, D) -> (B, L, 1), values in (0, 1).
    """

    passes = "token"
    unit_dims = 1

    def __init__(
        self,
        dim: int,
        selection: Literal["sigmoid", "softmax", "two_way_softmax"] = "sigmoid",
        *,
        n_lookups: int | None = None,
        scope: Scope = "sequence",
    ) -> None:
        super().__init__()
        if n_lookups is not None and n_lookups < 1:
            raise ValueError(f"n_lookups={n_lookups} must be 1 or more, or None for the square root of the length")
        self.selection, self.n_lookups, self.scope = selection, n_lookups, scope
        self.proj = nn.Linear(dim, 2 if selection == "two_way_softmax" else 1, bias=selection != "sigmoid")
        self.temperature = nn.Parameter(torch.tensor([0.3 * dim**0.5])) if selection == "two_way_softmax" else None

    def logits(self, x_BLD: Tensor) -> Tensor:
        """The scores, (B, L): higher is sooner selected."""
        scores = self.proj(x_BLD)
        if self.temperature is not None:
            return (scores[..., 1] - scores[..., 0]) / self.temperature
        return scores.squeeze(-1)

    def before_selection(self, x_BLD: Tensor) -> Tensor:
        """The values of all positions, (B, L), as they are while training."""
        return self._values(self.logits(x_BLD), self.scope == "prefix")

    def forward(self, x_BLD: Tensor, key_mask_BT: Tensor | None = None, memory: State | None = None) -> Tensor:
        length = x_BLD.shape[1]
        scores_BT = remember(memory, "scores", self.logits(x_BLD))
        if key_mask_BT is not None:
            scores_BT = scores_BT.masked_fill(~key_mask_BT[:, -scores_BT.shape[1] :], float("-inf"))
        causal = memory is not None or self.scope == "prefix"
        values_BL = self._values(scores_BT, causal)[:, -length:]
        if not self.training:
            rank = _prefix_rank if causal else _sequence_rank
            values_BL = torch.where(rank(scores_BT, length) < self._count(scores_BT, length, causal), values_BL, 0.0)
        return values_BL[..., None]

    def _values(self, scores_BT: Tensor, causal: bool) -> Tensor:
        if self.selection != "softmax":
            return scores_BT.sigmoid()  # of the difference of two scores it is their softmax
        if not causal:
            return scores_BT.softmax(1)
        total_BT = torch.logcumsumexp(scores_BT, 1)
        return torch.where(scores_BT > float("-inf"), (scores_BT - total_BT).exp(), 0.0)

    def _count(self, scores_BT: Tensor, length: int, causal: bool) -> Tensor:
        """k for each position: of the real tokens up to it, or of all."""
        real_BT = scores_BT > float("-inf")
        seen_BL = real_BT.cumsum(1)[:, -length:] if causal else real_BT.sum(1, keepdim=True)
        limit = seen_BL.double().sqrt().ceil() if self.n_lookups is None else torch.full_like(seen_BL, self.n_lookups)
        return torch.where(real_BT[:, -length:], limit, 0)


class SeenBeforeGate(Gate):
    """The paper's programmatic selection: one where the token has occurred before in the sequence, else zero.

    It learns nothing, looks at tokens only and is causal.

    Shapes: tokens (B, L) -> (B, L, 1) of zeros and ones.
    """

    passes = "token"
    kind = "mask"
    unit_dims = 1

    def forward(self, tokens_BL: Tensor, key_mask_BT: Tensor | None = None, memory: State | None = None) -> Tensor:
        seen_BT = remember(memory, "tokens", tokens_BL)
        length, total = tokens_BL.shape[1], seen_BT.shape[1]
        same_BLT = (tokens_BL[:, :, None] == seen_BT[:, None, :]).tril(total - length - 1)
        if key_mask_BT is not None:
            same_BLT = same_BLT & key_mask_BT[:, None, -total:]
        return same_BLT.any(-1, keepdim=True).to(torch.get_default_dtype())


class Lookups(Mixer):
    """Attention behind a look-up gate: y = x + g * attention(x).

    While training, a sigmoid gate is held to its budget by ``selection_penalty * relu(mean(g) - n / T)``, added with
    `penstock.nn.experts.add_loss`. In evaluation positions whose gate is zero are left out of the computation where
    they are the majority.

    Args:
        d_model: width D.
        num_heads, bias, dropout: see `MHA`.
        selection: see `LookupGate` and `SeenBeforeGate`; ``None`` has no gate, so that attention updates every position:
            the ungated twin.
        selection_penalty: lambda.
        n_lookups: n, and k in evaluation; ``None``: the square root of the length.
        scope: of the selection in evaluation, see `LookupGate`: "sequence" is the paper's and not causal.
        layer_idx: taken so that all mixers are built alike.

    Raises:
        ValueError: see `MHA` and `LookupGate`; and when called without tokens that "seen_before" needs.

    Source: Arora et al. 2023, sec. 5 (the selection functions), HazyResearch/zoology.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        selection: Selection | None = "sigmoid",
        selection_penalty: float = 1e-3,
        n_lookups: int | None = None,
        scope: Scope = "sequence",
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.attention = MHA(d_model, num_heads=num_heads, bias=bias, dropout=dropout)
        self.selection_penalty, self.n_lookups = selection_penalty, n_lookups
        self.gate: LookupGate | SeenBeforeGate | None = None
        if selection == "seen_before":
            self.gate = SeenBeforeGate()
        elif selection is not None:
            self.gate = LookupGate(d_model, selection, n_lookups=n_lookups, scope=scope)
        self.penalised = selection == "sigmoid"
        self.by_token = selection == "seen_before"

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        if self.gate is None:
            return x_BLD + self.attention(x_BLD, span, number)
        key_mask = None if span is None else span.key_mask
        g_BL1 = self.gate(self._selected_by(x_BLD, span), key_mask, memory_of(span, number)).to(x_BLD.dtype)
        if self.training and self.penalised:
            add_loss("lookups", self._penalty(g_BL1.squeeze(-1), span))
        places_BR = self._places(g_BL1.squeeze(-1))
        if places_BR is None:
            return x_BLD + g_BL1 * self.attention(x_BLD, span, number)
        update_BRD = self.attention.at(x_BLD, places_BR, span, number) * g_BL1.gather(1, places_BR[..., None])
        return x_BLD.scatter_add(1, places_BR[..., None].expand_as(update_BRD), update_BRD)

    def _selected_by(self, x_BLD: Tensor, span: Span | None) -> Tensor:
        if not self.by_token:
            return x_BLD
        if not isinstance(span, TokenSpan) or span.tokens is None:
            raise ValueError("selection='seen_before' goes by tokens: call the layer with a TokenSpan that has them")
        return span.tokens

    def _places(self, g_BL: Tensor) -> Tensor | None:
        """Positions (B, R) that hold every non-zero gate; ``None`` where it does not pay to leave the others out."""
        # A graph cannot have shapes that depend on values, and a gate that is zero may still be due a gradient.
        if self.training or torch.compiler.is_compiling() or not may_skip():
            return None
        if torch.is_grad_enabled() and g_BL.requires_grad:
            return None
        shut_BL = g_BL == 0
        most = g_BL.shape[1] - int(shut_BL.sum(1).min())
        return None if 2 * most > g_BL.shape[1] else shut_BL.int().argsort(dim=1, stable=True)[:, :most]

    def _penalty(self, g_BL: Tensor, span: Span | None) -> Tensor:
        real_BL = torch.ones_like(g_BL) if span is None or span.mask is None else span.mask.to(g_BL.dtype)
        tokens_B = real_BL.sum(1)
        budget_B = tokens_B.rsqrt() if self.n_lookups is None else self.n_lookups / tokens_B
        return self.selection_penalty * F.relu((g_BL * real_BL).sum() / tokens_B.sum() - budget_B.mean())


def _sequence_rank(scores_BT: Tensor, length: int) -> Tensor:
    """How many positions of the sequence score higher, (B, L); of equals the earlier is the higher."""
    return scores_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)[:, -length:]


def _prefix_rank(scores_BT: Tensor, length: int) -> Tensor:
    """How many earlier positions score at least as high, (B, L)."""
    total = scores_BT.shape[1]
    # Equal tokens have equal scores but for rounding, which must not decide: it differs between one pass and decoding.
    rounding_BT = 16 * torch.finfo(scores_BT.dtype).eps * scores_BT.abs().clamp(min=1)
    higher_BLT = scores_BT[:, None, :] >= (scores_BT - rounding_BT)[:, -length:, None]
    return higher_BLT.tril(total - length - 1).sum(-1)
