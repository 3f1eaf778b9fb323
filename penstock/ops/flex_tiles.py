"""Block-sparse and pyramid attention by PyTorch's FlexAttention: the backend for CUDA.

FlexAttention has one key sequence for all tiles, so the levels of the pyramid stand one after the other in it, each
filled up to whole blocks; which level of which tile a query sees is the mask, and an average of l tokens gets log l.

Shape legend: B batch, H heads, G key/value heads, L query length, T key length, K head width, M query blocks, N key
blocks, S keys of all levels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from penstock.ops.tile_attention import NOWHERE


def flex_tiles(
    q_BHLK: Tensor,
    keys: dict[int, Tensor],
    values: dict[int, Tensor],
    levels: Tensor,
    sizes: tuple[int, int],
    total: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention under a map of levels.

    Args:
        q_BHLK: queries.
        keys, values: by level, (B, G, tokens, K): the tokens of whole blocks, averaged.
        levels: (B, H, M, N), 0 or a key of ``keys``.
        sizes: queries and keys of a tile.
        total: T, before keys were filled up to whole blocks.
        causal, scale: see `block_sparse_attention`.

    Returns:
        (B, H, L, K), zeros for a query that sees nothing.
    """
    size_q, size_k = sizes
    device, length = q_BHLK.device, q_BHLK.shape[2]
    tile, level_of, last, seen = [], [], [], []
    for level, k in keys.items():
        at = torch.arange(-(-k.shape[2] // size_k) * size_k, device=device)
        final = at * level + level - 1
        hidden = (at >= k.shape[2]) | ((final >= total) if level == 1 else False)
        tile.append((at * level // size_k).clamp(max=levels.shape[3] - 1))
        level_of.append(torch.full_like(at, level))
        last.append(final.masked_fill(hidden, NOWHERE))
        # A block of averages stands for several tiles.
        wide = F.pad(levels == level, (0, -levels.shape[3] % level))
        seen.append(wide.unflatten(-1, (-1, level)).any(-1))
    tile_S, level_S, last_S = torch.cat(tile), torch.cat(level_of), torch.cat(last)
    bias_S = level_S.to(torch.float64).log().to(q_BHLK.dtype)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chosen = levels[b, h, (query // size_q).clamp(max=levels.shape[2] - 1), tile_S[key]] == level_S[key]
        return chosen & (last_S[key] <= query if causal else last_S[key] < NOWHERE)

    def count(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias_S[key]

    blocks = torch.cat(seen, -1)
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    mask = BlockMask.from_kv_blocks(
        blocks.sum(-1).int(), order.int(), BLOCK_SIZE=sizes, mask_mod=visible, seq_lengths=(length, len(tile_S))
    )
    k_S, v_S = (
        torch.cat([F.pad(x, (0, 0, 0, -x.shape[2] % size_k)) for x in side.values()], 2) for side in (keys, values)
    )
    return _attention(q_BHLK.is_cuda)(
        q_BHLK,
        k_S,
        v_S,
        score_mod=count if len(keys) > 1 else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHLK.shape[1] != k_S.shape[1],
    )


@cache
def _attention(compiled: bool) -> Any:
    """Compiled on CUDA; on the CPU, where the compiled form cannot train, as it is: for trying out, not for speed."""
    return torch.compile(flex_attention) if compiled else flex_attention
