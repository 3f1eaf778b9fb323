"""Attention sinks and massive activations of transformers' decoders, with the definitions of the gated attention paper.

Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free" (2025).

Shape legend: B batch, L length, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.interop.graft.layout import Layout, find_places, first_tensor
from penstock.interop.graft.tap import Heads, run_decoder, tapped
from penstock.ops.block_attention import attention_probabilities


@torch.no_grad()
def attention_sink(model: nn.Module, tokens_BL: Tensor, *, layout: Layout | None = None) -> Tensor:
    """Share of attention on the first token, by layer: mean over batch, heads and all queries (F-Attn of the paper).

    The model attends densely meanwhile, also where its attention has been made sparse.

    Args:
        model: of transformers, grafted or not.
        tokens_BL: token ids without padding.
        layout: for a class that `graft` does not know.

    Returns:
        (layers,), from 0 to 1.

    Raises:
        UserError: for an unknown class, tokens of another shape, or layers with a sliding window.
    """
    _check(tokens_BL)
    shares: list[Tensor] = []

    def look(attention: nn.Module, heads: Heads) -> None:
        # Sample by sample: the whole map is the largest thing here.
        firsts = [
            attention_probabilities(q[None], k[None], causal=True, scale=heads.scale)[..., 0].mean()
            for q, k in zip(heads.queries, heads.keys, strict=True)
        ]
        shares.append(torch.stack(firsts).mean())

    with tapped(model, find_places(model, layout=layout), look):
        run_decoder(model, tokens_BL)
    return torch.stack(shares)


@torch.no_grad()
def massive_activation(model: nn.Module, tokens_BL: Tensor, *, layout: Layout | None = None) -> Tensor:
    """Largest absolute value in the residual stream after the embedding and each layer (M-Act of the paper).

    Args:
        model: of transformers, grafted or not; sparse attention stays sparse.
        tokens_BL: token ids without padding.
        layout: for a class that `graft` does not know.

    Returns:
        (1 + layers,).

    Raises:
        UserError: for an unknown class or tokens of another shape.
    """
    _check(tokens_BL)
    largest: list[Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        largest.append((args[0] if args else kwargs["hidden_states"]).abs().max())

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        largest.append(first_tensor(output).abs().max())

    places = find_places(model, layout=layout)
    handles = [places[0].layer.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [place.layer.register_forward_hook(after) for place in places]
    try:
        run_decoder(model, tokens_BL)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(largest)


def _check(tokens_BL: Tensor) -> None:
    if tokens_BL.ndim != 2:
        raise UserError(f"tokens are {tuple(tokens_BL.shape)}; they must be (B, L)")
