"""Pyramid attention beside block-sparse attention that errs as little, and beside dense attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lab.bench import Benchmark, Contest
from penstock.ops import block_sparse_attention, pyramid_attention
from penstock.systems.sequence.psa.maps import MapRules, density, ratios_from_ends
from penstock.systems.sequence.psa.synthetic import QUOTA, autoregressive

_HEADS, _WIDTH, _LENGTH, _BLOCK, _SMOOTHNESS = 4, 64, 8192, 128, 0.98
#: Shares of the blocks that the binary map is tried with.
_SHARES = tuple(n / 32 for n in range(2, 33))


def at_equal_error() -> Contest:
    generator = torch.Generator().manual_seed(0)
    q, k, v = autoregressive(_SMOOTHNESS, generator, length=_LENGTH, heads=_HEADS, width=_WIDTH)
    rules = MapRules(block_m=_BLOCK, block_n=_BLOCK, mask_ratios=ratios_from_ends(QUOTA), sample="stride")
    with torch.no_grad():
        dense = F.scaled_dot_product_attention(q, k, v)
        importance = rules.importance(q, k)
        levels = rules.levels(importance)
        reached = _error(_pyramid(q, k, v, levels), dense)
        rank = importance.argsort(-1, descending=True).argsort(-1)
        for share in _SHARES:
            blocks = rank < round(share * rank.shape[-1])
            missed = _error(_binary(q, k, v, blocks), dense)
            if missed <= reached:
                break
    entries = {
        "penstock pyramid": lambda: _pyramid(q, k, v, levels),
        "penstock block-sparse, no more error": lambda: _binary(q, k, v, blocks),
        "dense attention (SDPA)": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    return Contest(
        entries,
        note=f"Batch 1, {_HEADS} heads, width {_WIDTH}, length {_LENGTH}, blocks of {_BLOCK}, smooth tokens (AR(1), {_SMOOTHNESS}), "
        f"forward. Relative error {reached:.3f} at density {float(density(levels).mean()):.3f} of the pyramid, {missed:.3f} with "
        f"{share:.0%} of the blocks kept in full.",
    )


def _pyramid(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    return pyramid_attention(q, k, v, levels, block_size=_BLOCK)


def _binary(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    return block_sparse_attention(q, k, v, blocks, block_size=_BLOCK, causal=False)


def _error(output: Tensor, dense: Tensor) -> float:
    return float((output - dense).norm() / dense.norm())


def benchmarks() -> dict[str, Benchmark]:
    return {
        "pyramid_attention": Benchmark("Pyramid attention beside block-sparse attention of equal error", at_equal_error)
    }
