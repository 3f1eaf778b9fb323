"""A tap on the attention of transformers' decoders: what each layer attends with, and the chance to attend otherwise.

Queries and keys *before* rotary positions are caught by hooks on the modules that make them; those after, and the values,
come through an attention function registered with transformers.

Shape legend: B batch, L length, H query heads, G key/value heads, K head width, R rotating channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.errors import UserError
from penstock.interop.graft.layout import Layout, Place, base_of, first_tensor

#: The attention function's name in transformers' `AttentionInterface`.
NAME = "penstock"
_OFFER = "penstock_offer"
#: Where an output waits, on the module that made it, until attention is reached; ``None`` asks for it.
_WAITING = "_penstock_output"
#: What transformers' attention layers call their cache.
_CACHES = ("cache", "past_key_values", "layer_past")


class Heads(NamedTuple):
    """What a layer attends with when a sequence begins.

    Attributes:
        queries: (B, H, L, K), rotary positions applied.
        keys, values: (B, G, L, K).
        raw_queries, raw_keys: (B, L, H, K) and (B, L, G, K), before rotary positions.
        tables: cosines and sines of the tokens' positions, (1 or B, L, R) each.
        mask: bool (B, 1, L, L), who sees whom; ``None``: all earlier tokens.
        scale: of the scores.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    raw_queries: Tensor
    raw_keys: Tensor
    tables: tuple[Tensor, Tensor]
    mask: Tensor | None
    scale: float


#: Is shown an attention module and what it attends with; returns (B, H, L, K), or ``None`` for the usual attention.
Act: TypeAlias = Callable[[nn.Module, Heads], Tensor | None]


class _Offer(NamedTuple):
    """What travels with one call, from the attention module's beginning to the attention function."""

    act: Act
    layout: Layout
    tables: tuple[Tensor, Tensor]
    begins: bool


class Tap:
    """A tap that is open until `remove`; with an ``act`` that is a plain function it is copied with its model.

    Args:
        model: of transformers.
        places: layers whose attention ``act`` is shown.
        act: see `Act`; called when a sequence begins, not for tokens after a cache.

    Raises:
        UserError: if the model has no attention function to replace, or a layer has a sliding window.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place], act: Act) -> None:
        check(model, places)
        self._model = cast(Any, model)
        self._before: str = self._model.config._attn_implementation
        self._handles: list[RemovableHandle] = []
        for place in places:
            attention, layout = place.attention, place.layout
            self._handles += [
                attention.register_forward_pre_hook(partial(_offer, act, layout), with_kwargs=True),
                *(source.register_forward_hook(_keep) for source in _sources(attention, layout)),
            ]
        _register()
        self._model.set_attn_implementation(NAME)

    def remove(self) -> None:
        """Close it, and give the model the attention function back that it had."""
        for handle in self._handles:
            handle.remove()
        self._model.set_attn_implementation(self._before)


@contextmanager
def tapped(model: nn.Module, places: Sequence[Place], act: Act) -> Iterator[None]:
    """A `Tap` while the context is open."""
    tap = Tap(model, places, act)
    try:
        yield
    finally:
        tap.remove()


def run_decoder(model: nn.Module, tokens_BL: Tensor) -> None:
    """Run the model without its head, without a cache and without gradients."""
    with torch.no_grad():
        base_of(model)(tokens_BL.to(next(model.parameters()).device), use_cache=False)


def check(model: nn.Module, places: Sequence[Place]) -> None:
    """Raise `UserError` if the attention of these layers cannot be tapped."""
    if not hasattr(model, "set_attn_implementation"):
        raise UserError(
            f"{type(model).__name__} is no model of transformers: its attention cannot be replaced from outside"
        )
    for place in places:
        if getattr(place.attention, "sliding_window", None) is not None:
            raise UserError(
                f"layer {place.number} attends within a sliding window of {place.attention.sliding_window}; "
                "this needs layers that see all earlier tokens (choose them with layers=...)"
            )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _offer(
    act: Act, layout: Layout, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if attention.config._attn_implementation != NAME:
        return None
    cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
    for source in _sources(attention, layout):
        setattr(source, _WAITING, None)
    begins = cache is None or not cache.get_seq_length(attention.layer_idx)
    return args, kwargs | {_OFFER: _Offer(act, layout, kwargs["position_embeddings"], begins)}


def _keep(module: nn.Module, args: Any, output: Any) -> None:
    if hasattr(module, _WAITING):
        setattr(module, _WAITING, first_tensor(output))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for attention: (B, L, H, K), and no weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    offer: _Offer | None = kwargs.pop(_OFFER, None)
    if offer is not None:
        raw_queries, raw_keys = _take_raw(module, offer.layout, query.shape[1], key.shape[1])
        if offer.begins:
            length = query.shape[2]
            # A cache of fixed size hands out its empty end as well.
            key, value = key[:, :, :length], value[:, :, :length]
            mask = None if attention_mask is None else attention_mask[..., :length]
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            heads = Heads(query, key, value, raw_queries, raw_keys, offer.tables, mask, scale)
            y_BHLK = offer.act(module, heads)
            if y_BHLK is not None:
                return y_BHLK.transpose(1, 2).contiguous(), None
            attention_mask = mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _take_raw(attention: nn.Module, layout: Layout, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Queries (B, L, H, K) and keys (B, L, G, K) as they were before rotary positions."""
    outputs = []
    for source in _sources(attention, layout):
        outputs.append(getattr(source, _WAITING))
        delattr(source, _WAITING)
    if len(outputs) == 1:
        q, k, _ = outputs[0].unflatten(-1, (num_heads, -1)).chunk(3, -1)
        return q, k
    q, k = (output.flatten(2) for output in outputs)
    return q.unflatten(-1, (num_heads, -1)), k.unflatten(-1, (num_kv_heads, -1))


def _sources(attention: nn.Module, layout: Layout) -> list[nn.Module]:
    """The modules that make queries and keys; one where they are fused."""
    return [attention.get_submodule(name) for name in dict.fromkeys((layout.queries, layout.keys))]
