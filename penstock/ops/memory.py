"""Reading a learned memory: every token takes a softmax-weighted mean of slots that do not depend on the sequence.

Shape legend: D width, M slots; ``...`` any leading axes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.ops.dispatch import choose


def slot_weights(x: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale x keys^T) over the slots, in float32 at least: (..., D), (M, D) -> (..., M)."""
    scores = x @ keys.mT * scale
    return scores.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def memory_read(
    x: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: Literal["reference", "fused"] | None = None,
) -> Tensor:
    """softmax(scale x keys^T) values: (..., D) -> (..., D).

    Args:
        x: queries.
        keys: (M, D).
        values: (M, D); the keys themselves if not given.
        scale: of the scores; GAM has 1.
        backend: "reference" forms the (..., M) weights; "fused" is PyTorch's attention, which keeps none of them
            for the backward pass. Default: the fused one for float32 and below.

    Raises:
        ValueError: if the widths differ.

    Source: GAM (Acharya 2025), the global pathway.
    """
    values = keys if values is None else values
    if x.shape[-1] != keys.shape[-1] or len(keys) != len(values):
        raise ValueError(
            f"x {tuple(x.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}: keys and values must be "
            f"(M, D) with D = {x.shape[-1]}"
        )
    form = choose(
        "memory_read", backend, ("reference", "fused"), lambda: "reference" if x.dtype == torch.float64 else "fused"
    )
    if form == "reference":
        return slot_weights(x, keys, scale) @ values
    flat = x.reshape(1, 1, -1, x.shape[-1])
    return F.scaled_dot_product_attention(flat, keys[None, None], values[None, None], scale=scale).reshape(
        *x.shape[:-1], values.shape[-1]
    )
