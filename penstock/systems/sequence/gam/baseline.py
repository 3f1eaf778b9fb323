"""The transformer that the author's script compares with: GPT-style, of the same width and depth.

Shape legend: B batch, L length, D width, H heads, K head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from penstock.nn.causal_lm import Span, causal_attention
from penstock.systems.sequence.gam.model import Init, LearnedPositionLM


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)), with LayerNorm, biases and an exact GELU: (B, L, D) -> (B, L, D).

    Args:
        dim: width D.
        num_heads: H, a divisor of D.
        ffn_hidden: hidden width of the FFN, default 4 D.
        dropout: of the attention weights and the FFN's output.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, *, ffn_hidden: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        hidden = 4 * dim if ffn_hidden is None else ffn_hidden
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """One block; ``span`` and ``number`` as for `GAMBlock`."""
        qkv_BL3HK = self.qkv(self.norm1(x_BLD)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv_BL3HK.unbind(2))
        y_BHLK = causal_attention(q, k, v, span, number, dropout=self.dropout if self.training else 0.0)
        x_BLD = x_BLD + self.proj(y_BHLK.transpose(1, 2).flatten(2))
        return x_BLD + self.ffn(self.norm2(x_BLD))


class TransformerLM(LearnedPositionLM):
    """`TransformerBlock`s in the language model that GAM has around its own: tokens (B, L) -> logits (B, L, V).

    Args:
        vocab_size, block_size, dim, num_layers, dropout, init: see `GAMLanguageModel`.
        num_heads, ffn_hidden: see `TransformerBlock`.
    """

    def __init__(
        self,
        vocab_size: int = 10000,
        block_size: int = 256,
        dim: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        *,
        ffn_hidden: int | None = None,
        dropout: float = 0.1,
        init: Init = "balanced",
    ) -> None:
        blocks = [TransformerBlock(dim, num_heads, ffn_hidden=ffn_hidden, dropout=dropout) for _ in range(num_layers)]
        super().__init__(blocks, vocab_size, block_size, dim, dropout=dropout, init=init)
