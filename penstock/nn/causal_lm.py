"""What every language model here offers: one door for training, padded batches and decoding with a cache.

Shape legend: B batch, L length of this call, T tokens seen so far with this call's, D width, V vocabulary, H heads,
G key/value heads, K head width.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: What one layer remembers, by names of its own: keys and values, a recurrent state, the last inputs of a convolution.
State: TypeAlias = dict[str, Tensor]


class Cache:
    """What a model remembers of the tokens it has seen: a state a layer, and which tokens were real.

    Made by `CausalLM.new_cache`; the model fills it. Every tensor in it has the batch as its first axis.

    Attributes:
        layers: one state a layer.
        length: tokens seen, padding included.
        mask: (B, T) which of them were real, or ``None`` while all were.
    """

    def __init__(self, owner: CausalLM) -> None:
        self._owner = weakref.ref(owner)
        self.layers: list[State] = [{} for _ in range(owner.num_layers)]
        self.length = 0
        self.mask: Tensor | None = None

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether ``model`` made this cache."""
        return self._owner() is model

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.layers = [{name: value[rows] for name, value in state.items()} for state in self.layers]

    def num_bytes(self) -> int:
        """Memory it holds."""
        return sum(value.nbytes for state in self.layers for value in state.values())


@dataclass
class Span:
    """The tokens of one call: where they stand, which are real, and what each layer remembers from before.

    Attributes:
        positions: (L,), or (B, L) where padding shifts samples against each other.
        mask: (B, L) which tokens of this call are real; ``None``: all.
        key_mask: (B, T) the same for all tokens so far.
        states: one a layer, which the layer reads and overwrites; ``None`` when nothing is to be remembered.
    """

    positions: Tensor
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    states: list[State] | None = None
    _visible: Tensor | None = field(default=None, repr=False)

    def visible(self, length: int, total: int) -> Tensor | None:
        """Which keys each query sees, (L, T) or (B, 1, L, T); ``None`` where plain causality or all of them says it.

        A padding token sees itself at least. It is the same for every layer of a call, and made once.
        """
        if self.key_mask is None and not 1 < length < total:
            return None
        if self._visible is None or self._visible.shape[-2:] != (length, total):
            device = self.positions.device
            allowed = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
            if self.key_mask is not None:
                itself = torch.eye(total, dtype=torch.bool, device=device)[total - length :]
                allowed = (allowed & self.key_mask[:, None, :] | itself)[:, None]
            self._visible = allowed
        return self._visible

    def state(self, layer: int) -> State | None:
        """What layer number ``layer`` remembers; it overwrites entries to remember more."""
        return None if self.states is None else self.states[layer]

    def hide_padding(self, x_BLD: Tensor) -> Tensor:
        """Zeros where a token is padding."""
        return x_BLD if self.mask is None else x_BLD * self.mask[..., None].to(x_BLD.dtype)


class CausalLM(nn.Module, PyTorchModelHubMixin):
    """A decoder-only language model: tokens (B, L) int64 -> logits (B, L, V).

    A subclass sets `num_layers`, `vocab_size` and, if it has a table of positions, `max_length`, and writes
    ``forward(tokens_BL, *, cache=None, mask_BL=None)``, which begins with `span` and takes its layers through
    `run_layer`, each layer being called as ``layer(x_BLD, span, number)``.
    """

    num_layers: int
    vocab_size: int
    #: The longest sequence its positions allow; ``None``: any.
    max_length: int | None = None
    #: Whether layers are recomputed in the backward pass instead of kept; transformers sets it by this name.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    @abstractmethod
    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of the token after each one.

        Args:
            tokens_BL: int64; with a ``cache``, those after the ones it has seen.
            cache: from `new_cache`, updated in place.
            mask_BL: true where a token is real; padding on the left or right changes nothing for the others.

        Raises:
            ValueError: for a sequence beyond `max_length`, a mask of another shape, a cache of another model.
        """

    def new_cache(self) -> Cache:
        """An empty cache for decoding."""
        return Cache(self)

    def span(self, tokens_BL: Tensor, cache: Cache | None, mask_BL: Tensor | None) -> Span:
        """Check a call and say where its tokens stand; the cache's length and mask move on.

        Raises:
            ValueError: see `forward`.
        """
        if tokens_BL.ndim != 2:
            raise ValueError(f"tokens are {tuple(tokens_BL.shape)}; they must be (B, L)")
        batch, length = tokens_BL.shape
        before = 0
        if cache is not None:
            if not cache.belongs_to(self):
                raise ValueError(
                    f"the cache was made by another model; take one from this {type(self).__name__}'s new_cache()"
                )
            before = cache.length
        if mask_BL is not None:
            if mask_BL.shape != tokens_BL.shape:
                raise ValueError(
                    f"mask is {tuple(mask_BL.shape)}; it must have the shape of the tokens, {tuple(tokens_BL.shape)}"
                )
            mask_BL = mask_BL.bool()
        if self.max_length is not None and before + length > self.max_length:
            raise ValueError(
                f"{before + length} tokens: {type(self).__name__} has a table of {self.max_length} positions and cannot go beyond"
            )
        key_mask = mask_BL
        past = None if cache is None else cache.mask
        if past is not None or (mask_BL is not None and before):
            past = torch.ones(batch, before, dtype=torch.bool, device=tokens_BL.device) if past is None else past
            here = torch.ones_like(tokens_BL, dtype=torch.bool) if mask_BL is None else mask_BL
            key_mask = torch.cat([past, here], 1)
        if key_mask is None:
            positions = torch.arange(before, before + length, device=tokens_BL.device)
        else:
            positions = (key_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        if cache is not None:
            cache.length, cache.mask = before + length, key_mask
        return Span(positions, mask_BL, key_mask, None if cache is None else cache.layers)

    def run_layer(self, layer: nn.Module, x_BLD: Tensor, span: Span, number: int) -> Tensor:
        """``layer(x_BLD, span, number)``, recomputed in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and span.states is None:
            again = self._gradient_checkpointing_func
            if again is None:
                return checkpoint(layer, x_BLD, span, number, use_reentrant=False)
            return again(layer.__call__, x_BLD, span, number)
        return layer(x_BLD, span, number)

    def run_layers(self, layers: Iterable[nn.Module], x_BLD: Tensor, span: Span) -> Tensor:
        """All layers, one after the other."""
        for number, layer in enumerate(layers):
            x_BLD = self.run_layer(layer, x_BLD, span, number)
        return x_BLD


def causal_attention(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    span: Span | None = None,
    layer: int = 0,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal softmax attention that respects padding and remembers keys and values in the span's state.

    Args:
        q_BHLK: queries, positions already applied.
        k_BGLK, v_BGLK: keys and values of this call's tokens; G divides H.
        span: of the call; ``None``: no padding and nothing remembered.
        layer: whose state in the span.
        scale: of the scores, default K^-1/2.
        dropout: of the weights.

    Returns:
        (B, H, L, K). A padding token's own row attends to itself at least and means nothing.
    """
    state = None if span is None else span.state(layer)
    if state is not None:
        if "keys" in state:
            k_BGLK = torch.cat([state["keys"], k_BGLK], 2)
            v_BGLK = torch.cat([state["values"], v_BGLK], 2)
        state["keys"], state["values"] = k_BGLK, v_BGLK
    length, total = q_BHLK.shape[2], k_BGLK.shape[2]
    allowed = None if span is None else span.visible(length, total)
    return F.scaled_dot_product_attention(
        q_BHLK,
        k_BGLK,
        v_BGLK,
        allowed,
        dropout,
        is_causal=allowed is None and length > 1,
        scale=scale,
        enable_gqa=q_BHLK.shape[1] != k_BGLK.shape[1],
    )
