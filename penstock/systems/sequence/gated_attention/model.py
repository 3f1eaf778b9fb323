"""Softmax attention whose output passes a sigmoid gate of the query token, and a language model of such layers.

Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free" (2025).

Shape legend: B batch, L length, D width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.nn.causal_lm import Span, causal_attention
from penstock.nn.decoder import DecoderLM, RMSNorm, initialise_normal, rotary_tables, rotate

Granularity = Literal["headwise", "elementwise"]
Position = Literal["sdpa_output", "value", "key", "query", "dense_output"]
Activation = Literal["sigmoid", "ns_sigmoid", "silu"]
Combine = Literal["multiply", "add"]

_RANGES: dict[Activation, tuple[float, float]] = {
    "sigmoid": (0.0, 1.0),
    "ns_sigmoid": (0.5, 1.0),
    "silu": (-0.2784645, float("inf")),
}


class AttentionGate(Gate):
    """The gate of an attention layer, computed from the layer's normalised input (sec. 2.2 and table 1).

    Args:
        dim: width D of the layer's input.
        num_heads: how many heads have a gate of their own; 1 shares one among all.
        width: gate values a head: 1 (headwise) or its channels (elementwise).
        activation: "sigmoid"; "ns_sigmoid", 0.5 + 0.5 sigmoid, which cannot shut; or "silu".
        combine: whether the values multiply what they gate or are added to it (then open and closed add zero).
        input_dependent: False learns one constant a unit instead.
        bias: whether the linear map has a bias.

    Shapes: (B, L, D) -> (B, L, num_heads, width), or (num_heads, width) when not input-dependent.
    """

    passes = "head"
    unit_dims = 2

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int,
        *,
        activation: Activation = "sigmoid",
        combine: Combine = "multiply",
        input_dependent: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.width, self.activation = num_heads, width, activation
        self.range = _RANGES[activation]
        if combine == "add":
            self.neutral = (0.0, 0.0)
        self.proj = nn.Linear(dim, num_heads * width, bias=bias) if input_dependent else None
        self.constant = None if input_dependent else nn.Parameter(torch.zeros(num_heads, width))

    def logits(self, x_BLD: Tensor) -> Tensor:
        """The values before the activation."""
        if self.proj is None:
            assert self.constant is not None
            return self.constant
        return self.proj(x_BLD).unflatten(-1, (self.num_heads, self.width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        logits = self.logits(x_BLD)
        if self.activation == "silu":
            return F.silu(logits)
        values = logits.sigmoid()
        return values if self.activation == "sigmoid" else 0.5 + 0.5 * values


class GatedAttention(nn.Module):
    """Causal grouped-query attention with an output gate: (B, L, D) -> (B, L, D).

    Args:
        hidden_size: width D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H (default H).
        head_dim: K, even (default D / H); H K need not equal D.
        gate: "headwise", "elementwise", or ``None`` for the ungated twin.
        position: what the gate acts on: the attention output before the output projection ("sdpa_output", G1 in
            the paper, its proposal), the values (G2), keys (G3), queries (G4) or the projected output (G5).
        activation, combine, input_dependent: see `AttentionGate`.
        head_specific: False shares one gate among all heads.
        qk_norm: RMS norm of queries and keys over the channels of a head.
        bias: adds a bias to all projections, the gate's included.
        rope_theta: base of the rotary frequencies.
        rotary_fraction: share of each head's channels that rotate (Qwen3-Next: 0.25).
        zero_centred_norm: see `RMSNorm` (Qwen3-Next).
        eps: of the norms.
        dropout: of the attention weights while training.

    Raises:
        ValueError: if ``num_kv_heads`` does not divide ``num_heads``, or the rotating channels are odd in number.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: Granularity | None = "headwise",
        position: Position = "sdpa_output",
        activation: Activation = "sigmoid",
        combine: Combine = "multiply",
        head_specific: bool = True,
        input_dependent: bool = True,
        qk_norm: bool = True,
        bias: bool = False,
        rope_theta: float = 10000.0,
        rotary_fraction: float = 1.0,
        zero_centred_norm: bool = False,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}, or give head_dim")
            head_dim = hidden_size // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        self.rotary_dim = int(rotary_fraction * head_dim)
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary positions need an even number of channels: {rotary_fraction} x head_dim={head_dim} is {self.rotary_dim}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.position, self.combine, self.rope_theta, self.dropout = position, combine, rope_theta, dropout
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred_norm) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=eps, zero_centred=zero_centred_norm) if qk_norm else nn.Identity()
        self.gate: AttentionGate | None = None
        if gate is not None:
            heads = {"value": num_kv_heads, "key": num_kv_heads, "dense_output": 1}.get(position, num_heads)
            channels = hidden_size if position == "dense_output" else head_dim
            self.gate = AttentionGate(
                hidden_size,
                heads if head_specific else 1,
                channels if gate == "elementwise" else 1,
                activation=activation,
                combine=combine,
                input_dependent=input_dependent,
                bias=bias,
            )

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """Attend over ``x_BLD``, already normalised.

        Args:
            x_BLD: the layer's input.
            span: positions, padding and what is remembered; default positions 0 to L - 1 and nothing else.
            number: of this layer in the span's states.
        """
        gate = None if self.gate is None else self.gate(x_BLD)
        q, k, v = self._project(x_BLD, None if span is None else span.positions, gate)
        y = causal_attention(q, k, v, span, number, dropout=self.dropout if self.training else 0.0)
        y_BLHK = self._gated(y.transpose(1, 2), gate, "sdpa_output")
        out_BLD = self.o_proj(y_BLHK.flatten(2))
        return self._gated(out_BLD.unsqueeze(2), gate, "dense_output").squeeze(2)

    def attention_map(self, x_BLD: Tensor, positions: Tensor | None = None) -> Tensor:
        """The softmax weights of every head, (B, H, L, L), rows are queries."""
        q, k, _ = self._project(x_BLD, positions, None if self.gate is None else self.gate(x_BLD))
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)

    def _project(self, x_BLD: Tensor, positions: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, K), keys and values (B, G, L, K), gated where the gate's position says so."""
        q, k, v = (
            self._gated(proj(x_BLD).unflatten(-1, (-1, self.head_dim)), gate, place)
            for proj, place in ((self.q_proj, "query"), (self.k_proj, "key"), (self.v_proj, "value"))
        )
        if positions is None:
            positions = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        cos, sin = rotary_tables(positions, self.rotary_dim, self.rope_theta, x_BLD.dtype)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return q, k, v.transpose(1, 2)

    def _gated(self, x_BLHK: Tensor, gate: Tensor | None, place: str) -> Tensor:
        if gate is None or place != self.position:
            return x_BLHK
        return x_BLHK * gate if self.combine == "multiply" else x_BLHK + gate


class GatedAttentionLM(DecoderLM):
    """Decoder-only language model of gated attention: tokens (B, L) -> logits (B, L, V).

    Args:
        vocab_size: V.
        hidden_size, num_layers, num_heads: D, the number of blocks, H.
        intermediate_size: hidden width of the SwiGLU.
        tie_embeddings: the output matrix is the embedding.
        others: see `GatedAttention`.

    Raises:
        ValueError: for impossible sizes, see `GatedAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        intermediate_size: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: Granularity | None = "headwise",
        position: Position = "sdpa_output",
        activation: Activation = "sigmoid",
        combine: Combine = "multiply",
        head_specific: bool = True,
        input_dependent: bool = True,
        qk_norm: bool = True,
        bias: bool = False,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        attentions = [
            GatedAttention(
                hidden_size,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                gate=gate,
                position=position,
                activation=activation,
                combine=combine,
                head_specific=head_specific,
                input_dependent=input_dependent,
                qk_norm=qk_norm,
                bias=bias,
                rope_theta=rope_theta,
                eps=eps,
                dropout=dropout,
            )
            for _ in range(num_layers)
        ]
        super().__init__(attentions, vocab_size, hidden_size, intermediate_size, eps=eps, tie_embeddings=tie_embeddings)
        self.apply(initialise_normal)  # the gate's rows like all others, so that it starts near one half

    @property
    def attentions(self) -> list[GatedAttention]:
        """The attention layers, in order."""
        return [block.self_attn for block in self.blocks if isinstance(block.self_attn, GatedAttention)]


@torch.no_grad()
def first_token_attention(model: GatedAttentionLM, tokens_BL: Tensor) -> Tensor:
    """Share of attention on the first token, by layer: mean over batch, heads and all queries (F-Attn of the paper)."""
    states = model.hidden_states(tokens_BL)
    maps = (
        attention.attention_map(block.input_layernorm(x))
        for attention, block, x in zip(model.attentions, model.blocks, states, strict=False)
    )
    return torch.stack([weights[..., 0].mean() for weights in maps])


@torch.no_grad()
def max_activation(model: GatedAttentionLM, tokens_BL: Tensor) -> Tensor:
    """Largest absolute value in the residual stream after the embedding and each block (M-Act of the paper)."""
    return torch.stack([state.abs().max() for state in model.hidden_states(tokens_BL)])


def _dense_1_7b(gate: Granularity | None) -> Callable[..., GatedAttentionLM]:
    def build(*, vocab_size: int = 151936, num_layers: int = 28) -> GatedAttentionLM:
        return GatedAttentionLM(
            vocab_size, 2048, num_layers, 16, intermediate_size=6144, num_kv_heads=8, head_dim=128, gate=gate,
            rope_theta=1e6, tie_embeddings=True,
        )  # fmt: skip

    return build


#: The paper's 1.7B dense model, which has the shape of Qwen3-1.7B.
VARIANTS: dict[str, Callable[..., GatedAttentionLM]] = {
    "gated_attention_1_7b_baseline": _dense_1_7b(None),
    "gated_attention_1_7b_headwise": _dense_1_7b("headwise"),
    "gated_attention_1_7b_elementwise": _dense_1_7b("elementwise"),
}
