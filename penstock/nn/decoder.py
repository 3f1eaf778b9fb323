"""What decoder-only language models share: RMS norm, rotary positions, SwiGLU, and the model around any mixer.

Shape legend: B batch, L length, D width, H heads, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.nn.causal_lm import Cache, CausalLM, Span


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


class DecoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    Args:
        attention: called as ``attention(x_BLD, span, number)``; any layer that mixes tokens causally.
        dim, hidden: widths D and F.
        eps: of the norms.
    """

    def __init__(self, attention: nn.Module, dim: int, hidden: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x_BLD: Tensor, span: Span, number: int) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), span, number)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class DecoderLM(CausalLM):
    """A language model of `DecoderBlock`s, whatever mixes their tokens: tokens (B, L) -> logits (B, L, V).

    Args:
        mixers: one a block, see `DecoderBlock`.
        vocab_size, dim, hidden: V, D, F.
        eps: of the norms.
        tie_embeddings: the output matrix is the embedding.
    """

    def __init__(
        self,
        mixers: Sequence[nn.Module],
        vocab_size: int,
        dim: int,
        hidden: int,
        *,
        eps: float = 1e-6,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_layers = vocab_size, len(mixers)
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(DecoderBlock(mixer, dim, hidden, eps=eps) for mixer in mixers)
        self.norm = RMSNorm(dim, eps=eps)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def blocks(self) -> list[DecoderBlock]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, DecoderBlock)]

    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        span = self.span(tokens_BL, cache, mask_BL)
        x_BLD = self.run_layers(self.layers, self.embed_tokens(tokens_BL), span)
        return self.lm_head(self.norm(x_BLD))

    def hidden_states(self, tokens_BL: Tensor) -> list[Tensor]:
        """The residual stream after the embedding and after each block, (B, L, D) each."""
        span = self.span(tokens_BL, None, None)
        states = [self.embed_tokens(tokens_BL)]
        for number, layer in enumerate(self.layers):
            states.append(layer(states[-1], span, number))
        return states

    def no_weight_decay(self) -> set[str]:
        return {"embed_tokens.weight"}


def initialise_normal(module: nn.Module, std: float = 0.02) -> None:
    """For ``apply``: weights of linear maps and embeddings N(0, std), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
