"""The outsider: a language model of rotary softmax attention, otherwise as the gated one.

Shape legend: B batch, L length, D width, H heads, K head width, T tokens a cache has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.nn.causal_lm import Span, causal_attention
from penstock.nn.decoder import DecoderLM, initialise_normal, rotary_tables, rotate

_ROTARY_BASE = 10000.0


class SoftmaxAttention(nn.Module):
    """Causal multi-head attention with rotary positions: (B, L, D) -> (B, L, D).

    Args:
        hidden_size, num_heads: D and H.

    Raises:
        ValueError: if heads do not divide the width into even parts.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of 2 num_heads={2 * num_heads}: rotary positions turn pairs")  # fmt: skip
        self.head_width = hidden_size // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """Attend; arguments as of every layer, see `CausalLM`."""
        positions = torch.arange(x_BLD.shape[1], device=x_BLD.device) if span is None else span.positions
        q, k, v = self._project(x_BLD, positions)
        return self.o_proj(causal_attention(q, k, v, span, number).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def step(self, x_BD: Tensor, keys_BHTK: Tensor, values_BHTK: Tensor, position: int) -> Tensor:
        """One token at ``position``, its key and value written into a cache with room: (B, D) -> (B, D)."""
        q, k, v = self._project(x_BD[:, None], torch.tensor([position]))
        keys_BHTK[:, :, position], values_BHTK[:, :, position] = k[:, :, 0], v[:, :, 0]
        seen = slice(position + 1)
        y = F.scaled_dot_product_attention(q, keys_BHTK[:, :, seen], values_BHTK[:, :, seen])
        return self.o_proj(y.flatten(1))

    def _project(self, x_BLD: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            proj(x_BLD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary_tables(positions, self.head_width, _ROTARY_BASE, x_BLD.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class AttentionLM(DecoderLM):
    """Language model of `SoftmaxAttention`: tokens (B, L) -> logits (B, L, vocabulary).

    Args:
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size: as of `GLALM`.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, *, intermediate_size: int
    ) -> None:
        layers = [SoftmaxAttention(hidden_size, num_heads) for _ in range(num_layers)]
        super().__init__(layers, vocab_size, hidden_size, intermediate_size)
        self.apply(initialise_normal)
