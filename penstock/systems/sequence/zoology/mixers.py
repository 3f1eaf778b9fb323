"""What every sequence mixer shares: how it is called, what it remembers, and the linear gate of gated convolutions.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023).

Shape legend: B batch, L length of this call, T tokens seen so far with this call's, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock.gates import Gate
from penstock.nn.causal_lm import Span, State


@dataclass
class TokenSpan(Span):
    """A span that also holds the tokens of the call, (B, L), for what selects by them."""

    tokens: Tensor | None = None


class Mixer(nn.Module):
    """Mixes tokens causally: (B, L, D) -> (B, L, D), with no residual but its own.

    Called as ``mixer(x_BLD, span, number)`` (see `penstock.nn.causal_lm`); without a span there is no padding and
    nothing is remembered.

    Attributes:
        max_length: the longest sequence it can mix; ``None``: any.
    """

    max_length: int | None = None

    def state_size(self, length: int) -> int | None:
        """Numbers to be remembered after ``length`` tokens, as the paper counts them; ``None``: not defined there."""
        return None

    def check_length(self, length: int) -> None:
        """Raise `ValueError` for a sequence beyond `max_length`."""
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{length} tokens: this {type(self).__name__} was built for l_max={self.max_length}")


class PlainMixer(Mixer):
    """A mixer of one's own, called as ``module(x_BLD)``: it can be trained and tested, but keeps no state.

    Raises:
        ValueError: when called with a cache or padding; a `Mixer` subclass can have both.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        if span is not None and (span.states is not None or span.mask is not None):
            raise ValueError(
                f"{type(self.module).__name__} takes tokens only, so it can neither decode with a cache nor skip padding; "
                "make it a subclass of penstock.systems.sequence.zoology.mixers.Mixer"
            )
        return self.module(x_BLD)


class LinearGate(Gate):
    """The multiplicative gate of gated convolutions: a linear function of the input, (B, L, D) -> (B, L, D).

    Values are unbounded; one leaves what is gated as it is.

    Args:
        dim: width D.
        activation: a SiLU follows (BaseConv's ``use_act``).
    """

    passes = "channel"
    range = (float("-inf"), float("inf"))
    neutral = (0.0, 1.0)
    unit_dims = 1

    def __init__(self, dim: int, *, activation: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.activation = nn.SiLU() if activation else nn.Identity()

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.activation(self.proj(x_BLD))


def memory_of(span: Span | None, number: int) -> State | None:
    """What layer ``number`` remembers; ``None`` where nothing is."""
    return None if span is None else span.state(number)


def hide_padding(x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Zeros where the mask says padding."""
    return x_BLD if mask_BL is None else x_BLD * mask_BL[..., None].to(x_BLD.dtype)


def remember(memory: State | None, name: str, x: Tensor, dim: int = 1) -> Tensor:
    """``x`` behind what the memory holds under ``name``, along ``dim``; the memory then holds all of it."""
    if memory is None:
        return x
    if name in memory:
        x = torch.cat([memory[name], x], dim)
    memory[name] = x
    return x
