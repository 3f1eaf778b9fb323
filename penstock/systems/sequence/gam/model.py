"""Gated associative memory: a causal convolution and a learned memory, mixed by two sigmoid gates a channel.

Acharya, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling" (2025).

Neither pathway is attention, and the cost is linear in the length. The memory is the same for every sequence: it is a
dictionary, and carries nothing from one token to another. Only the convolutions do, so that a token sees itself and
the (kernel_size - 1) x num_layers tokens before it: `GAMLanguageModel.receptive_field`.

Shape legend: B batch, L length, D width, M memory slots, H memory heads, W taps of the convolution, V vocabulary; the
pathways are local (0) and global (1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.gates import Gate, observed
from penstock.nn.causal_lm import Cache, CausalLM, Span
from penstock.ops import causal_depthwise_conv, memory_read, slot_weights

Fusion = Literal["gated", "sum", "local", "global"]
Init = Literal["reference", "balanced"]

#: From this many slot weights on, the fused read is no slower than forming them, and saves keeping them for the
#: backward pass; below it (measured on a CPU) it is.
_MANY_WEIGHTS = 2**21


class FusionGate(Gate):
    """How much of each pathway passes, channel by channel: two independent sigmoids that need not sum to one.

    Args:
        dim: width D.

    Shapes: (B, L, D) -> (B, L, 2, D), values in (0, 1).
    """

    passes = "channel"
    unit_dims = 2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim)

    def logits(self, h_BLD: Tensor) -> Tensor:
        """The values before the sigmoid."""
        return self.proj(h_BLD).unflatten(-1, (2, -1))

    def forward(self, h_BLD: Tensor) -> Tensor:
        return self.logits(h_BLD).sigmoid()


class SlotGate(Gate):
    """Which memory slots answer a token: the softmax over the slots' keys, whose scores are not scaled.

    Args:
        num_heads: H; with several, each reads with its own channels of token and keys.

    Shapes: (B, L, D), (M, D) -> (B, L, M), or (B, L, H, M) with several heads; the last axis sums to one.
    """

    passes = "code"
    kind = "simplex"

    def __init__(self, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.unit_dims = 1 if num_heads == 1 else 2

    def forward(self, h_BLD: Tensor, keys_MD: Tensor) -> Tensor:
        if self.num_heads == 1:
            return slot_weights(h_BLD, keys_MD)
        heads = zip(h_BLD.chunk(self.num_heads, -1), keys_MD.chunk(self.num_heads, -1), strict=True)
        return torch.stack([slot_weights(h, keys) for h, keys in heads], -2)


class AssociativeMemory(nn.Module):
    """A learned bank that every token reads by content: (B, L, D) -> (B, L, D).

    The slot weights are `slot_gate`'s values: ``watch(model, "*.slot_gate", keep="values")`` shows which slot answers
    which token. Where there are many of them and nobody watches or forces the gate, the fused operator reads without
    ever forming them; the result is then the same up to rounding.

    Args:
        dim: width D.
        num_slots: M.
        num_heads: H, a divisor of D; the paper has 1.
        separate_values: a second bank holds the values; in the paper the keys are the values.
    """

    def __init__(self, dim: int, num_slots: int, *, num_heads: int = 1, separate_values: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keys = nn.Parameter(torch.empty(num_slots, dim))
        self.own_values = nn.Parameter(torch.empty(num_slots, dim)) if separate_values else None
        self.slot_gate: nn.Module = SlotGate(num_heads)
        for bank in self.parameters():
            nn.init.xavier_uniform_(bank)

    @property
    def values(self) -> Tensor:
        """What the slots hold, (M, D)."""
        return self.keys if self.own_values is None else self.own_values

    def forward(self, h_BLD: Tensor) -> Tensor:
        gate = self.slot_gate
        num_weights = h_BLD.shape[0] * h_BLD.shape[1] * len(self.keys) * self.num_heads
        # Another module in the slot gate's place, such as the twin's, has to be asked.
        unseen = isinstance(gate, SlotGate) and not observed(gate)
        if unseen and num_weights >= _MANY_WEIGHTS:
            read = [memory_read(*head) for head in zip(*map(self._heads, (h_BLD, self.keys, self.values)), strict=True)]
        else:
            weights = gate(h_BLD, self.keys)
            own = [weights] if self.num_heads == 1 else weights.unbind(-2)
            read = [w @ values for w, values in zip(own, self._heads(self.values), strict=True)]
        return read[0] if self.num_heads == 1 else torch.cat(read, -1)

    def _heads(self, x: Tensor) -> Sequence[Tensor]:
        """Each head's channels."""
        return x.chunk(self.num_heads, -1)


class CausalConv(nn.Module):
    """Depthwise causal convolution with a bias: (B, L, D) -> (B, L, D); padding tokens are passed over.

    Args:
        dim: channels D.
        kernel_size: taps W; the last one meets the current token.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        like = nn.Conv1d(dim, dim, kernel_size, groups=dim)  # PyTorch's own initial values
        self.weight, self.bias = like.weight, like.bias

    def forward(self, h_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """Convolve; with a ``span``, go on from what layer ``number`` remembers and leave out padding."""
        state = None if span is None else span.state(number)
        before = None if state is None else state.get("inputs")
        mask = None if span is None else span.mask
        y_BLD, last = causal_depthwise_conv(h_BLD, self.weight, self.bias, before, mask)
        if state is not None:
            state["inputs"] = last
        return y_BLD


class GAMBlock(nn.Module):
    """x + fused(norm(x)), then x + FFN(norm(x)): a drop-in for a transformer's block, (B, L, D) -> (B, L, D).

    With h = norm(x): fused = g_local conv(h) + g_global memory(h), the gates being sigmoids of h. No dropout and no
    projection follow the fusion; the FFN has an exact GELU, and dropout at its end.

    Args:
        dim: width D.
        num_slots: memory slots M.
        kernel_size: taps W of the convolution.
        ffn_hidden: hidden width of the FFN, default 4 D.
        dropout: of the FFN's output.
        fusion: "gated"; "sum" adds the pathways as they are; "local" and "global" have one pathway and no gate.
        memory_heads, separate_values: see `AssociativeMemory`.

    Raises:
        ValueError: for a kernel, a bank or an FFN of size below one, or heads that do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int = 512,
        kernel_size: int = 3,
        *,
        ffn_hidden: int | None = None,
        dropout: float = 0.1,
        fusion: Fusion = "gated",
        memory_heads: int = 1,
        separate_values: bool = False,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if ffn_hidden is None else ffn_hidden
        sizes = {"dim": dim, "num_slots": num_slots, "kernel_size": kernel_size, "ffn_hidden": hidden}
        if small := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"{', '.join(small)}: must be 1 or more")
        if memory_heads < 1 or dim % memory_heads:
            raise ValueError(f"memory_heads={memory_heads} must divide dim={dim}")
        self.norm1 = nn.LayerNorm(dim)
        self.conv = CausalConv(dim, kernel_size) if fusion != "global" else None
        self.memory: AssociativeMemory | None = None
        if fusion != "local":
            self.memory = AssociativeMemory(dim, num_slots, num_heads=memory_heads, separate_values=separate_values)
        self.fusion_gate = FusionGate(dim) if fusion == "gated" else None
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """One block.

        Args:
            x_BLD: the residual stream.
            span: padding and what is remembered; default: neither.
            number: of this block in the span's states.
        """
        h_BLD = self.norm1(x_BLD)
        x_BLD = x_BLD + self.fuse(h_BLD, self.pathways(h_BLD, span, number))
        return x_BLD + self.ffn(self.norm2(x_BLD))

    def pathways(self, h_BLD: Tensor, span: Span | None = None, number: int = 0) -> list[Tensor]:
        """What the local and the global pathway (those there are) say about normalised tokens."""
        local = [] if self.conv is None else [self.conv(h_BLD, span, number)]
        return local if self.memory is None else [*local, self.memory(h_BLD)]

    def fuse(self, h_BLD: Tensor, pathways: Sequence[Tensor]) -> Tensor:
        """The pathways' gated sum."""
        if self.fusion_gate is None:
            return sum(pathways[1:], pathways[0])
        local, memory = pathways
        gate_local, gate_global = self.fusion_gate(h_BLD).unbind(-2)
        return gate_local * local + gate_global * memory


class LearnedPositionLM(CausalLM):
    """The language model around any block, as in the author's scripts: learned positions, final LayerNorm, tied head.

    Args:
        blocks: called as ``block(x_BLD, span, number)``.
        vocab_size: V.
        block_size: longest sequence, the number of positions.
        dim: width D.
        dropout: of the embedded tokens.
        init: "reference" is the author's: tied token rows uniform within D^-1/2, positions N(0, 1), in which the
            tokens drown at first; "balanced": tokens N(0, 0.1), positions N(0, 0.02).

    Raises:
        ValueError: for no positions or no vocabulary.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        vocab_size: int,
        block_size: int,
        dim: int,
        *,
        dropout: float = 0.1,
        init: Init = "balanced",
    ) -> None:
        super().__init__()
        if vocab_size < 1 or block_size < 1:
            raise ValueError(f"vocab_size={vocab_size} and block_size={block_size} must be 1 or more")
        self.vocab_size, self.max_length, self.num_layers = vocab_size, block_size, len(blocks)
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.pos_embedding = nn.Embedding(block_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.token_embedding.weight = self.head.weight
        if init == "balanced":
            nn.init.normal_(self.token_embedding.weight, std=0.1)
            nn.init.normal_(self.pos_embedding.weight, std=0.02)

    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        span = self.span(tokens_BL, cache, mask_BL)
        x_BLD = self.dropout(self._embed(tokens_BL) + self.pos_embedding(span.positions))
        return self.head(self.norm(self.run_layers(self.blocks, x_BLD, span)))

    def _embed(self, tokens_BL: Tensor) -> Tensor:
        try:
            return self.token_embedding(tokens_BL)
        except IndexError:
            low, high = (int(end) for end in tokens_BL.aminmax())
            raise ValueError(
                f"token ids run from {low} to {high}; a vocabulary of {self.vocab_size} has 0 to {self.vocab_size - 1}"
            ) from None


class GAMLanguageModel(LearnedPositionLM):
    """Decoder-only language model of `GAMBlock`s: tokens (B, L) -> logits (B, L, V).

    For decoding, a block remembers its last ``kernel_size`` normalised inputs and nothing else.

    Args:
        vocab_size, block_size, dim: V, the longest sequence, D.
        num_layers: blocks.
        num_slots, kernel_size, ffn_hidden, fusion, memory_heads, separate_values: see `GAMBlock`.
        dropout: of the embedded tokens and each FFN's output.
        init: see `LearnedPositionLM`.

    Raises:
        ValueError: for impossible sizes.
    """

    def __init__(
        self,
        vocab_size: int = 10000,
        block_size: int = 256,
        dim: int = 512,
        num_layers: int = 6,
        *,
        num_slots: int = 512,
        kernel_size: int = 3,
        ffn_hidden: int | None = None,
        dropout: float = 0.1,
        fusion: Fusion = "gated",
        memory_heads: int = 1,
        separate_values: bool = False,
        init: Init = "balanced",
    ) -> None:
        blocks = [
            GAMBlock(
                dim,
                num_slots,
                kernel_size,
                ffn_hidden=ffn_hidden,
                dropout=dropout,
                fusion=fusion,
                memory_heads=memory_heads,
                separate_values=separate_values,
            )
            for _ in range(num_layers)
        ]
        super().__init__(blocks, vocab_size, block_size, dim, dropout=dropout, init=init)
        self._taps = 1 if fusion == "global" else kernel_size

    def receptive_field(self) -> int:
        """How many tokens a logit depends on: the current one and num_layers (kernel_size - 1) before it."""
        return self.num_layers * (self._taps - 1) + 1


def _published(
    *, vocab_size: int = 10000, block_size: int = 256, dropout: float = 0.1, init: Init = "balanced"
) -> GAMLanguageModel:
    return GAMLanguageModel(vocab_size, block_size, 512, 6, num_slots=512, dropout=dropout, init=init)


#: The model of the paper's tables.
VARIANTS: dict[str, Callable[..., GAMLanguageModel]] = {"gam_22_6m": _published}
